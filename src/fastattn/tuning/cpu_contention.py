"""Whether other programs took the cores that a timing needed: interleaved rounds and medians do not show that they did."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from fastattn.environment import clock


class CpuUsage(NamedTuple):
    """Seconds of CPU time since some moment, by all programs and by this one and its children, and the time then."""

    everyone: float
    own: float
    now: float


def read_cpu_usage() -> CpuUsage | None:
    """Read now; None where the system does not tell (anything but Linux)."""
    try:
        with open("/proc/stat", encoding="ascii") as lines:
            ticks = [int(n) for n in lines.readline().split()[1:9]]
        ticks_a_second = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return None
    if len(ticks) < 8:
        return None
    user, nice, kernel, _idle, _waiting, interrupts, soft, stolen = ticks  # stolen: the machine's other guests
    everyone = (user + nice + kernel + interrupts + soft + stolen) / ticks_a_second
    own = os.times()
    # a child that tried to import a library is no other program
    return CpuUsage(everyone, sum(own[:4]), clock.now())


TICKS_S = 0.05  # the system counts CPU time in ticks of 10 ms: what is shorter says nothing


class CpuContention:
    """How crowded the machine was since this was made; where that is too short a time, since `longer` was made."""

    def __init__(
        self,
        threads: int,
        cores: int | None = None,
        read: Callable[[], CpuUsage | None] | None = None,
        longer: CpuContention | None = None,
    ) -> None:
        self._threads, self._cores = threads, cores or os.cpu_count() or 1
        self._read = read or read_cpu_usage
        self._start, self._longer = self._read(), longer

    def anew(self) -> CpuContention:
        """The same from now on; this one is its `longer`."""
        return CpuContention(self._threads, self._cores, self._read, self)

    def cores_missing(self) -> float:
        """Cores that `threads` busy threads were missing on average, as others used them; 0 where that cannot be told."""
        start, end = self._start, self._read()
        if start is not None and end is not None and end.now - start.now < TICKS_S and self._longer is not None:
            start = self._longer._start
        if start is None or end is None or end.now - start.now < TICKS_S:
            return 0.0
        others = (end.everyone - start.everyone - (end.own - start.own)) / (end.now - start.now)
        return max(0.0, min(self._threads, self._threads + max(0.0, others) - self._cores))
