"""Fault 94 of reference/faults2.md: what was timed while others used the cores crowns nobody, and is timed again."""

from __future__ import annotations

import random

import pytest
from fakes import FAST, Clock, add, check, honest, made_up, problem, qkv, row, turn

import fastattn
from fastattn.environment.device import Device
from fastattn.environment.settings import current_settings
from fastattn.kernels import registry
from fastattn.tuning.cpu_contention import CpuContention, CpuUsage
from fastattn.tuning.stopwatch import MAX_ROUNDS
from fastattn.tuning.tune import STEADY_TRIES, tune_problem
from fastattn.verdicts import verdict as verdict_module
from fastattn.verdicts.manifest import export_manifest
from fastattn.verdicts.verdict import Outcome, Trial, Verdict

CORES = [0.0]  # that other programs take
DRAWN = random.Random(3)
NOISES = {  # what everything costs, times its usual
    "every other run waits": lambda name, now, seen=[0]: (seen.append(0), 40.0 if len(seen) % 2 else 1.0)[1],  # noqa: B006
    "the winner alone is hit": lambda name, now: DRAWN.choice((1.0, 1.9, 3.0, 0.4)) if name == "quick" else 1.0,
    "the default alone is hit": lambda name, now: DRAWN.choice((1.0, 2.4, 5.0, 9.0)) if name == "default" else 1.0,
}


@pytest.fixture
def quick(monkeypatch):
    """A kernel that wins wherever it is timed in peace; the clock that says so; CORES are missing meanwhile."""
    CORES[:] = [0.0]
    add(monkeypatch, made_up("quick", honest))
    monkeypatch.setattr(CpuContention, "cores_missing", lambda self: CORES[0])
    return turn(monkeypatch, Clock({"default": 4e-3, "quick": FAST}), MAX_ROUNDS)


def stored(own_store):
    return list(own_store.rglob("v*/*/*.json"))


@pytest.mark.parametrize("cores", [0.3, 1.0, 64.0])
def test_fault_94_a_crowded_verdict_serves_the_default_until_a_quiet_process_times_it(cores, quick, own_store, caplog):
    """What was timed while other programs used the cores crowns nobody: the default serves, the next process tunes again."""
    CORES[0] = cores
    q, k, v = qkv(48)
    tunings = fastattn.stats()["tunings"]
    with caplog.at_level("INFO", "fastattn"):
        check(q, k, v)
        check(q, k, v)
    found = fastattn.explain(q, k, v)
    assert (found.action, found.served_by) == ("serve", "default")
    assert f"other programs used {cores:.1f} of the cores" in found.why and "quiet" in found.why
    assert found.verdict.is_crowded and not found.verdict.is_lasting and row("quick", q, k, v).time_us
    assert not stored(own_store) and "for this process only" in caplog.text
    assert fastattn.stats()["tunings"] == tunings + 1, "this process does not try again"
    fastattn.clear()  # the next process
    check(q, k, v)
    assert not stored(own_store), "as crowded as the first"
    fastattn.clear()
    CORES[0] = 0.0
    check(q, k, v)
    assert fastattn.explain(q, k, v).served_by == "quick" and len(stored(own_store)) == 1


@pytest.mark.parametrize("noise", NOISES)
def test_fault_94_a_short_window_is_judged_by_its_own_spread(noise, quick, own_store):
    """The system counts cores in ticks of 10 ms: nothing is missing in what is shorter, but the times lie far apart."""
    quick.jitter, quick.costs["default"] = NOISES[noise], 1.2e-3
    q, k, v = qkv(48)
    check(q, k, v)
    found = fastattn.explain(q, k, v)
    assert found.verdict.cores_missing == 0 and found.verdict.is_crowded
    assert found.served_by == "default" and not stored(own_store)
    quick.jitter = lambda name, now: 1.0
    fastattn.clear()
    check(q, k, v)
    assert fastattn.explain(q, k, v).served_by == "quick" and len(stored(own_store)) == 1


def test_fault_94_two_samples_are_no_spread(quick, own_store):
    """A default that is out of the comparison after two rounds may have had one slow first run."""
    runs = []

    def jitter(name, now):
        runs.append(name)
        return 3.0 if name == "default" and runs.count("default") == 5 else 1.0

    quick.jitter = jitter
    [verdict] = fastattn.tune(problem())
    assert verdict.trial("default").noise is None and not verdict.is_crowded and len(stored(own_store)) == 1


def test_fault_94_where_the_timing_is_too_short_the_whole_tuning_tells():
    ticks = [CpuUsage(0.0, 0.0, 0.0), CpuUsage(1.0, 0.5, 0.5), CpuUsage(1.04, 0.52, 0.52)]
    readings = iter(ticks)
    whole = CpuContention(2, 2, lambda: next(readings))
    assert whole.anew().cores_missing() == pytest.approx(1.0)
    readings = iter([CpuUsage(0.0, 0.0, 0.0), CpuUsage(1.0, 0.5, 0.5), CpuUsage(1.2, 0.7, 0.7)])
    whole = CpuContention(2, 2, lambda: next(readings))
    assert whole.anew().cores_missing() == 0.0, "the timing itself was long enough, and quiet"


def test_fault_94_ahead_of_time_tuning_waits_for_a_quiet_machine(quick, own_store, monkeypatch):
    left = [1.0, 1.0, 0.0]
    monkeypatch.setattr(CpuContention, "cores_missing", lambda self: left.pop(0))
    [verdict] = fastattn.tune(problem())
    assert verdict.winner == "quick" and not left and len(stored(own_store)) == 1
    left[:] = [1.0] * STEADY_TRIES
    [verdict] = fastattn.tune(problem(), force=True)
    assert verdict.winner == "default" and not left, "not for ever"
    assert "other programs used 1.0 of the cores" in verdict.why_not_lasting


def crowded(p, **fields):
    trials = (Trial("default", time_us=9.0, noise=0.01), Trial("quick", time_us=3.0, **{"noise": 0.01, **fields}))
    return Verdict(p, "quick", trials, cores_missing=0.0 if fields else 1.2, made_by=fastattn.__version__)


@pytest.mark.parametrize("fields", [{}, {"noise": 0.97}])
def test_fault_94_a_file_that_an_older_process_wrote_in_a_crowd_is_tuned_again(fields, quick, own_store):
    from fastattn.dispatch.session import session

    q, k, v = qkv(48)
    p, settings = fastattn.explain(q, k, v).problem, current_settings()
    device = Device.of(q.device)
    session.store(settings).put(crowded(p, **fields), device)
    fastattn.clear()
    with fastattn.options.scope(mode="cached"):
        assert fastattn.explain(q, k, v).served_by == "quick", "nothing may be tuned: it is all there is"
    fastattn.clear()
    tunings = fastattn.stats()["tunings"]
    check(q, k, v)
    found = fastattn.explain(q, k, v)
    assert fastattn.stats()["tunings"] == tunings + 1 and found.verdict.is_lasting
    assert found.verdict.trial("default").time_us == pytest.approx(4000), "and none of its times is kept"
    fastattn.clear()
    check(q, k, v)
    assert fastattn.stats()["tunings"] == tunings + 1


def test_fault_94_a_manifest_made_in_a_crowd_serves_where_nothing_may_be_tuned(quick, tmp_path, monkeypatch):
    q, k, v = qkv(48)
    p = fastattn.explain(q, k, v).problem
    file = tmp_path / "manifest.json"
    file.write_text(export_manifest([crowded(p)], Device.of(q.device)), encoding="utf-8")
    monkeypatch.setenv("FASTATTN_MANIFEST", str(file))
    from fastattn.environment.settings import reload_settings

    reload_settings()
    with fastattn.options.scope(mode="cached"):
        assert fastattn.explain(q, k, v).served_by == "quick"
    assert fastattn.explain(q, k, v).action == "tune"


def test_fault_94_a_default_that_is_wrong_does_not_serve_because_of_a_crowd(quick, monkeypatch):
    """There is no other measure than this one: the best of those that passed serves, for this process only."""
    from fakes import replace_default

    replace_default(monkeypatch, lambda q, k, v, mask, a: 1.01 * honest(q, k, v, mask, a))
    CORES[0] = 1.0
    verdict = tune_problem(problem(), current_settings(), clock=quick)
    assert verdict.trial("default").outcome is Outcome.INACCURATE
    assert verdict.winner == "quick" and not verdict.is_lasting


def test_fault_94_a_quiet_machine_is_told_from_a_crowded_one():
    quiet = crowded(problem(), noise=0.2)
    assert quiet.is_lasting and quiet.why_not_lasting is None
    assert verdict_module.NOISY == 0.25 and registry.is_known("default")
