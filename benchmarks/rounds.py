"""Interleaved rounds: what both benchmarks stand on.

Every round runs every call once, in alternating order, so that a slow moment of the machine hits all of them; ratios are
taken between medians of the same rounds, and a call that is there twice says what a ratio is worth (the A/A spread).
This is deliberately not fastattn's own stopwatch, whose judgement is on trial here.
"""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Callable, Collection, Mapping
from statistics import median

import torch

Calls = Mapping[str, Callable[[], object]]
Samples = dict[str, list[float]]  # name -> seconds a run, one per round


def interleave(
    calls: Calls,
    *,
    rounds: int,
    seconds: float,
    sample_s: float = 1e-3,
    stay: Collection[str] | None = None,
    leave_beyond: float = 2.0,
    min_rounds: int = 5,
) -> Samples:
    """Time all calls for `rounds` rounds, or fewer when `seconds` are over, but at least `min_rounds`.

    A sample repeats a short call until it takes about `sample_s`. After three rounds calls outside `stay` (None: all stay)
    that are `leave_beyond` times slower than the fastest one leave.
    """
    repeats = {name: _repeats(call, sample_s) for name, call in calls.items()}
    found: Samples = {name: [] for name in calls}
    alive = list(calls)
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    try:
        for index in range(rounds):
            for name in alive if index % 2 == 0 else reversed(alive):
                found[name].append(_time(calls[name], repeats[name]))
            if index == 2 and stay is not None:
                best = min(median(samples) for samples in found.values())
                alive = [n for n in alive if n in stay or median(found[n]) <= leave_beyond * best]
            if index + 1 >= min_rounds and time.perf_counter() - start > seconds:
                break
    finally:
        if was_on:
            gc.enable()
    return found


def spread(samples: Samples, one: str, other: str) -> float:
    """How far apart the medians of two names of the same call are, as a part of the first."""
    return abs(median(samples[other]) / median(samples[one]) - 1)


def _repeats(call: Callable[[], object], sample_s: float) -> int:
    call()  # its first run is no measure
    took = _time(call, 1)
    if took < sample_s / 10:
        took = _time(call, 10)
    return max(1, round(sample_s / max(took, 1e-9)))


def _time(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def environment() -> dict[str, str]:
    """What the numbers were taken on, and with."""
    import fastattn
    from fastattn.device import Device

    device = Device.of(torch.device("cpu"))
    return {
        "machine": device.name,
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fastattn": fastattn.__version__,
        "system": platform.platform(),
        "load before": " ".join(f"{x:.2f}" for x in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown",
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }
