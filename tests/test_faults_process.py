"""Faults 47, 48, 50, 52 and 56 of reference/faults.md: graph capture, memory, servers, busy machines, downloads."""

from __future__ import annotations

import ast
import builtins
import gc
import io
import os
import socket
import subprocess
import sys
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fakes import FAST, Clock, add, check, honest, made_up, problem, qkv, row, turn

import fastattn
from fastattn import api, config, device, guards, learnt, memory, race, resolve, samples, timing, tuning, verifying

F_sdpa = torch.nn.functional.scaled_dot_product_attention
SOURCE = Path(fastattn.__file__).parent


@pytest.fixture
def quick(monkeypatch):
    """A kernel that wins wherever it is timed; the clock that says so."""
    add(monkeypatch, made_up("quick", honest))
    return turn(monkeypatch, Clock({"default": 4e-3, "quick": FAST}))


def forbid(monkeypatch, *calls):
    """Any of these (object, name) fails the test."""
    for owner, name in calls:
        monkeypatch.setattr(owner, name, lambda *_, name=name, **__: pytest.fail(f"called {name}"))


TUNING = [(resolve, "tune"), (tuning, "tune"), (timing, "compare"), (verifying, "judges"), (samples, "plain")]

# --- fault 47: a CUDA graph is being captured

DISTURBING = [(torch.cuda, "synchronize"), (torch.cuda, "Event"), (torch.cuda, "empty_cache"), (torch.cuda, "mem_get_info"),
              (builtins, "open"), (io, "open"), (os, "open"), (os, "scandir"), (tempfile, "mkstemp"), *TUNING]  # fmt: skip


@pytest.fixture
def capture(monkeypatch):
    """capture(): from then on a CUDA graph is being captured."""
    real = guards.context

    def start():
        config.forget_calls()
        monkeypatch.setattr(guards, "context", lambda *given: replace(real(*given), capturing=True))
        forbid(monkeypatch, *DISTURBING)

    return start


def test_fault_47_a_capture_is_served_by_what_was_met_before_it(quick, capture):
    q, k, v = qkv(48)
    check(q, k, v)
    ran = quick.ran.count("quick")
    capture()
    fastattn.attention(q, k, v)
    assert quick.ran.count("quick") == ran + 1
    assert not api.front.table, "what was bound in a capture must not outlive it"


@pytest.mark.parametrize("known", ["unknown", "on disk"])
def test_fault_47_anything_else_gets_the_default_without_a_file_a_clock_or_a_sync(known, quick, capture, caplog):
    fastattn.attention(*qkv(40))  # the process is warm
    q, k, v = qkv(48)
    if known == "on disk":
        fastattn.attention(q, k, v)
        fastattn.clear()
    capture()
    ran = quick.ran.count("quick")
    assert torch.equal(fastattn.attention(q, k, v), F_sdpa(q, k, v))
    assert quick.ran.count("quick") == ran
    assert len(learnt.misses()) == 1 and "being captured" in caplog.text


def test_fault_47_after_the_capture_it_is_tuned(quick, monkeypatch):
    q, k, v = qkv(48)
    real = guards.context
    with monkeypatch.context() as patch:
        patch.setattr(guards, "context", lambda *given: replace(real(*given), capturing=True))
        fastattn.attention(q, k, v)
    fastattn.attention(q, k, v)
    assert fastattn.explain(q, k, v).served_by == "quick"


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
    made, released = [], []

    def oom(q, k, v, mask, a):
        scores = torch.zeros(8)
        made.append(weakref.ref(scores))
        no_memory(kind)

    def release(device):
        gc.collect()
        released.append([ref() for ref in made])

    add(monkeypatch, made_up("oom", oom), made_up("quick", honest))
    monkeypatch.setattr(memory, "release", release)
    clock = turn(monkeypatch, Clock({"default": 4e-3, "quick": FAST}))
    verdict = tuning.tune(problem(), config.current(), clock=clock)
    assert verdict.trial("oom").reason.startswith("out of memory: ") and verdict.winner == "quick"
    assert made and released == [[None] * len(made)], "memory is released once, after the exception let go of it"


def test_fault_48_what_is_released_on_a_gpu(monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    memory.release(torch.device("cpu"))
    assert not emptied
    memory.release(torch.device("cuda"))
    assert emptied == [1]


def test_fault_48_free_memory_counts_what_torch_keeps_for_itself(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert memory.free(torch.device("cuda")) == 130
    assert 2**20 < memory.free(torch.device("cpu"))
    monkeypatch.setattr(builtins, "open", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError))
    assert memory.free(torch.device("cpu")) == float("inf")


def test_fault_48_scores_that_would_take_most_of_what_is_free_are_not_tried(monkeypatch):
    """On the CPU there is no exception to catch: the process would be killed."""
    p = problem()
    monkeypatch.setattr(memory, "free", lambda device: p.unfused_bytes)
    clock = turn(monkeypatch, Clock({"default": 4e-3}, other=FAST))
    verdict = tuning.tune(p, config.current(), clock=clock)
    limit = int(race.FREE_SHARE * p.unfused_bytes)
    assert verdict.trial("torch_math").reason == f"{race.NO_ROOM}: {p.unfused_bytes} temporary bytes > {limit}"
    assert not {"torch_math", "matmul"} & set(clock.ran) and "default" in clock.ran


def test_fault_48_nor_is_a_default_that_would_write_them_down(monkeypatch, own_store):
    """A float mask with a gradient is for torch's unfused math alone. Another process may find more memory."""
    p = problem(needs_grad=True, mask="float32", mask_shape="bhqk", mask_grad=True)
    free = [p.unfused_bytes, 10 * p.unfused_bytes]
    monkeypatch.setattr(memory, "free", lambda device: free[0])
    clock = turn(monkeypatch, Clock({"default": FAST}))
    verdict = resolve.tune(p, config.current())
    assert not clock.ran and verdict.winner == "default"
    assert verdict.trial("default").reason.startswith(race.NO_ROOM)
    assert not list(own_store.rglob("*.json"))
    del free[0]
    [verdict] = fastattn.tune(p)
    assert verdict.trial("default").time_us and list(own_store.rglob("*.json"))


def test_fault_48_tuning_that_finds_no_memory_of_its_own_leaves_the_default(monkeypatch, caplog):
    tries = []

    def plain(*_, **__):
        tries.append(1)
        no_memory()

    monkeypatch.setattr(samples, "plain", plain)
    q, k, v = qkv(48)
    for _ in range(3):
        assert torch.equal(fastattn.attention(q, k, v), F_sdpa(q, k, v))
    assert len(tries) == 1, "it tries again at every call"
    [record] = caplog.records
    assert "out of memory" in record.getMessage() and "the default serves" in record.getMessage()


def test_fault_48_the_reference_of_a_long_problem_holds_no_square():
    p = problem(q_heads=1, kv_heads=1, q_len=4096, kv_len=4096, head_dim=16)
    with memory._Meter([]) as meter:
        verifying.judges(p, torch.device("cpu"))[0].errors(lambda q, k, v, mask: F_sdpa(q, k, v))
    assert meter.peak < 4096 * 4096 * 8 / 2  # half of one head's scores in float64


# --- fault 50: a server that must be ready


def test_fault_50_cached_mode_tunes_nothing_whatever_it_meets(monkeypatch):
    forbid(monkeypatch, *TUNING)
    monkeypatch.setenv("FASTATTN_MODE", "cached")
    config.forget()
    for n in (1, 7, 64):
        for grad in (False, True):
            q, k, v = qkv(n, 64, heads=4, kv_heads=2, grad=grad)
            check(q, k, v)
            check(q, k, v, torch.rand(n, 64) > 0.2)
        with fastattn.patch():
            F_sdpa(*qkv(n, 64))
            torch.nn.functional.scaled_dot_product_attention(*qkv(n, 65))
    assert learnt.misses() and learnt.state.spent_s == 0


def test_fault_50_cached_mode_serves_what_was_tuned_ahead(quick, monkeypatch):
    q, k, v = qkv(48)
    fastattn.tune(fastattn.explain(q, k, v).problem)
    fastattn.clear()
    forbid(monkeypatch, *TUNING)
    with fastattn.options(mode="cached"):
        check(q, k, v)
        assert fastattn.explain(q, k, v).served_by == "quick" and not learnt.misses()


def test_fault_50_ahead_of_time_tuning_says_how_far_it_is(quick):
    steps = []
    problems = [problem(), problem(q_len=80, kv_len=80)]
    fastattn.tune(problems, progress=lambda *step: steps.append(step))
    assert list(dict.fromkeys(p for p, *_ in steps)) == problems
    for p in problems:
        mine = [(index, count) for each, _, index, count in steps if each == p]
        assert [index for index, _ in mine] == list(range(1, len(mine) + 1))
        assert {count for _, count in mine} == {len(mine) + 1}  # the incumbent is one more


# --- fault 52: a machine that is not ours alone

RAMPS = {  # seconds since the first timing began -> what everything costs
    "throttled": lambda t: 1 + t / 0.05,
    "recovering": lambda t: max(0.5, 3 - t / 0.1),
}


def change_speed(monkeypatch, clock, ramp):
    """From the first timing on everything costs `ramp` times as much."""
    real, began = timing.compare, []

    def compare(calls, clock, *rest):
        began.append(clock.now())
        return real(calls, clock, *rest)

    monkeypatch.setattr(timing, "compare", compare)
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
    assert 1 < len(timings) <= tuning.STEADY_TRIES
    assert tuning.is_lasting(verdict) and len(list(own_store.rglob("*.json"))) == 1


def test_fault_52_it_does_not_wait_for_ever(quick, own_store, monkeypatch):
    timings = change_speed(monkeypatch, quick, RAMPS["throttled"])
    quick.jitter = lambda name, now: RAMPS["throttled"](now - timings[-1]) if timings else 1.0  # every time anew
    [verdict] = fastattn.tune(problem())
    assert len(timings) == tuning.STEADY_TRIES
    assert not tuning.is_lasting(verdict) and not list(own_store.rglob("*.json"))


def test_fault_52_a_tombstone_is_written_whatever_the_machine_did(quick, own_store, monkeypatch):
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
    assert row("fragile", q, k, v).tombstone == "RuntimeError: broken"


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


# --- fault 56: nothing is downloaded, built or loaded by a name from elsewhere

OFFLINE = """
import sys, torch
seen = []
WATCHED = ("socket.connect", "socket.getaddrinfo", "socket.bind", "urllib.Request", "subprocess.Popen", "os.system",
           "os.exec", "os.posix_spawn", "ftplib.connect", "http.client.connect")
sys.addaudithook(lambda event, args: seen.append((event, args)) if event in WATCHED else None)
import fastattn
q = torch.randn(1, 2, 24, 16)
fastattn.attention(q, q, q)
fastattn.explain(q, q, q, tune=True)
fastattn.tune(fastattn.explain(q, q, q, is_causal=True).problem)
with fastattn.patch():
    torch.nn.functional.scaled_dot_product_attention(q, q, q)
assert not seen, seen
"""


def test_fault_56_nobody_is_called_from_import_to_patch(tmp_path):
    environment = {**os.environ, "FASTATTN_CACHE_DIR": str(tmp_path / "store")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", OFFLINE], env=environment, timeout=120, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


FOREIGN = {"urllib", "http", "ftplib", "socket", "requests", "httpx", "aiohttp", "huggingface_hub", "pip", "ensurepip"}
FOREIGN_NAMES = {"entry_points", "get_kernel", "load_inline", "cpp_extension", "load_state_dict_from_url", "system"}


def reaches_out(source):
    """Names in a source that fetch, build, or load what somebody else registered."""
    for node in ast.walk(ast.parse(source)):
        names = [a.name for a in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from (n for n in names if n.split(".")[0] in FOREIGN or n.rpartition(".")[2] in FOREIGN_NAMES)
        if isinstance(node, ast.Attribute) and (node.attr in FOREIGN_NAMES or ast.unparse(node) == "torch.hub"):
            yield node.attr


def test_fault_56_no_source_fetches_builds_or_asks_for_plugins():
    assert {(p.name, name) for p in SOURCE.rglob("*.py") for name in reaches_out(p.read_text())} == set()


@pytest.mark.parametrize("bad", [
    "import urllib.request", "from huggingface_hub import hf_hub_download", "torch.hub.load(x)", "from kernels import get_kernel",
    "importlib.metadata.entry_points()", "torch.utils.cpp_extension.load(n)", "os.system(c)",
])  # fmt: skip
def test_fault_56_the_guard_would_see_it(bad):
    assert list(reaches_out(bad))


def test_fault_56_the_tests_themselves_reach_nobody():
    with socket.socket() as probe, pytest.raises(OSError, match="wants to reach"):
        probe.connect(("192.0.2.1", 80))
