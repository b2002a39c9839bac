"""A verdict that was timed while other programs used the cores says so, and `fastattn tune` measures it again."""

from __future__ import annotations

import children
import pytest
from fakes import Clock, problem, turn

import fastattn
from fastattn.environment.settings import current_settings
from fastattn.tuning import cpu_contention
from fastattn.tuning.cpu_contention import CpuContention, CpuUsage
from fastattn.tuning.tune import _said


def crowd(others, own, *, threads=2, cores=2, seconds=1.0):
    """The cores missing after `seconds` in which others and this process used so many cores."""
    readings = iter(
        [CpuUsage(100.0, 10.0, 5.0), CpuUsage(100.0 + (others + own) * seconds, 10.0 + own * seconds, 5.0 + seconds)]
    )
    return CpuContention(threads, cores, lambda: next(readings)).cores_missing()


@pytest.mark.parametrize(
    "others, own, threads, cores, missing",
    [
        (0.0, 2.0, 2, 2, 0.0), (1.0, 1.0, 2, 2, 1.0), (0.3, 1.7, 2, 2, 0.3), (1.0, 1.0, 1, 2, 0.0), (10.0, 2.0, 2, 64, 0.0),
        (64.0, 1.0, 4, 64, 4.0), (0.0, 0.5, 2, 2, 0.0),
    ],
)  # fmt: skip
def test_cores_are_missing_where_others_leave_too_few(others, own, threads, cores, missing):
    assert crowd(others, own, threads=threads, cores=cores) == pytest.approx(missing)


def test_where_nothing_can_be_told_nothing_is_missing():
    assert crowd(2.0, 1.0, seconds=0.01) == 0.0  # shorter than the system's clock ticks
    assert CpuContention(2, 2, lambda: None).cores_missing() == 0.0


def test_the_reading_of_this_system_moves_on(monkeypatch):
    monkeypatch.undo()
    first = cpu_contention.read_cpu_usage()
    if first is None:
        pytest.skip("no /proc/stat here")
    sum(range(3_000_000))
    second = cpu_contention.read_cpu_usage()
    assert second.now > first.now and second.own > first.own and second.everyone >= first.everyone


def test_a_child_of_this_process_is_no_other_program(monkeypatch):
    """A library is imported in a child first: the tuning that asks for it must not pass for one in a crowd."""
    monkeypatch.undo()
    first = cpu_contention.read_cpu_usage()
    if first is None:
        pytest.skip("no /proc/stat here")
    took = children.run("import os\nwhile sum(os.times()[:2]) < 0.5: pass\nprint(os.times()[0])", fresh=True)
    second = cpu_contention.read_cpu_usage()
    assert second.own - first.own >= 0.4, took


def test_a_crowded_verdict_is_marked_said_and_measured_again(monkeypatch, caplog):
    p = problem(q_len=32, kv_len=32)
    cores = [1.5]
    _said.clear()
    turn(monkeypatch, Clock())  # who uses the cores is all that makes it crowded
    monkeypatch.setattr(CpuContention, "cores_missing", lambda self: cores[0])
    [verdict] = fastattn.tune(p)
    assert verdict.is_crowded and verdict.cores_missing == 1.5
    assert "other programs used 1.5 of the cores" in caplog.text and caplog.records[-1].levelname == "WARNING"
    cores[0] = 0.0
    fastattn.clear()
    [again] = fastattn.tune(p)
    assert not again.is_crowded
    [third] = fastattn.tune(p)
    assert third is again  # measured in peace: no more reason to
    assert current_settings().mode == "auto"
