"""What serves is decided in one place, from the Problem alone: explain says what attention() then does."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from fakes import DEFAULT, FAST, Clock, add, honest, made_up, problem, qkv, turn

import fastattn
from fastattn import attention, masks
from fastattn.dispatch import entries, fallback, resolve, service, tune_now
from fastattn.dispatch.circumstances import RULES, Circumstances
from fastattn.dispatch.session import session
from fastattn.environment.settings import current_settings
from fastattn.kernels.libraries import availability
from fastattn.verdicts.verdict import Outcome, Trial, Verdict

F_sdpa = torch.nn.functional.scaled_dot_product_attention


@pytest.fixture
def clock(monkeypatch):
    """A machine on which torch_flash with the group folded wins, where it may run."""
    return turn(monkeypatch, Clock({"default": DEFAULT, "torch_flash+gqa_fold": FAST, "torch_flash": FAST}))


def decode():
    return qkv(1, 40, heads=8, kv_heads=2)


def misaligned(x):
    """The same values, starting at an address that is no multiple of 16 bytes."""
    flat = torch.empty(x.numel() + 1)[1:]
    return flat.view(x.shape).copy_(x)


# --- a Verdict is made from the Problem alone

FIRST_CALLS = {
    "ordinary": lambda: attention(*decode()),
    "misaligned": lambda: attention(*(misaligned(x) for x in decode())),
    "flash switched off": lambda: with_flash_off(lambda: attention(*decode())),
    "math switched off": lambda: with_switch("math", lambda: attention(*decode())),
    "under autocast that casts nothing": lambda: under_autocast(lambda: attention(*(x.bfloat16() for x in decode()))),
    "a slice of a longer cache": lambda: attention(decode()[0], *(long_cache(x) for x in decode()[1:])),
}


def with_switch(name, call):
    switch = getattr(torch.backends.cuda, f"enable_{name}_sdp")
    switch(False)
    try:
        return call()
    finally:
        switch(True)


def with_flash_off(call):
    return with_switch("flash", call)


def under_autocast(call):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return call()


def long_cache(x):
    return torch.cat([x, x], 2)[:, :, : x.shape[2]]


def stable(verdict):
    """A verdict without what differs from run to run."""
    return verdict.problem, verdict.winner, [(t.candidate, t.outcome) for t in verdict.trials]


@pytest.mark.parametrize("first", FIRST_CALLS)
def test_the_verdict_is_the_same_whatever_the_first_call_was_like(first, clock):
    half = "autocast" in first
    cache = "cache" in first

    def call():
        q, k, v = decode()
        if cache:
            k, v = long_cache(k), long_cache(v)
        return tuple(x.bfloat16() for x in (q, k, v)) if half else (q, k, v)

    attention(*call())
    want = stable(fastattn.explain(*call()).verdict)
    fastattn.clear()
    for path in session.store(current_settings()).files():
        path.unlink()
    FIRST_CALLS[first]()
    attention(*call())
    assert stable(fastattn.explain(*call()).verdict) == want


def test_a_first_decode_with_flash_switched_off_does_not_shut_it_out(clock):
    """It did: the process never tried torch_flash again."""
    with_flash_off(lambda: attention(*decode()))
    attention(*decode())
    assert fastattn.explain(*decode()).served_by == "torch_flash+gqa_fold"


def test_while_a_backend_is_switched_off_nothing_is_timed_and_it_does_not_serve(clock):
    attention(*decode())
    assert fastattn.explain(*decode()).served_by == "torch_flash+gqa_fold"
    timed = len(clock.timed)

    def off():
        why = fastattn.explain(*decode())
        attention(*decode())
        return why.served_by

    assert not with_flash_off(off).startswith("torch_flash") and len(clock.timed) == timed
    ran = clock.ran.count("torch_flash+gqa_fold")
    attention(*decode())
    assert clock.ran.count("torch_flash+gqa_fold") == ran + 1, "switched on again, the winner serves"


# --- explain equals what attention() then does

OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "bottom right": {"mask": masks.Causal("bottom_right")},
    "window": {"window": (4, 0), "is_causal": True},
    "softcap": {"softcap": 5.0},
    "lse": {"return_lse": True},
    "bshd": {"layout": "bshd"},
    "order": {"kernel": "torch_math"},
    "accuracy": {"accuracy": "dtype"},
}
HELD = [name for name, _, _ in RULES if name not in ("foreign", "function_mode", "empty")]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("rule", [None, *HELD])
def test_explain_says_what_attention_then_does(rule, options, clock, monkeypatch):
    given = dict(OPTIONS[options])
    q, k, v = qkv(20)
    if rule is not None:
        held = Circumstances(**{rule: True})
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
        monkeypatch.setattr(resolve, "read_circumstances", lambda *_: held)
        monkeypatch.setattr(sys.modules["fastattn.dispatch.explain"], "read_circumstances", lambda *_: held)
    for stored in (False, True):
        if stored:  # what is tuned ahead
            fastattn.tune(fastattn.explain(q, k, v, **given).problem)
        said = fastattn.explain(q, k, v, **given)
        fastattn.stats.reset()
        attention(q, k, v, **given)
        found = fastattn.stats()
        if said.action == "tune":
            assert found["tunings"] == 1
        elif said.action == "pass on":
            assert found["passed_on"] == {said.why: 1} and not found["tunings"]
        else:
            assert found["served_by"] == {said.served_by: 1} and not found["tunings"], said
        entries.drop_all()


def test_explain_imports_and_runs_nothing(monkeypatch):
    loaded = []
    made = made_up("far", honest, library="far-away").replace(load=lambda: loaded.append(1))
    monkeypatch.setattr(availability, "library_version", lambda name: torch.__version__ if name == "torch" else "1.0")
    add(monkeypatch, made)
    fastattn.stats.reset()
    with fastattn.options.scope(mode="cached"):
        fastattn.explain(*qkv(20))
        fastattn.explain(*qkv(20), kernel="far")
    assert not loaded and not session.misses and not fastattn.stats()["calls"]


def test_a_tuning_that_failed_is_what_explain_says(clock, monkeypatch):
    def broken(*_, **__):
        raise ArithmeticError("no")

    monkeypatch.setattr(tune_now, "tune_problem", broken)
    q, k, v = qkv(20)
    attention(q, k, v)
    assert "tuning failed: ArithmeticError: no" in fastattn.explain(q, k, v).why


def test_every_rule_is_decided_by_one_function():
    """Whoever asks for circumstances asks decide_service next, but for is_passed_on, which it asks itself."""
    asked = service.Asked(
        problem(), service.CallFacts(), service.Device("cpu", "a CPU"), current_settings(), Circumstances()
    )
    for name, kernel in itertools.product(HELD, (None, "torch_math")):
        held = asked._replace(circumstances=Circumstances(**{name: True}), kernel=kernel)
        is_passed = service.is_passed_on(held.circumstances, kernel)
        assert (service.decide_service(held).action is service.Action.PASS) is is_passed


def test_what_a_tuning_found_wrong_is_no_last_resort():
    """torch_flash is the first of them for a log-sum-exp, which F.sdpa does not say."""
    p = problem(lse=True)
    asked = service.Asked(p, service.CallFacts(), service.Device("cpu", "a CPU"), current_settings(), Circumstances())
    assert [c.name for c in fallback.last_resorts(asked)] == ["torch_flash", "sdpa_math"]
    wrong = Trial("torch_flash", Outcome.INACCURATE, "forward error 3 budgets > 1")
    verdict = Verdict(p, "matmul", (wrong, Trial("matmul", time_us=1.0, forward=0.1)), incumbent="torch_flash")
    assert [c.name for c in fallback.last_resorts(asked, verdict)] == ["sdpa_math"]
    copied = verdict._replace(
        trials=(wrong._replace(candidate="torch_flash+contiguous"),), incumbent="torch_flash+contiguous"
    )
    copied = copied._replace(trials=(*copied.trials, *verdict.trials[1:]))
    assert [c.name for c in fallback.last_resorts(asked, copied)] == ["sdpa_math"], "the same with copies"
    capped = asked._replace(problem=problem(softcap=5.0))
    last = Verdict(
        capped.problem, "matmul", (wrong._replace(candidate="sdpa_math"), verdict.trials[1]), incumbent="sdpa_math"
    )
    assert [c.name for c in fallback.last_resorts(capped, last)] == ["sdpa_math"], "something always serves"


def test_an_untuned_log_sum_exp_has_second_derivatives():
    """sdpa_math has them, and served these before torch_flash did."""
    q, k, v = (torch.randn(1, 2, 5, 4, requires_grad=True) for _ in range(3))
    with fastattn.options.scope(mode="cached"):
        out, lse = attention(q, k, v, return_lse=True)
        assert fastattn.explain(q, k, v, return_lse=True).served_by == "torch_flash"
    found = []
    weights = torch.softmax(q @ k.mT / 2, -1)
    for result in (out.square().sum(), (weights @ v).square().sum()):
        [first] = torch.autograd.grad(result, q, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), (q, k, v)))
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)


# --- numbers that may change, choices that were of one scope


@pytest.mark.parametrize("front", [attention, fastattn.sdpa], ids=["attention", "sdpa"])
def test_a_scale_in_a_tensor_is_read_anew_in_each_call(front, clock):
    q, k, v = qkv(1, 40, heads=8, kv_heads=8)
    scale = torch.tensor(0.5)
    for value in (0.5, 0.5, 0.5, 2.0):
        scale.fill_(value)
        torch.testing.assert_close(front(q, k, v, scale=scale), F_sdpa(q, k, v, scale=value))


def test_a_verdict_tuned_under_kernels_is_made_again_without(clock):
    q, k, v = decode()
    with fastattn.options.scope(kernels="default,torch_math"):
        attention(q, k, v)
        assert fastattn.explain(q, k, v).served_by == "default"
    attention(q, k, v)
    assert fastattn.explain(q, k, v).served_by == "torch_flash+gqa_fold"
