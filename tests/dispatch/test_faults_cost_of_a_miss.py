"""Fault 88: a miss asks the few kernels that may answer, not all that are known. What it takes is in benchmarks, not here."""

from __future__ import annotations

import pytest
import torch
from fakes import FAST, Clock, add, honest, made_up, problem, turn

import fastattn
from fastattn.dispatch import fallback
from fastattn.dispatch.circumstances import Circumstances, read_circumstances
from fastattn.dispatch.service import Asked
from fastattn.environment.device import Device
from fastattn.environment.settings import Settings, current_settings
from fastattn.kernels import known_faults, registry
from fastattn.planning import candidates, default_choice
from fastattn.problems.call_facts import CallFacts

r = torch.randn


@pytest.fixture
def asked_kernels(monkeypatch):
    """Names of the kernels that were asked whether they can do a problem, in order."""
    names, real = [], candidates.decide

    def decide(kernel, *given, **more):
        names.append(kernel.name)
        return real(kernel, *given, **more)

    monkeypatch.setattr(candidates, "decide", decide)
    return names


CALLS = {
    "plain": (lambda n: (r(1, 2, n, 8), r(1, 2, n, 8), r(1, 2, n, 8)), {}),
    "GQA, causal": (lambda n: (r(1, 4, n, 8), r(1, 2, n, 8), r(1, 2, n, 8)), {"is_causal": True}),
    "bfloat16, a mask": (
        lambda n: tuple(r(1, 2, n, 8).bfloat16() for _ in range(3)), {"mask": lambda n: r(1, 1, 1, n) < 1}),
    "decoding": (lambda n: (r(1, 2, 1, 8), r(1, 2, 2 ** (n % 7 + 5), 8), r(1, 2, 2 ** (n % 7 + 5), 8)), {}),
    "odd head dims": (lambda n: (r(1, 2, n, 7), r(1, 2, n, 7), r(1, 2, n, 9)), {}),
}  # fmt: skip


def called(name, n):
    make, options = CALLS[name]
    return make(n), {key: value(n) if callable(value) else value for key, value in options.items()}


@pytest.mark.parametrize("name", CALLS)
def test_fault_88_an_untuned_default_asks_a_few_kernels(name, asked_kernels):
    """A miss that the untuned default or a bucket's winner serves asks those kernels whether they can, and no others."""
    with fastattn.options.scope(mode="cached"):
        for n in (30, 31):
            given, options = called(name, n)
            asked_kernels.clear()
            fastattn.attention(*given, **options)
            assert set(asked_kernels) <= {"default", "torch_flash", "torch_math", "sdpa_math"}
            assert len(asked_kernels) <= 4


@pytest.mark.parametrize("winner", ["quick", "default"])
def test_fault_88_a_bucket_mate_asks_the_winner(winner, asked_kernels, monkeypatch):
    add(monkeypatch, made_up("quick", honest))
    turn(monkeypatch, Clock({"default": 4e-3, "quick": FAST if winner == "quick" else 8e-3}))
    for n in (300, 310, 320, 330, 500):
        fastattn.attention(*called("plain", n)[0])
    for n in (490, 495):
        asked_kernels.clear()
        fastattn.attention(*called("plain", n)[0])
        expected = ["quick"] if winner == "quick" else ["default"]
        assert asked_kernels == expected
    assert fastattn.stats()["tunings"] and fastattn.explain(*called("plain", 490)[0]).served_by == winner


PROBLEMS = {
    "plain": {},
    "half, banded, GQA": {"dtype": "bfloat16", "causal": "bottom_right", "q_len": 3, "kv_heads": 2},
    "softcap": {"softcap": 5.0},
    "log-sum-exp": {"lse": True},
    "dropout": {"dropout": True},
    "training with a bias": {"mask": "float32", "mask_shape": "bhqk", "mask_grad": True, "needs_grad": True},
    "wide v": {"head_dim_v": 64},
    "too much memory": {"mask": "float32", "mask_shape": "11qk", "mask_grad": True, "needs_grad": True,
                        "q_len": 20_000, "kv_len": 20_000},
    "score_mod": {"score_mod": True},
    "empty": {"kv_len": 0},
}  # fmt: skip
DEVICES = {
    "cpu": Device.of(torch.device("cpu")),
    "A100": Device("cuda", "made-up A100", 80, cuda="12.8", cudnn=91900),
    "H100": Device("cuda", "made-up H100", 90, cuda="12.8", cudnn=92300),
}


@pytest.mark.parametrize(
    "off", [(), ("flash",), ("flash", "efficient", "math", "cudnn")], ids=["all on", "no flash", "none"]
)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_fault_88_the_few_give_the_answer_of_all(name, device, off):
    kind = DEVICES[device]
    p = problem(**{**PROBLEMS[name], "device": kind.type})
    asked = Asked(p, CallFacts(switched_off=off), kind, Settings(), Circumstances())
    every = fallback.all_decisions(asked)
    want = default_choice.fallbacks(p, kind, asked.settings, every, asked.facts)
    assert [c.name for c in fallback.last_resorts(asked)] == [c.name for c in want]
    assert fallback.why_not_default(asked) == default_choice.why_not_default(
        p, kind, asked.settings, every, asked.facts
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fault_88_a_row_is_the_one_that_all_rows_have(device, monkeypatch):
    add(monkeypatch, made_up("matmul", honest), made_up("mine", honest, devices=("cuda",)))
    rows = {kernel.name: kernel for kernel in registry.rows_for(device)}
    assert {name: registry.row_for(name, device) for name in rows} == rows
    assert registry.row_for("no such kernel", device) is None


def test_fault_88_what_is_allowed_is_remembered_by_value():
    q = r(1, 1, 4, 8)
    for _ in range(2):
        for mode in ("auto", "cached", "off"):
            with fastattn.options.scope(mode=mode):
                found = read_circumstances([q, q, q], current_settings(), False)
                assert (found.off, found.cached) == (mode == "off", mode == "cached")


def test_fault_88_faults_are_found_by_kernel_as_they_stand_in_the_file():
    listed = known_faults.known_faults()
    grouped = known_faults._by_kernel(None)
    assert sum(len(some) for some in grouped.values()) == sum(len(fault.kernels) for fault in listed)
    assert all(name in fault.kernels and fault.runs == runs for (name, runs), some in grouped.items() for fault in some)
