"""Fault 81 of reference/faults2.md: clocks that stand, go back or jump, and tools that freeze the time of a test."""

from __future__ import annotations

import itertools
import os
import sys
import time

import children
import pytest
import torch
from fakes import FAST, Clock, add, honest, made_up, problem, qkv, row, turn

import fastattn
from fastattn.cli import main
from fastattn.environment import clock as own_clock
from fastattn.environment.settings import current_settings
from fastattn.tuning.stopwatch import MAX_ROUNDS, ClockError, HostClock
from fastattn.tuning.tune import tune_problem
from fastattn.verdicts.verdict import Outcome

F_sdpa = torch.nn.functional.scaled_dot_product_attention


class Standing(Clock):
    """It does not move."""

    def spend(self, name):
        self.ran.append(name)


class Backwards(Clock):
    """It is set back by an hour once a tenth of a second has passed."""

    def spend(self, name):
        super().spend(name)
        if self.seconds > 0.1:
            self.seconds -= 3600


class Jumping(Clock):
    """It is set forward by an hour in the midst of the comparison."""

    def spend(self, name):
        super().spend(name)
        if len(self.timed) == 30:
            self.seconds += 3600


class Undefined(Clock):
    def time(self, call, repeats):
        super().time(call, repeats)
        return float("nan")


BROKEN = {kind.__name__: kind for kind in (Standing, Backwards, Jumping, Undefined)}


@pytest.mark.parametrize("kind", BROKEN)
def test_fault_81_a_clock_that_stands_or_jumps_crowns_nobody(kind, monkeypatch, own_store, caplog):
    """Where the clock stands, goes back or jumps the tuning ends: the default serves this process, and nothing is stored."""
    add(monkeypatch, made_up("quick", honest))
    turn(monkeypatch, BROKEN[kind]({"default": 4e-3, "quick": FAST}), MAX_ROUNDS)
    q, k, v = qkv(48)
    before = fastattn.stats()["tunings"]
    with caplog.at_level("INFO", "fastattn"):
        assert torch.equal(fastattn.attention(q, k, v), F_sdpa(q, k, v))
    found = fastattn.explain(q, k, v)
    assert found.served_by == "default" and "clock" in found.why
    assert row("quick", q, k, v).outcome is Outcome.NO_CLOCK and row("quick", q, k, v).time_us is None
    assert not list(own_store.rglob("*.json"))
    assert "for this process only" in caplog.text and "clock" in caplog.text
    assert 0 <= fastattn.stats()["tuning_s"] < 60, "the process's tuning budget is not spent by a jump"
    fastattn.attention(q, k, v)
    assert fastattn.stats()["tunings"] == before + 1, "it does not try again at every call"


@pytest.mark.parametrize("kind", BROKEN)
def test_fault_81_a_process_with_a_clock_that_goes_tunes_it_again(kind, monkeypatch, own_store):
    add(monkeypatch, made_up("quick", honest))
    turn(monkeypatch, BROKEN[kind]({"default": 4e-3, "quick": FAST}), MAX_ROUNDS)
    [verdict] = fastattn.tune(problem())
    assert not verdict.is_lasting and verdict.winner == "default"
    turn(monkeypatch, Clock({"default": 4e-3, "quick": FAST}))
    [again] = fastattn.tune(problem())
    assert again.winner == "quick" and len(list(own_store.rglob("*.json"))) == 1


def test_fault_81_the_command_line_says_that_nothing_was_stored_and_why(monkeypatch, capsys):
    turn(monkeypatch, Standing())
    main.main(["tune", "1x4x64x32"], standalone_mode=False)
    assert "no verdict was stored: not timed: the clock" in capsys.readouterr().err


# --- tools that patch the module time


FAKES = {
    "frozen": lambda: lambda: 1_700_000_000.0,
    "jumping": lambda: lambda it=itertools.count(0, 3600): float(next(it)),
    "backwards": lambda: lambda it=itertools.count(0, -1): float(next(it)),
}


def freeze(monkeypatch, fake):
    """What freezegun does: every function of time is replaced, in `time` and in all modules that hold it by any name."""
    names = ("time", "monotonic", "perf_counter", "process_time", "thread_time")
    real = {id(getattr(time, name)): name for name in names}
    for module in [m for name, m in sys.modules.items() if name.split(".")[0] in ("fastattn", "time")]:
        for name, value in list(vars(module).items()):
            if id(value) in real:
                monkeypatch.setattr(module, name, fake)


@pytest.mark.parametrize("kind", FAKES)
def test_fault_81_a_test_that_freezes_time_does_not_freeze_ours(kind, monkeypatch, own_store):
    with monkeypatch.context() as frozen:
        freeze(frozen, FAKES[kind]())
        first, second = own_clock.now(), own_clock.now()
        assert time.perf_counter is not own_clock.now
        assert 0 < HostClock().time(lambda: sum(range(1000)), 3) < 60
        fastattn.attention(*qkv(48))
        tuning_s = fastattn.stats()["tuning_s"]
    assert 0 <= second - first < 60 and 0 < tuning_s < 600
    assert not [t for t in fastattn.explain(*qkv(48)).rows if t.outcome is Outcome.NO_CLOCK]


SCRIPT = """
import itertools, time
readings = itertools.count({start}, {step})
time.perf_counter = lambda: float(next(readings))
import torch, fastattn
x = torch.randn(1, 2, 32, 16)
out = fastattn.attention(x, x, x)
assert torch.equal(out, torch.nn.functional.scaled_dot_product_attention(x, x, x))
found = fastattn.explain(x, x, x)
assert found.served_by == "default" and all(t.time_us is None for t in found.rows), found
assert 0 <= fastattn.stats()["tuning_s"] < 60, fastattn.stats()
print(found.why)
"""


@pytest.mark.parametrize(("start", "step"), [
    (7, 0), (0, 1e-12), *(pytest.param(0, step, marks=pytest.mark.long) for step in (3600, -1)),
])  # fmt: skip
def test_fault_81_a_clock_that_was_replaced_before_fastattn_came(start, step, own_store):
    path = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if not p.endswith("nothing_wins")]
    env = {"PYTHONPATH": os.pathsep.join(path)}  # by the real stopwatch
    done = children.run(SCRIPT.format(start=start, step=step), env=env)
    assert done.returncode == 0 and "clock" in done.stdout, done.stdout + done.stderr
    assert not list(own_store.rglob("*.json"))


# --- what the watch sees


def test_fault_81_the_processs_own_time_tells_a_jump_from_a_slow_call():
    assert HostClock().believed(90.0, used=88.0) == 90.0
    assert HostClock().believed(0.02, used=0.0) == 0.02, "the system's ticks are long"
    with pytest.raises(ClockError, match="jumped"):
        HostClock().believed(3600.0, used=0.01)
    with pytest.raises(ClockError, match="stands, or is slow"):
        HostClock().believed(1e-6, used=5.0)
    slow = HostClock()
    with pytest.raises(ClockError, match="stands, or is slow"):
        [slow.believed(1e-6, used=0.01) for _ in range(1000)]


def test_fault_81_a_verdict_made_by_a_sound_clock_knows_nothing_of_it():
    clock = Clock({"default": 4e-3}, jitter=lambda name, now: 20.0 if 0.2 < now < 0.22 else 1.0)
    verdict = tune_problem(problem(), current_settings(), clock=clock)
    assert Outcome.NO_CLOCK not in {t.outcome for t in verdict.trials}
