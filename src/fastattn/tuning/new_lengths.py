"""What the first run at a length costs more than the next one: a plan, a primitive, code made for that length.

Where lengths churn nearly every run is such a run, so this is part of a candidate's time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from itertools import islice
from typing import Any

from torch import Tensor

from fastattn.problems.layouts import from_bhsd, strides_of_class, to_bhsd
from fastattn.problems.length_buckets import DECODE_Q_LEN
from fastattn.problems.problem import Problem
from fastattn.tuning.accuracy.sample import Sample
from fastattn.tuning.stopwatch import Stopwatch

LENGTHS = 2  # tried at most
ENOUGH_S = 0.1  # after first runs of so long together there is no further length
NEGLIGIBLE = 0.1  # of a run: what is less may be noise
ASKED = 64  # lengths that a kernel is asked about, where limits refuse some

# Lengths drawn so far: libraries keep what they made, whichever candidate asked for it, so none is drawn twice if it can be
# helped, neither for another candidate nor in another tuning of this process.
_drawn: Counter[Problem] = Counter()


def new_length_s(
    sample: Sample,
    run_on: Callable[[Sample], Callable[[], Any]],
    can_do: Callable[[Problem], bool],
    clock: Stopwatch,
) -> float:
    """Seconds that the first run at a length costs more than a later one; 0 where lengths are exact, or it is negligible.

    All first runs come first, so that later ones find the caches as cold. The least of each counts: a slow moment is no plan,
    and hides none.
    """
    runs = [run_on(shorter(sample, p)) for p in islice(filter(can_do, _draw(sample.problem)), LENGTHS)]
    first: list[float] = []
    for run in runs:
        first.append(_seconds(run, clock))
        if sum(first) > ENOUGH_S:
            break
    later = min((_seconds(run, clock) for run in runs[: len(first)]), default=0.0)
    cost = min(first, default=0.0) - later
    return cost if cost > NEGLIGIBLE * later else 0.0


def _seconds(run: Callable[[], Any], clock: Stopwatch) -> float:
    # not clock.time(): it takes a pause, as while another process compiles, for a clock that jumped
    start = clock.now()
    run()
    return clock.now() - start


def _draw(p: Problem) -> Generator[Problem]:
    """The problem at shorter lengths, its neighbours first; a decode keeps its queries."""
    q_len = p.q_len if p.lengths == "all" and p.q_len > DECODE_Q_LEN else 0
    count = max(q_len, p.kv_len) - 1 if p.lengths != "exact" else 0
    for _ in range(min(count, ASKED)):
        less = 1 + _drawn[p] % count
        _drawn[p] += 1
        yield p.replace(q_len=max(1, q_len - less) if q_len else p.q_len, kv_len=max(1, p.kv_len - less))


def shorter(s: Sample, p: Problem) -> Sample:
    """The sample at the lengths of p, in the same memory: a first call's bounds leave no room for another."""

    def cut(x: Tensor, cls: str, layout: str, rows: int, columns: int | None = None) -> Tensor:
        b, h, length, width = to_bhsd(x, layout).shape
        size = (b, h, min(length, rows), min(width, columns or width))
        strides = strides_of_class(size, cls or "contiguous")
        view = x.detach().as_strided(size, strides, x.storage_offset())
        return from_bhsd(view, layout).requires_grad_(x.requires_grad)

    q, k, v = (
        cut(x, cls, p.layout, rows)
        for x, cls, rows in zip((s.q, s.k, s.v), p.strides, (p.q_len, p.kv_len, p.kv_len), strict=True)
    )
    mask = cut(s.mask, p.mask_strides, "bhsd", p.q_len, p.kv_len) if isinstance(s.mask, Tensor) else s.mask
    grad = None if s.grad is None else cut(s.grad, p.strides[0], p.layout, p.q_len)
    return Sample(p, q, k, v, mask, grad)
