"""Interleaved rounds, and peak memory: what all benchmarks stand on.

Every round runs every call once, in an order of its own, so that a slow moment of the machine hits all of them and nobody
always follows the same neighbour; ratios are taken between medians of the same rounds, and a call that is there twice
says what a ratio is worth (the A/A spread).
This is deliberately not fastattn's own stopwatch, whose judgement is on trial here.
"""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager
from statistics import median

import torch
from torch.utils._pytree import tree_leaves

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
    """Time all calls for `rounds` rounds, or fewer when `seconds` are over, but at least `min_rounds` (3 of very long ones).

    A sample repeats a short call until it takes about `sample_s`. After three rounds calls outside `stay` (None: all stay)
    that are `leave_beyond` times slower than the fastest one leave.
    """
    repeats = {name: _repeats(call, sample_s) for name, call in calls.items()}
    found: Samples = {name: [] for name in calls}
    alive = list(calls)
    order = random.Random(0)
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    try:
        for index in range(rounds):
            order.shuffle(alive)
            for name in alive:
                found[name].append(_time(calls[name], repeats[name]))
            if index == 2 and stay is not None:
                best = min(median(samples) for samples in found.values())
                alive = [n for n in alive if n in stay or median(found[n]) <= leave_beyond * best]
            took = time.perf_counter() - start
            if took > seconds and index + 1 >= (min_rounds if took < seconds * min_rounds else 3):
                break
    finally:
        if was_on:
            gc.enable()
    return found


def spread(samples: Samples, one: str, other: str) -> float:
    """How far apart the medians of two names of the same call are, as a part of the first."""
    return abs(median(samples[other]) / median(samples[one]) - 1)


def _repeats(call: Callable[[], object], sample_s: float) -> int:
    took = _time(call, 1)
    if took > 10 * sample_s:
        return 1
    took = _time(call, 1)  # the first run is no measure
    if took < sample_s / 10:
        took = _time(call, 10)
    return max(1, round(sample_s / max(took, 1e-9)))


def _time(call: Callable[[], object], repeats: int) -> float:
    settle()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    settle()
    return (time.perf_counter() - start) / repeats


def settle() -> None:
    """Wait for a GPU that this process uses."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


@contextmanager
def _silenced() -> Generator[None]:
    """The profiler writes to the file descriptor itself."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def peak_bytes(run: Callable[[], object]) -> int:
    """Bytes that a run holds at its peak beyond its inputs and results, by torch's own profiler: scratch included."""
    from torch.profiler import ProfilerActivity, profile

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = run()
        torch.cuda.synchronize()
        return max(0, torch.cuda.max_memory_allocated() - before - _bytes(out))
    with _silenced(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiler:
        out = run()
    live = peak = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return max(0, peak - _bytes(out))


def _bytes(out: object) -> int:
    storages = [x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())
