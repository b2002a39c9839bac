"""Timing on a machine that is not ours alone: interleaved rounds, medians, and the spread that says what they are worth.

The stopwatch is an argument everywhere, so tests turn a fake clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

import torch

SAMPLE_S = 200e-6  # a sample repeats a short call until it is about this long
MIN_ROUNDS, MAX_ROUNDS = 3, 25
LONG_S = 2.0  # rounds that took this long together, and twice what was allowed, end the comparison


class Stopwatch(Protocol):
    """Seconds that `repeats` runs of `call` take together, and the time now."""

    def time(self, call: Callable[[], object], repeats: int) -> float: ...

    def now(self) -> float: ...


class HostClock:
    """perf_counter around the calls: what a CPU user waits for."""

    def time(self, call: Callable[[], object], repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return time.perf_counter() - start

    def now(self) -> float:
        return time.perf_counter()


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
        return time.perf_counter()


def stopwatch(device: torch.device) -> Stopwatch:
    """The stopwatch for a device."""
    return CudaClock(device) if device.type == "cuda" else HostClock()


@dataclass(slots=True)
class Timing:
    """Samples of one call, in seconds a run."""

    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.samples)

    @property
    def noise(self) -> float:
        """Median absolute deviation over the median."""
        middle = self.median
        return median(abs(s - middle) for s in self.samples) / middle if middle else 0.0

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
    calls: Mapping[str, Callable[[], object]], clock: Stopwatch, seconds: float, keep_within: float = 1.5
) -> dict[str, Timing]:
    """Time all calls in interleaved rounds for about `seconds`; hopeless ones leave after the first rounds.

    Every round runs each call once, in alternating order, so that a slow moment of the machine hits all of them.
    """
    start = clock.now()
    found: dict[str, Timing] = {name: Timing() for name in calls}
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
            best = min(min(found[name].samples) for name in alive)
            alive = [n for n in alive if min(found[n].samples) <= keep_within * best]
        elapsed = clock.now() - start
        if index + 1 >= MIN_ROUNDS and elapsed + elapsed / (index + 1) > seconds:
            break
        if elapsed > max(2 * seconds, LONG_S):  # of calls this slow a single round may be all there is time for
            break
    return found
