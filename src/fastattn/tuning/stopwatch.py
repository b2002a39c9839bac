"""Timing on a machine that is not ours alone: interleaved rounds, medians, and the spread that says what they are worth.

The stopwatch is an argument everywhere, so tests turn a fake clock.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Protocol

import torch

from fastattn.environment import clock

SAMPLE_S = 200e-6  # a sample repeats a short call until it is about this long
MIN_ROUNDS, MAX_ROUNDS = 3, 25
KEEP_WITHIN = 1.5  # times the fastest so far: what is slower leaves the rounds
SHORTEST_S = 1e-8  # no attention takes so little: a clock that says so stands
PAUSE_S = 1.0  # a sample this long, in which hardly any CPU time was used, was none
JUMP = 1000.0  # times what the call took before: no noise goes so far
CPU_SLACK_S = 0.05  # ticks of a system's CPU time
LONG_S = 2.0  # rounds that took this long together, and twice what was allowed, end the comparison


class Stopwatch(Protocol):
    """Seconds that `repeats` runs of `call` take together, and the time now."""

    def time(self, call: Callable[[], object], repeats: int) -> float: ...

    def now(self) -> float: ...


class ClockError(RuntimeError):
    """The clock stands, went back or jumped: what it measured says nothing."""


class HostClock:
    """perf_counter around the calls: what a CPU user waits for. The process's CPU time tells where that clock cannot be."""

    def __init__(self) -> None:
        self._took = self._used = 0.0

    def time(self, call: Callable[[], object], repeats: int) -> float:
        used = clock.cpu_seconds()
        start = clock.now()
        for _ in range(repeats):
            call()
        took = clock.now() - start
        return self.believed(took, clock.cpu_seconds() - used)

    def believed(self, took: float, used: float) -> float:
        """The seconds that a sample took. used: CPU time in it.

        Raises ClockError where less time passed than the process's threads worked, or much in which they did not work.
        """
        if took > PAUSE_S and used < 0.01 * took:
            raise ClockError(f"the clock jumped by {took:.3g} s, or the process was stopped meanwhile")
        self._took, self._used = self._took + took, self._used + used
        if self._used > self._took * (os.cpu_count() or 1) + CPU_SLACK_S:
            raise ClockError(
                f"the clock stands, or is slow: {self._took:.3g} s passed in {self._used:.3g} s of CPU time"
            )
        return took

    def now(self) -> float:
        return clock.now()


class Watched:
    """Another stopwatch, watched: it raises ClockError where that one stands, goes back or jumps."""

    def __init__(self, watched: Stopwatch) -> None:
        self._watched, self._last = watched, -float("inf")
        self._fastest: dict[Callable[[], object], float] = {}

    def time(self, call: Callable[[], object], repeats: int) -> float:
        took = self._watched.time(call, repeats)
        fastest = self._fastest.setdefault(call, took / repeats)
        if took < 0:
            raise ClockError(f"the clock went back by {-took:.3g} s")
        if not SHORTEST_S <= took / repeats < float("inf"):
            raise ClockError(f"the clock stands: {repeats} runs took {took:.3g} s")
        if took > PAUSE_S and took / repeats > JUMP * fastest:
            raise ClockError(f"the clock jumped by {took:.3g} s, or the process was stopped meanwhile")
        self._fastest[call] = min(fastest, took / repeats)
        return took

    def now(self) -> float:
        now = self._watched.now()
        if now < self._last:
            raise ClockError(f"the clock went back by {self._last - now:.3g} s")
        self._last = now
        return now


class CudaClock:
    """CUDA events around the calls, with the second-level cache flushed before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flush = torch.empty(256 * 2**20, dtype=torch.int8, device=device)

    def time(self, call: Callable[[], object], repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    def now(self) -> float:
        torch.cuda.synchronize(self._device)
        return clock.now()


def stopwatch(device: torch.device) -> Stopwatch:
    """The stopwatch for a device."""
    return CudaClock(device) if device.type == "cuda" else HostClock()


@dataclass(slots=True)
class Timing:
    """Samples of one call, in seconds a run."""

    samples: list[float] = field(default_factory=list)
    charge: float = 0.0  # seconds that a run costs beyond what is timed here

    @property
    def median(self) -> float:
        """What a run costs: that of the samples, and the charge."""
        return median(self.samples) + self.charge

    @property
    def noise(self) -> float:
        """Median absolute deviation over the median."""
        middle = median(self.samples)
        return median(abs(s - middle) for s in self.samples) / self.median if self.median else 0.0

    @property
    def spread(self) -> float:
        """Half the width of the middle half of the samples, over the median: where every other one is hit, noise may be 0."""
        if len(self.samples) < 8 or not self.median:
            return self.noise
        lower, _, upper = quantiles(self.samples, method="inclusive")
        return max(self.noise, (upper - lower) / 2 / self.median)

    @property
    def drift(self) -> float:
        """By how much the last third of the samples lies apart from the first; 0 where they overlap or are too few."""
        third = len(self.samples) // 3
        if third < 4:  # noise alone would set few of them apart
            return 0.0
        first, last = self.samples[:third], self.samples[-third:]
        lower, upper = (first, last) if median(first) < median(last) else (last, first)
        return max(0.0, min(upper) / max(lower) - 1.0) if max(lower) else 0.0


def time_interleaved(
    calls: Mapping[str, Callable[[], object]],
    clock: Stopwatch,
    seconds: float,
    charges: Mapping[str, float] | None = None,
) -> dict[str, Timing]:
    """Time all calls in interleaved rounds for about `seconds`; hopeless ones leave after the first rounds.

    charges: seconds that a run of a call costs beyond what is timed here.

    Every round runs each call once, in alternating order, so that a slow moment of the machine hits all of them.
    """
    start = clock.now()
    found: dict[str, Timing] = {name: Timing(charge=(charges or {}).get(name, 0.0)) for name in calls}
    repeats = dict.fromkeys(calls, 1)
    alive = list(calls)
    for index in range(MAX_ROUNDS):
        for name in alive if index % 2 == 0 else reversed(alive):
            took = clock.time(calls[name], repeats[name]) / repeats[name]
            if index == 0 and took < SAMPLE_S:
                repeats[name] = min(100, max(1, round(SAMPLE_S / max(took, 1e-7))))
                took = clock.time(calls[name], repeats[name]) / repeats[name]
            found[name].samples.append(took)
        if index >= 1:
            least = {name: min(found[name].samples) + found[name].charge for name in alive}
            alive = [name for name in alive if least[name] <= KEEP_WITHIN * min(least.values())]
        elapsed = clock.now() - start
        if index + 1 >= MIN_ROUNDS and elapsed + elapsed / (index + 1) > seconds:
            break
        if elapsed > max(2 * seconds, LONG_S):  # of calls this slow a single round may be all there is time for
            break
    return found
