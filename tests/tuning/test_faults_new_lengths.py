"""Fault 76: what the first run of a shape costs is part of a candidate's time where lengths are always new."""

from __future__ import annotations

import itertools

import pytest
import torch
from fakes import FAST, Clock, add, honest, made_up, problem, qkv, replace_default, row, turn

import fastattn
from fastattn.environment.settings import current_settings
from fastattn.kernels.limits import Range
from fastattn.problems import length_buckets
from fastattn.problems.layouts import STRIDE_CLASSES, stride_class, to_bhsd
from fastattn.tuning import memory_use, new_lengths
from fastattn.tuning.accuracy.probes import plain_sample
from fastattn.tuning.stopwatch import Timing, time_interleaved
from fastattn.tuning.tune import tune_problem
from fastattn.verdicts.verdict import Outcome, Verdict

CPU = torch.device("cpu")
PLAN_S = 20e-3  # what planning for a new shape takes, five times the default's run


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(new_lengths, "_drawn", new_lengths.Counter())
    return turn(monkeypatch, Clock({"default": 4e-3, "sdpa_math": 4e-3, "planner": FAST}, other=7e-3))


def planner(clock, cost=PLAN_S, of=lambda q, k: (q.shape, k.shape), planned=None):
    """A kernel's run that plans for what it has not run before."""
    planned = set() if planned is None else planned

    def run(q, k, v, mask, a):
        if of(q, k) not in planned:
            planned.add(of(q, k))
            clock.seconds += cost
        return honest(q, k, v, mask, a)

    return run


def tuned(p, clock, **how) -> Verdict:
    return tune_problem(p, current_settings(), clock=clock, **how)


CHURNING = {
    "decode": problem(q_len=1, kv_len=255, lengths="kv"),
    "decode, GQA": problem(q_len=1, kv_len=1023, lengths="kv", q_heads=8, kv_heads=2, dtype="bfloat16"),
    "decode, batches that change": problem(q_len=1, kv_len=255, batch=4, lengths="all"),
    "speculative decode": problem(q_len=5, kv_len=95, lengths="kv", causal="bottom_right"),
    "prefill": problem(q_len=255, kv_len=255, lengths="all"),
    "few keys": problem(q_len=255, kv_len=1, lengths="all"),
    "training": problem(q_len=127, kv_len=127, lengths="all", needs_grad=True, causal="top_left"),
    "log-sum-exp": problem(q_len=127, kv_len=95, lengths="all", lse=True),
    "a mask": problem(q_len=63, kv_len=127, lengths="all", mask="bool", mask_shape="bk", mask_strides="contiguous"),
    "a mask that learns": problem(
        q_len=63, kv_len=63, lengths="all", mask="float32", mask_shape="hqk", mask_strides="contiguous",
        mask_grad=True, needs_grad=True,
    ),
    "bshd": problem(q_len=95, kv_len=95, lengths="all", layout="bshd", strides=("transposed",) * 3),
    "a cache": problem(q_len=1, kv_len=127, lengths="kv", strides=("contiguous", "cache", "cache")),
    "broadcast keys": problem(q_len=1, kv_len=127, lengths="kv", strides=("contiguous", "expanded", "expanded")),
    "short": problem(q_len=1, kv_len=16, lengths="kv"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHURNING)
def test_fault_76_a_plan_for_each_length_does_not_win_where_lengths_churn(case, clock, monkeypatch):
    """Where lengths are always new, what the first run of a length costs is part of a candidate's time."""
    add(monkeypatch, made_up("planner", planner(clock), lse=True))
    if CHURNING[case].lse:
        clock.costs["torch_flash"] = clock.costs["default"]  # what serves it untuned
    verdict = tuned(CHURNING[case], clock)
    trial = verdict.trial("planner")
    assert trial.outcome is Outcome.TOO_SLOW and "20 ms of it for a length that it has not run before" in trial.reason
    assert verdict.winner != "planner" and not any(t.reason for t in verdict.timed()), "nobody else pays"
    exact = tuned(CHURNING[case].replace(lengths="exact"), clock)
    assert exact.winner == "planner" and exact.trial("planner").reason is None, "where lengths stay it wins"


@pytest.mark.parametrize("cost, wins", [(1e-3, True), (2.5e-3, True), (3.2e-3, False), (0.3, False), (5.0, False)])
@pytest.mark.parametrize("case", ["decode", "prefill", "training"])
def test_fault_76_it_wins_where_it_is_faster_with_its_plan(case, cost, wins, clock, monkeypatch):
    add(monkeypatch, made_up("planner", planner(clock, cost)))
    verdict = tuned(CHURNING[case], clock)
    assert (verdict.winner == "planner") is wins
    if cost < 0.01:
        assert verdict.trial("planner").time_us == pytest.approx((FAST + cost) * 1e6, rel=0.01)


@pytest.mark.parametrize("cost", [20e-3, 0.2])
def test_fault_76_one_shape_called_over_and_over_does_not_pay(cost, clock, monkeypatch):
    add(monkeypatch, made_up("planner", planner(clock, cost)))
    assert tuned(problem(q_len=255, kv_len=255), clock, thorough=True).winner == "planner"
    q, k, v = qkv(40)
    fastattn.attention(q, k, v)
    assert fastattn.explain(q, k, v).served_by == "planner"


@pytest.mark.parametrize("plan, wins", [(0.4, True), (3.0, False), (4.0, False), (9.0, False)])
def test_fault_76_slow_runs_are_charged_too(plan, wins, clock, monkeypatch):
    """A run that is long enough to go by is not, where a plan was in it."""
    add(monkeypatch, made_up("planner", planner(clock, plan)))
    clock.other = 30.0
    clock.costs.update(default=2.0, planner=1.0)
    assert (tuned(CHURNING["decode"], clock, prior=("planner",)).winner == "planner") is wins


def test_fault_76_it_stands_in_nobodys_way(clock, monkeypatch):
    """A kernel that is fast on repeats alone does not make the others look too slow to be timed."""
    add(monkeypatch, made_up("planner", planner(clock, 2.5e-3)), made_up("steady", honest))
    clock.costs.update(planner=0.5e-3, steady=2e-3)
    verdict = tuned(CHURNING["decode"], clock, prior=("planner",))
    assert verdict.winner == "steady" and verdict.speedup() == pytest.approx(2.0)


def test_fault_76_what_is_paid_once_a_process_is_not_charged(clock, monkeypatch):
    add(monkeypatch, made_up("planner", planner(clock, 1.0, of=lambda q, k: q.shape[3])))
    verdict = tuned(CHURNING["decode"], clock)
    assert verdict.winner == "planner" and verdict.trial("planner").reason is None


@pytest.mark.parametrize("tile", [16, 64])
def test_fault_76_a_plan_that_serves_many_lengths_is_not_charged(tile, clock, monkeypatch):
    add(monkeypatch, made_up("planner", planner(clock, of=lambda q, k: -(-k.shape[2] // tile))))
    assert tuned(CHURNING["decode"], clock).winner == "planner"


def test_fault_76_two_kernels_that_share_a_cache_are_both_charged(clock, monkeypatch):
    """What one candidate ran is no longer new to the next, nor to another tuning of the same process."""
    planned = set()
    add(monkeypatch, *(made_up(name, planner(clock, planned=planned)) for name in ("planner", "planner_too")))
    clock.costs["planner_too"] = FAST
    for case in ("decode", "prefill", "decode", "decode"):
        verdict = tuned(CHURNING[case], clock)
        for name in ("planner", "planner_too"):
            assert verdict.trial(name).outcome is Outcome.TOO_SLOW and "20 ms of it" in verdict.trial(name).reason


def test_fault_76_the_default_pays_for_its_plans_too(clock, monkeypatch):
    replace_default(monkeypatch, planner(clock, PLAN_S))
    add(monkeypatch, made_up("steady", honest))
    clock.costs["steady"] = 5e-3
    verdict = tuned(CHURNING["decode"], clock)
    assert verdict.winner == "steady" and "20 ms of it" in verdict.trial("default").reason


@pytest.mark.parametrize("is_planner", [False, True])
@pytest.mark.parametrize("spike", range(5))
def test_fault_76_a_slow_moment_changes_nothing(spike, is_planner, clock, monkeypatch):
    """One run that something else made slow is no plan, and hides none."""
    runs = []

    def run(q, k, v, mask, a):
        if k.shape[2] != 255:
            is_new = k.shape[2] not in runs
            runs.append(k.shape[2])
            clock.seconds += PLAN_S * ((is_new and is_planner) + (len(runs) == spike))
        return honest(q, k, v, mask, a)

    add(monkeypatch, made_up("planner", run))
    assert tuned(CHURNING["decode"], clock).winner == ("default" if is_planner else "planner")
    assert len(runs) == 4


def test_fault_76_a_family_in_a_process(clock, monkeypatch):
    """From the call: the first lengths are tuned as they are, the bucket of those that churn is charged."""
    add(monkeypatch, made_up("planner", planner(clock)))
    calls = [qkv(n) for n in range(200, 206 + length_buckets.CHURN)]
    for q, k, v in calls:
        fastattn.attention(q, k, v)
    assert fastattn.explain(*calls[0]).served_by == "planner"
    assert fastattn.explain(*calls[-1]).served_by == "default"
    assert "20 ms of it" in row("planner", *calls[-1]).reason
    assert "20 ms of it for a length that it has not run before" in str(fastattn.explain(*calls[-1]))
    assert fastattn.explain(*calls[-1], tune=True).served_by == "default"
    for n in range(300, 304):
        fastattn.attention(*qkv(1, n))
    assert fastattn.explain(*qkv(1, 310)).served_by == "default"


def test_fault_76_explain_says_what_is_in_a_time(clock, monkeypatch):
    add(monkeypatch, made_up("planner", planner(clock, 6e-3)))
    q, k, v = qkv(1, 200)
    fastattn.attention(q, k, v)
    found = fastattn.explain(q, k, v)
    assert found.served_by == "default" and found.why.startswith("the fastest; ")
    [line] = [text for _, text in found.lines() if text.strip().startswith("planner ")]
    said = "planner 7 ms 0.57x, 6 ms of it for a length that it has not run before"
    assert line.split("error")[0].split() == said.split()
    replace_default(monkeypatch, planner(clock, 1e-3))
    why = fastattn.explain(q, k, v, tune=True).why
    assert why.startswith("the fastest; "), "what is in the default's time is no failure"


def test_fault_76_a_limit_on_lengths_is_kept(clock, monkeypatch):
    lengths = []

    def run(q, k, v, mask, a):
        lengths.append(k.shape[2])
        return honest(q, k, v, mask, a)

    add(monkeypatch, made_up("planner", run, needs=(Range("kv_len", min=200),)))
    assert tuned(CHURNING["decode"], clock).winner == "planner"
    assert 200 <= min(lengths) < 255 == max(lengths)


@pytest.mark.parametrize("seconds, runs", [(1e-3, 4), (0.09, 4), (0.2, 2), (0.9, 2), (20.0, 2)])
def test_fault_76_few_runs_are_made_for_it(seconds, runs, clock, monkeypatch):
    """A first call's time is bounded: the slower the runs the fewer they are, and what is slower anyway is not asked."""
    lengths = {"steady": [], "slow": []}

    def counting(name):
        return lambda q, k, *rest: lengths[name].append(k.shape[2]) or honest(q, k, *rest)

    add(monkeypatch, made_up("steady", counting("steady")), made_up("slow", counting("slow")))
    clock.costs.update(default=seconds, steady=seconds, slow=2 * seconds)
    tuned(CHURNING["decode"], clock, prior=("steady", "slow"))
    assert [sum(n != 255 for n in found) for found in lengths.values()] == [runs, 0]


def test_fault_76_shorter_lengths_take_no_memory_of_their_own(clock):
    """The bound of fault 71 holds: twice the problem's own tensors and 256 MiB."""
    p = problem(q_len=1, kv_len=400_000, q_heads=1, kv_heads=1, head_dim=64, lengths="kv")
    with memory_use._Meter([]) as meter:
        tuned(p, clock)
    assert meter.peak <= 2 * p.io_bytes + 256 * 2**20
    whole = plain_sample(p, CPU)
    with memory_use._Meter([whole.q, whole.k, whole.v]) as meter:
        new_lengths.shorter(whole, next(new_lengths._draw(p)))
    assert meter.peak == 0


def test_fault_76_a_candidate_is_not_dropped_in_a_round_for_another_with_a_plan():
    clock = Clock({"planner": FAST, "default": 4e-3})
    found = time_interleaved(clock.calls("planner", "default"), clock, 1.0, charges={"planner": PLAN_S})
    assert len(found["default"].samples) > len(found["planner"].samples) == 2
    assert found["planner"].median == pytest.approx(FAST + PLAN_S) and found["default"].charge == 0
    assert Timing([1.8, 1.9, 2.0, 2.1, 2.2], charge=2.0).noise == pytest.approx(0.025)


# --- samples of other lengths


@pytest.mark.parametrize("layout", ["bhsd", "bshd", "sbhd"])
@pytest.mark.parametrize("cls", STRIDE_CLASSES)
def test_fault_76_a_shorter_sample_lies_as_the_problem_does(cls, layout, clock):
    p = problem(batch=2, q_len=40, kv_len=60, head_dim_v=24, strides=(cls,) * 3, layout=layout, lengths="all")
    p = p.replace(mask="float32", mask_shape="bhqk", mask_strides="contiguous", mask_grad=True, needs_grad=True)
    whole = plain_sample(p, CPU)
    for less, short in enumerate(itertools.islice(new_lengths._draw(p), 5), 1):
        s = new_lengths.shorter(whole, short)
        for x, n, big in ((s.q, 40 - less, whole.q), (s.k, 60 - less, whole.k), (s.v, 60 - less, whole.v)):
            view = to_bhsd(x, layout)
            assert view.shape[2] == n and stride_class(view.shape, view.stride()) == cls
            assert x.requires_grad and x.is_leaf and x.untyped_storage().data_ptr() == big.untyped_storage().data_ptr()
        assert s.mask.shape == (2, 4, 40 - less, 60 - less) and s.mask.is_contiguous() and s.mask.requires_grad
        out = fastattn.attention(s.q, s.k, s.v, None, layout, kernel="sdpa_math")
        assert s.grad.shape == out.shape


def drawn(**changes):
    return [(p.q_len, p.kv_len) for p in new_lengths._draw(problem(**changes))]


def test_fault_76_lengths_are_new(clock):
    assert drawn(q_len=20, kv_len=20, lengths="all")[:3] == [(19, 19), (18, 18), (17, 17)]
    assert drawn(q_len=4, kv_len=20, lengths="all")[:2] == [(4, 19), (4, 18)]
    assert drawn(q_len=1, kv_len=3, lengths="kv") == [(1, 2), (1, 1)]
    assert drawn(q_len=1, kv_len=1, lengths="kv") == drawn(lengths="exact") == []
    assert len(set(drawn(q_len=1, kv_len=100_000, lengths="kv") + drawn(q_len=1, kv_len=100_000, lengths="kv"))) == 128
