"""One tuning under a fake clock: budget, memory rule, what is tried again, and what is left alone."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch
from fakes import FAST, SLOW, Clock, add, check, honest, made_up, problem, qkv, replace_default, row, turn

import fastattn
from fastattn import Problem
from fastattn.environment.settings import current_settings
from fastattn.kernels.libraries import availability
from fastattn.kernels.limits import Range
from fastattn.tuning import memory_use
from fastattn.tuning.screening import Screening
from fastattn.tuning.stopwatch import MAX_ROUNDS
from fastattn.tuning.tune import _budget, tune_problem
from fastattn.verdicts.verdict import Outcome, Trial, Verdict

MIB = 2**20


def tune(p=None, clock=None, **how):
    return tune_problem(p or problem(), current_settings(), clock=clock, **how)


def reasons(verdict):
    return {t.candidate: t.reason for t in verdict.trials}


# --- winner and verdict


def test_the_fastest_wins_and_every_trial_has_a_time_or_a_reason(monkeypatch):
    add(monkeypatch, made_up("a", honest), made_up("b", honest))
    clock = turn(monkeypatch, Clock({"default": 4e-3, "a": 2e-3, "b": 1e-3}, other=5e-3))
    verdict = tune(clock=clock)
    assert verdict.winner == "b" and verdict.speedup() == pytest.approx(4.0)
    assert verdict.trial("a").time_us == pytest.approx(2000) and verdict.trial("default").time_us == pytest.approx(4000)
    assert all((t.time_us is None) != (t.reason is None) for t in verdict.trials)
    assert {t.candidate.split("+")[0] for t in verdict.trials} >= {
        "default",
        "torch_flash",
        "torch_math",
        "matmul",
        "a",
    }


def test_times_include_the_conversions_of_a_candidate(monkeypatch):
    """A cast that eats the gain loses: the clock sees the Call, not the kernel."""
    add(monkeypatch, made_up("a", honest, fp32=True))
    clock = turn(monkeypatch, Clock({"default": 2e-3, "a": 1.9e-3, "a+fp32": 1e-3}, other=5e-3))
    assert tune(problem(dtype="bfloat16"), clock).winner == "a+fp32"


def test_a_run_three_times_slower_than_the_default_ends_there(monkeypatch):
    add(monkeypatch, made_up("a", honest), made_up("b", honest))
    clock = turn(monkeypatch, Clock({"default": 1e-3, "a": 3.1e-3, "b": 2.9e-3}))
    found = reasons(tune(clock=clock))
    assert found["a"] == "more than 3 x slower than default at the first run"
    assert found["b"] is None
    assert clock.timed.count("a") == 1


def test_a_problem_under_autocast_is_tuned_with_its_casts(monkeypatch):
    turn(monkeypatch, Clock())
    q, k, v = qkv(48, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for options in ({}, {"layout": "bshd"}):
            found = fastattn.explain(q, k, v, tune=True, **options)
            assert found.problem.cast_from and {"default", "torch_math", "torch_flash+fp32"} <= {
                t.candidate for t in found.rows if t.time_us is not None
            }


@pytest.mark.parametrize("grad", [False, True])
def test_fault_35_tuning_leaves_torchs_random_numbers_alone(grad, monkeypatch):
    """Tuning leaves torch's random numbers as they were."""
    q, k, v = qkv(48, grad=grad)
    torch.manual_seed(7)
    want = torch.rand(4)
    torch.manual_seed(7)
    fastattn.explain(q, k, v, tune=True)
    fastattn.attention(q, k, v)
    assert torch.equal(torch.rand(4), want)


# --- budget


def test_candidates_not_reached_say_so_and_thorough_reaches_them(monkeypatch):
    names = [f"k{i}" for i in range(12)]
    add(monkeypatch, *(made_up(n, honest) for n in names))
    clock = turn(monkeypatch, Clock({"default": 0.05, "k11": 0.01}, other=0.1))
    verdict = tune(clock=clock)
    late = [n for n in names if verdict.trial(n).outcome is Outcome.NOT_TRIED]
    assert 0 < len(late) < 12 and late == names[-len(late) :] and "k11" in late
    assert verdict.winner == "default"
    assert clock.seconds < 25 * 0.05 * 1.5
    thorough = tune(clock=clock, thorough=True)
    assert all(t.outcome is not Outcome.NOT_TRIED for t in thorough.trials)
    assert thorough.winner == "k11"


def test_a_neighbours_winner_is_tried_first(monkeypatch):
    add(monkeypatch, *(made_up(f"k{i}", honest) for i in range(12)))
    clock = turn(monkeypatch, Clock({"default": 0.05, "k11": 0.01}, other=0.1))
    assert tune(clock=clock, prior=["k11"]).winner == "k11"


@pytest.mark.parametrize("incumbent_s, budget", [(1e-6, 0.5), (0.02, 0.5), (0.05, 1.25), (0.2, 5.0), (10.0, 5.0)])
def test_the_budget_is_twenty_five_times_the_incumbents_time_within_limits(incumbent_s, budget):
    assert _budget(incumbent_s, "cpu") == pytest.approx(budget)


@pytest.mark.parametrize("incumbent_s, budget", [(1e-4, 2.0), (0.1, 2.5), (1.0, 10.0)])
def test_on_cuda_there_is_more_time(incumbent_s, budget):
    assert _budget(incumbent_s, "cuda") == pytest.approx(budget)


def test_an_installed_library_is_tried_before_torchs_own_rows_and_ties_as_before(library, tried, monkeypatch):
    """Trial order is not tie order: the library's row stands last, is tried first, and yields to its equals."""
    own = [f"k{i}" for i in range(12)]
    add(monkeypatch, *(made_up(n, honest) for n in own), made_up("lib", honest, library="fastlib"))
    clock = turn(monkeypatch, Clock({"default": 0.05, "lib": 0.01}, other=0.1))
    verdict = tune(clock=clock)
    assert verdict.winner == "lib" and tried.index("lib") < min(tried.index(n) for n in own if n in tried)
    assert verdict.trial("k11").outcome is Outcome.NOT_TRIED
    equals = turn(monkeypatch, Clock({"default": 4e-3, "lib": FAST, "k3": FAST}))
    assert tune(clock=equals).winner == "k3", "the fixed order decides"
    clock = turn(monkeypatch, Clock({"default": 0.05, "lib": 0.01}, other=0.1))
    assert tune(clock=clock, prior=["k9"]).trial("k9").outcome is not Outcome.NOT_TRIED


def test_the_first_run_of_a_library_is_not_counted(library, monkeypatch):
    """It loads code, or compiles: a library that takes 30 s to start leaves the others their time."""
    started = []

    def slow_start(name):
        def run(q, k, v, mask, a):
            if name not in started:
                started.append(name)
                clock.seconds += 30.0
            return honest(q, k, v, mask, a)

        return run

    add(monkeypatch, *(made_up(name, slow_start(name), library="fastlib") for name in ("a", "b", "c")))
    clock = turn(monkeypatch, Clock({"default": 0.02, "c": 5e-3}, other=0.03))
    verdict = tune(clock=clock)
    assert started == ["a", "b", "c"] and verdict.winner == "c"
    assert all(verdict.trial(name).outcome is not Outcome.NOT_TRIED for name in "abc")
    assert verdict.trial("a").first_call_us > 29e6, "it is told"


def test_what_a_first_run_imports_is_imported_before_anything_is_timed(monkeypatch):
    ticks, done = [0.0], []

    def prepare():
        ticks[0] += 5.0
        done.append(clock.ran[:])

    monkeypatch.setattr(availability.clock, "now", lambda: ticks[0])
    monkeypatch.setattr(availability.clock, "seconds_since", lambda start: ticks[0] - start)
    add(monkeypatch, made_up("late", honest, prepare=prepare))
    clock = turn(monkeypatch, Clock({"default": 4e-3, "late": FAST}))
    before = availability.import_seconds()
    assert tune(clock=clock).winner == "late"
    assert len(done) == 1 and "late" not in done[0] and availability.import_seconds() - before == 5.0

    def broken():
        raise ImportError("no such module")

    add(monkeypatch, made_up("broken", honest, prepare=broken))
    trial = tune(clock=turn(monkeypatch, Clock({"default": 4e-3}))).trial("broken")
    assert trial.outcome is Outcome.REFUSED and trial.reason == "ImportError: no such module"


def test_a_library_that_time_did_not_reach_is_tried_by_the_next_process(library, tried, monkeypatch):
    """And by no later call of this one; what of torch's own was not reached is left to `fastattn tune`."""
    libs = [f"lib{i}" for i in range(9)]
    add(monkeypatch, *(made_up(n, honest, library="fastlib") for n in libs), made_up("own", honest))
    clock = turn(monkeypatch, Clock({"default": 0.05, "lib8": 0.01, "own": 0.1}, other=0.12))
    q, k, v = qkv(64)
    assert served(q, k, v) == "default"
    left = [n for n in libs if n not in tried]
    assert left and "lib8" in left and "own" not in tried
    tried.clear()
    fastattn.attention(q, k, v)
    fastattn.attention(*qkv(64))
    assert not tried, "once in a process"
    for _ in left:
        before, name = list(tried), served(q, k, v)
        assert set(tried[len(before) :]) & {*libs} <= {*left}, "what was tried is not tried again"
        if name == "lib8":
            break
    assert name == "lib8"
    clock.other = 1e-3  # the last one had no time for all of it either
    while tried:
        tried.clear()
        assert served(q, k, v) == "lib8"


def test_what_took_too_much_room_is_not_tried_by_every_process(library, monkeypatch):
    """It ran on the probes, so time did not run out before it."""
    trial = Trial("lib", Outcome.NOT_TRIED, "not tried: it may take", first_call_us=3.0, library="fastlib 1.0")
    base = Verdict(problem(), "default", (Trial("default", time_us=1.0), trial))
    assert not base.is_unfinished
    for changes, want in (
        ({"first_call_us": None}, True),
        ({"first_call_us": None, "library": "torch 2.13.0"}, False),
        ({"first_call_us": None, "outcome": Outcome.NOT_COMPILED}, False),
    ):
        assert base._replace(trials=(base.trials[0], trial._replace(**changes))).is_unfinished is want


def test_where_rounds_of_all_would_take_too_long_slow_ones_leave_before(monkeypatch):
    add(monkeypatch, *(made_up(n, honest) for n in ("a", "b", "c")))
    clock = turn(monkeypatch, Clock({"default": 0.022, "a": 0.027, "b": 0.019, "c": 0.019}, other=0.01))
    found = reasons(tune(clock=clock))
    assert found["a"].startswith("more than 2 x slower than ") and found["b"] is None is found["c"]
    assert found["default"] is None, "what the others must beat is always timed"
    assert clock.timed.count("a") == 1
    thorough = reasons(tune(clock=clock, thorough=True))
    assert thorough["a"] is None, "there is time for all"


def test_what_is_many_times_slower_on_the_probes_does_not_run_at_full_size(monkeypatch):
    add(monkeypatch, *(made_up(n, honest) for n in ("a", "b")))
    clock = turn(monkeypatch, Clock({"default": 0.1, "a": 0.7, "b": 0.5}, other=0.11))
    found = reasons(tune(clock=clock, thorough=True))
    assert found["a"] == "more than 6 x slower than default at the first run" and clock.ran.count("a") == 2
    assert found["b"] == "more than 3 x slower than default at the first run" and clock.ran.count("b") > 1
    clock = turn(monkeypatch, Clock({"default": 0.01, "a": 0.2, "b": 0.01}, other=0.01))
    tune(clock=clock, thorough=True)
    assert clock.ran.count("a") > 1, "a run so short says little"


def test_a_thorough_tuning_of_slow_calls_ends(monkeypatch):
    """Three rounds of two where a run takes seconds, five seconds of rounds where ten would take longer."""
    for cost, rounds in ((4.0, 3), (0.5, 5), (0.3, 8)):
        clock = turn(monkeypatch, Clock({"default": cost, "matmul": cost}, other=20 * cost), MAX_ROUNDS)
        tune(clock=clock, thorough=True)
        assert clock.timed.count("default") == rounds, cost


def test_cli_tuning_tries_again_what_the_budget_left_out(monkeypatch):
    add(monkeypatch, *(made_up(f"k{i}", honest) for i in range(12)))
    turn(monkeypatch, Clock({"default": 0.05, "k11": 0.01}, other=0.1))
    q, k, v = qkv(64)
    fastattn.attention(q, k, v)
    why = fastattn.explain(q, k, v)
    assert row("k11", q, k, v).reason == "not tried: budget" and why.served_by == "default"
    [verdict] = fastattn.tune(why.problem)
    assert verdict.winner == "k11" and fastattn.explain(q, k, v).served_by == "k11"


# --- memory


def test_a_known_allocation_is_measured():
    x = torch.ones(1024)

    def run():
        a = torch.empty(5 * MIB, dtype=torch.int8)
        b = torch.empty(7 * MIB, dtype=torch.int8)
        del a
        c = torch.empty(6 * MIB, dtype=torch.int8)
        out = x * 2
        del b, c
        return out

    out, temporary, saved = memory_use.measure_memory(run, [x])
    assert torch.equal(out, x * 2)
    assert temporary == 13 * MIB and saved == 0  # b and c; the output beside them is left out


def test_saved_bytes_leave_out_inputs_and_output():
    x = torch.ones(MIB, requires_grad=True)
    assert memory_use.measure_memory(lambda: x * x, [x])[2] == 0  # it keeps x, an input
    assert memory_use.measure_memory(lambda: x.exp(), [x])[2] == 0  # it keeps its output
    assert memory_use.measure_memory(lambda: x.exp().exp().sum(), [x])[2] == 2 * 4 * MIB


def greedy(size):
    def run(q, k, v, mask, a):
        room = torch.empty(size, dtype=torch.int8)
        out = honest(q, k, v, mask, a)
        del room
        return out

    return run


class Keeps(torch.autograd.Function):
    """Passes its input on, and keeps `size` bytes until the backward."""

    @staticmethod
    def forward(ctx, x, size):
        ctx.save_for_backward(torch.empty(size, dtype=torch.int8))
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


@pytest.mark.parametrize("mib, wins", [(120, True), (130, False)])
def test_temporary_bytes_beyond_the_limit_are_refused_with_both_numbers(mib, wins, monkeypatch):
    add(monkeypatch, made_up("greedy", greedy(mib * MIB)))
    clock = turn(monkeypatch, Clock({"default": 4e-3, "greedy": FAST}))
    verdict = tune(clock=clock)
    trial = verdict.trial("greedy")
    assert (verdict.winner == "greedy") == wins
    assert trial.temporary_bytes >= mib * MIB
    if not wins:
        assert trial.reason == f"memory: {trial.temporary_bytes} bytes beyond its inputs and output > {128 * MIB}"


@pytest.mark.parametrize("mib, wins", [(120, True), (130, False)])
def test_bytes_saved_for_backward_are_limited_too(mib, wins, monkeypatch):
    add(monkeypatch, made_up("keeps", lambda q, k, v, mask, a: Keeps.apply(honest(q, k, v, mask, a), mib * MIB)))
    clock = turn(monkeypatch, Clock({"default": 4e-3, "keeps": FAST}))
    verdict = tune(problem(needs_grad=True), clock)
    trial = verdict.trial("keeps")
    assert (verdict.winner == "keeps") == wins
    assert trial.saved_bytes >= mib * MIB
    used = max(trial.saved_bytes, trial.temporary_bytes)
    assert trial.reason == (None if wins else f"memory: {used} bytes beyond its inputs and output > {128 * MIB}")


def test_the_limit_is_three_times_q_k_v_and_out():
    large = problem(batch=64, q_len=4096, kv_len=4096)
    assert large.io_bytes == 4 * 64 * 4 * 4096 * 32 * 4
    assert large.memory_limit == 3 * large.io_bytes
    assert problem().memory_limit == 128 * MIB


def test_the_incumbent_is_exempt(monkeypatch):
    replace_default(monkeypatch, greedy(300 * MIB))
    clock = turn(monkeypatch, Clock({"default": FAST}))
    verdict = tune(clock=clock)
    assert verdict.winner == "default" and verdict.trial("default").temporary_bytes >= 300 * MIB


def test_an_unfused_kernel_whose_scores_break_the_rule_is_not_run(monkeypatch):
    """To run it, only to see how much it takes, is what the rule is there to avoid."""
    monkeypatch.setattr(Problem, "memory_limit", property(lambda p: MIB))
    clock = turn(monkeypatch, Clock({"default": FAST}))
    found = reasons(tune(problem(q_len=600, kv_len=600), clock))
    assert found["torch_math"] == f"memory: {3 * 4 * 600 * 600 * 4} temporary bytes > {MIB}"
    assert "torch_math" not in clock.ran


# --- what is tried again


@pytest.fixture
def library(monkeypatch):
    """A made-up library "fastlib": library(version) installs that version, None removes it. Counts its trials."""
    versions = {"fastlib": "1.0"}
    real = importlib.metadata.version

    def version(name):
        if name == "fastlib":
            if versions[name] is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)

    def install(new):
        versions["fastlib"] = new
        availability.forget_libraries()

    install("1.0")
    yield install
    availability.forget_libraries()


@pytest.fixture
def tried(monkeypatch):
    """Names that a tuning looked at, in order."""
    names = []
    screen = Screening.screen

    def counted(self, entrant, *args, **named):
        names.append(entrant.candidate.name)
        return screen(self, entrant, *args, **named)

    monkeypatch.setattr(Screening, "screen", counted)
    return names


def served(q, k, v):
    """What serves after a call in a new process."""
    fastattn.clear()
    fastattn.attention(q, k, v)
    return fastattn.explain(q, k, v).served_by


def test_nothing_changed_nothing_is_tried(library, tried, monkeypatch):
    add(monkeypatch, made_up("lib", honest, library="fastlib"))
    turn(monkeypatch, Clock({"default": 4e-3, "lib": FAST}))
    q, k, v = qkv(64)
    assert served(q, k, v) == "lib" and tried
    tried.clear()
    assert served(q, k, v) == "lib" and not tried


def test_a_new_version_of_a_library_is_tried_against_the_winner_alone(library, tried, monkeypatch):
    add(monkeypatch, made_up("lib", honest, library="fastlib"), made_up("other", honest))
    clock = turn(monkeypatch, Clock({"default": 4e-3, "other": 2e-3, "lib": 3e-3}))
    q, k, v = qkv(64)
    assert served(q, k, v) == "other"
    tried.clear()
    library("2.0")
    clock.costs["lib"] = FAST
    assert served(q, k, v) == "lib"
    assert sorted(tried) == ["default", "lib", "other"]
    assert row("lib", q, k, v).library == "fastlib 2.0"
    assert row("torch_math", q, k, v).reason or row("torch_math", q, k, v).time_us  # what was known is kept
    tried.clear()
    assert served(q, k, v) == "lib" and not tried


def test_a_library_that_appears_is_tried_against_the_winner_alone(library, tried, monkeypatch):
    library(None)
    add(monkeypatch, made_up("lib", honest, library="fastlib"))
    turn(monkeypatch, Clock({"default": 4e-3, "lib": FAST}))
    q, k, v = qkv(64)
    assert served(q, k, v) == "default"
    tried.clear()
    library("1.0")
    assert served(q, k, v) == "lib" and sorted(tried) == ["default", "lib"]


def test_a_winner_that_vanished_leaves_the_runner_up(library, tried, monkeypatch):
    add(monkeypatch, made_up("lib", honest, library="fastlib"), made_up("other", honest))
    turn(monkeypatch, Clock({"default": 4e-3, "other": 2e-3, "lib": FAST}))
    q, k, v = qkv(64)
    assert served(q, k, v) == "lib"
    library(None)
    assert served(q, k, v) == "other"
    assert row("lib", q, k, v).reason == "package fastlib is not installed"


def test_a_loser_that_vanished_changes_nothing(library, tried, monkeypatch):
    add(monkeypatch, made_up("lib", honest, library="fastlib"), made_up("other", honest))
    turn(monkeypatch, Clock({"default": 4e-3, "other": FAST, "lib": 2e-3}))
    q, k, v = qkv(64)
    assert served(q, k, v) == "other"
    tried.clear()
    library(None)
    assert served(q, k, v) == "other" and not tried


def test_a_winner_beyond_its_limits_here_leaves_the_verdict_to_its_bucket(monkeypatch):
    """The verdict is of a bucket; a length where the winner refuses is served by something right, not tuned anew."""
    add(monkeypatch, made_up("short", honest, needs=(Range("extent", max=47_000),)))
    turn(monkeypatch, Clock({"default": SLOW, "short": FAST}))
    q, k, v = qkv(1, 300)
    fastattn.attention(q, k, v)
    assert fastattn.explain(q, k, v).served_by == "short"
    q, k, v = qkv(1, 368)
    check(q, k, v)
    assert fastattn.explain(q, k, v).served_by != "short"
