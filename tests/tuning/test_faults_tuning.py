"""Faults 48 and 52 of reference/faults.md: memory that runs out while tuning, and machines that are not ours alone."""

from __future__ import annotations

import builtins
import gc
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fakes import FAST, Clock, add, check, honest, made_up, problem, qkv, row, turn

import fastattn
from fastattn.dispatch import tune_now
from fastattn.environment import device
from fastattn.environment.settings import current_settings, reload_settings
from fastattn.tuning import memory_use, screening, too_large
from fastattn.tuning import tune as tune_module
from fastattn.tuning.accuracy.judge import judges_of_problem
from fastattn.tuning.stopwatch import MAX_ROUNDS, time_interleaved
from fastattn.tuning.tune import STEADY_TRIES, tune_problem
from fastattn.verdicts.verdict import Outcome

F_sdpa = torch.nn.functional.scaled_dot_product_attention


@pytest.fixture
def quick(monkeypatch):
    """A kernel that wins wherever it is timed; the clock that says so."""
    add(monkeypatch, made_up("quick", honest))
    return turn(monkeypatch, Clock({"default": 4e-3, "quick": FAST}), MAX_ROUNDS)


# --- fault 48: memory runs out while tuning

EXHAUSTED = {
    "cuda": (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 3 GiB"),
    "cpu": (RuntimeError, "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 99 bytes"),
    "python": (MemoryError, "no room"),
}


def no_memory(kind="cuda"):
    error, text = EXHAUSTED[kind]
    raise error(text)


@pytest.mark.parametrize("kind", EXHAUSTED)
def test_fault_48_a_candidate_without_memory_is_out_and_nothing_of_it_is_kept(kind, monkeypatch):
    """A candidate that finds no memory is out, and nothing of it stays in memory."""
    made, released = [], []

    def oom(q, k, v, mask, a):
        scores = torch.zeros(8)
        made.append(weakref.ref(scores))
        no_memory(kind)

    def release(device):
        gc.collect()
        released.append([ref() for ref in made])

    add(monkeypatch, made_up("oom", oom), made_up("quick", honest))
    monkeypatch.setattr(memory_use, "release_memory", release)
    clock = turn(monkeypatch, Clock({"default": 4e-3, "quick": FAST}))
    verdict = tune_problem(problem(), current_settings(), clock=clock)
    assert verdict.trial("oom").reason.startswith("out of memory: ") and verdict.winner == "quick"
    assert made and released == [[None] * len(made)], "memory is released once, after the exception let go of it"


def test_fault_48_what_is_released_on_a_gpu(monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    memory_use.release_memory(torch.device("cpu"))
    assert not emptied
    memory_use.release_memory(torch.device("cuda"))
    assert emptied == [1]


def test_fault_48_free_memory_counts_what_torch_keeps_for_itself(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert memory_use.free_bytes(torch.device("cuda")) == 130
    assert memory_use.free_bytes(torch.device("cpu")) > 2**20
    monkeypatch.setattr(builtins, "open", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError))
    monkeypatch.setattr(memory_use, "CGROUPS", Path("/proc/none"))
    assert memory_use.free_bytes(torch.device("cpu")) == float("inf")


def test_fault_48_scores_that_would_take_most_of_what_is_free_are_not_tried(monkeypatch):
    """On the CPU there is no exception to catch: the process would be killed."""
    p = problem()
    monkeypatch.setattr(memory_use, "free_bytes", lambda device: p.unfused_bytes)
    clock = turn(monkeypatch, Clock({"default": 4e-3}, other=FAST))
    verdict = tune_problem(p, current_settings(), clock=clock)
    limit = int(too_large.FREE_SHARE * p.unfused_bytes)
    why = f"not tried: too little memory is free: {p.unfused_bytes} temporary bytes > {limit}"
    assert verdict.trial("torch_math").reason == why
    assert not {"torch_math", "matmul"} & set(clock.ran) and "default" in clock.ran


def test_fault_48_nor_is_a_default_that_would_write_them_down(monkeypatch, own_store):
    """A mask's gradient is for torch's unfused math where nothing works in blocks. Another process may find room."""
    p = problem(needs_grad=True, mask="float32", mask_shape="bhqk", mask_grad=True)
    free = [p.unfused_bytes, 10 * p.unfused_bytes]
    monkeypatch.setattr(memory_use, "free_bytes", lambda device: free[0])
    clock = turn(monkeypatch, Clock({"default": FAST}))
    monkeypatch.setenv("FASTATTN_KERNELS", "torch_math")
    reload_settings()
    verdict = tune_now.tune_and_keep(p, current_settings())
    assert not clock.ran and verdict.winner == "default"
    assert verdict.trial("default").outcome is Outcome.NO_MEMORY_FREE
    assert not list(own_store.rglob("*.json"))
    del free[0]
    [verdict] = fastattn.tune(p)
    assert verdict.trial("default").time_us and list(own_store.rglob("*.json"))


def test_fault_48_tuning_that_finds_no_memory_of_its_own_leaves_the_default(monkeypatch, caplog):
    tries = []

    def plain(*_, **__):
        tries.append(1)
        no_memory()

    monkeypatch.setattr(screening, "plain_sample", plain)
    q, k, v = qkv(48)
    for _ in range(3):
        assert torch.equal(fastattn.attention(q, k, v), F_sdpa(q, k, v))
    assert len(tries) == 1, "it tries again at every call"
    [record] = caplog.records
    assert "out of memory" in record.getMessage() and "the default serves" in record.getMessage()


def test_fault_48_the_reference_of_a_long_problem_holds_no_square():
    p = problem(q_heads=1, kv_heads=1, q_len=4096, kv_len=4096, head_dim=16)
    with memory_use._Meter([]) as meter:
        judges_of_problem(p, torch.device("cpu"))[0].errors(lambda q, k, v, mask: F_sdpa(q, k, v))
    assert meter.peak < 4096 * 4096 * 8 / 2  # half of one head's scores in float64


# --- fault 52: a machine that is not ours alone

RAMPS = {  # seconds since the first timing began -> what everything costs
    "throttled": lambda t: 1 + t / 0.05,
    "recovering": lambda t: max(0.5, 3 - t / 0.1),
}


def change_speed(monkeypatch, clock, ramp):
    """From the first timing on everything costs `ramp` times as much."""
    real, began = time_interleaved, []

    def compare(calls, clock, *rest):
        began.append(clock.now())
        return real(calls, clock, *rest)

    monkeypatch.setattr(tune_module, "time_interleaved", compare)
    clock.jitter = lambda name, now: ramp(now - began[0]) if began else ramp(0.0)
    return began


NOISES = {
    "steady": lambda name, now: 1.0,
    "noisy": lambda name, now: 1 + 0.3 * (int(now * 1e6) % 7 / 7),
    "one spike": lambda name, now: 20.0 if 0.2 < now < 0.22 else 1.0,
    "slow at first": lambda name, now: 1.5 if now < 0.05 else 1.0,
}


@pytest.mark.parametrize("ramp", RAMPS)
def test_fault_52_what_was_timed_while_the_speed_changed_is_not_written(ramp, quick, own_store, monkeypatch, caplog):
    """What was timed while the machine changed its speed is not written."""
    change_speed(monkeypatch, quick, RAMPS[ramp])
    q, k, v = qkv(48)
    with caplog.at_level("INFO", "fastattn"):
        check(q, k, v)
    assert fastattn.explain(q, k, v).served_by == "quick", "this process uses what it measured"
    assert not list(own_store.rglob("*.json"))
    assert "for this process only" in caplog.text
    quick.jitter = NOISES["steady"]
    fastattn.clear()
    check(q, k, v)
    assert len(list(own_store.rglob("*.json"))) == 1, "a process on a quiet machine writes it"


@pytest.mark.parametrize("noise", NOISES)
def test_fault_52_noise_is_no_drift(noise, quick, own_store):
    quick.jitter = NOISES[noise]
    check(*qkv(48))
    assert len(list(own_store.rglob("*.json"))) == 1


def test_fault_52_ahead_of_time_tuning_waits_for_a_steady_machine(quick, own_store, monkeypatch):
    timings = change_speed(monkeypatch, quick, lambda t: 1 + min(t, 0.1) / 0.05)
    [verdict] = fastattn.tune(problem())
    assert 1 < len(timings) <= STEADY_TRIES
    assert verdict.is_lasting and len(list(own_store.rglob("*.json"))) == 1


def test_fault_52_it_does_not_wait_for_ever(quick, own_store, monkeypatch):
    timings = change_speed(monkeypatch, quick, RAMPS["throttled"])
    quick.jitter = lambda name, now: RAMPS["throttled"](now - timings[-1]) if timings else 1.0  # every time anew
    [verdict] = fastattn.tune(problem())
    assert len(timings) == STEADY_TRIES
    assert not verdict.is_lasting and not list(own_store.rglob("*.json"))


def test_fault_52_a_demotion_is_written_whatever_the_machine_did(quick, own_store, monkeypatch):
    change_speed(monkeypatch, quick, RAMPS["throttled"])
    q, k, v = qkv(48)
    broken = []

    def run(*given):
        if broken:
            raise RuntimeError("broken")
        return honest(*given)

    add(monkeypatch, made_up("fragile", run))
    quick.costs.update(fragile=FAST, quick=4e-3)
    check(q, k, v)
    assert fastattn.explain(q, k, v).served_by == "fragile" and not list(own_store.rglob("*.json"))
    broken.append(1)
    check(q, k, v)
    fastattn.clear()
    assert row("fragile", q, k, v).reason == "RuntimeError: broken"


def test_fault_52_a_part_of_a_gpu_is_another_device(monkeypatch):
    """MIG: the same silicon, another name and number of multiprocessors. MPS limits the number alone."""
    parts = [("NVIDIA H100", 132), ("NVIDIA H100 MIG 1g.10gb", 16), ("NVIDIA H100", 66)]
    slugs = set()
    for name, count in parts:
        found = SimpleNamespace(name=name, multi_processor_count=count, major=9, minor=0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index, found=found: found)
        device._device.cache_clear()
        slugs.add(device.Device.of(torch.device("cuda", 0)).slug)
    device._device.cache_clear()
    assert len(slugs) == len(parts)
