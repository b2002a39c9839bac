"""Runs of keys: sorted, apart from each other, each (first, last + 1)."""

from __future__ import annotations

from collections.abc import Iterable

Runs = tuple[tuple[int, int], ...]


def run(first: int, last: int, kv_len: int) -> Runs:
    """The keys first <= j < last that there are."""
    first, last = max(0, first), min(kv_len, last)
    return ((first, last),) if first < last else ()


def union(a: Runs, b: Runs) -> Runs:
    """Keys in either."""
    return joined((*a, *b))


def joined(parts: Iterable[tuple[int, int]], gap: int = 0) -> Runs:
    """Runs from parts in any order; those no more than `gap` apart become one."""
    found: list[tuple[int, int]] = []
    for first, last in sorted(parts):
        if found and first <= found[-1][1] + gap:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return tuple(found)


def intersection(a: Runs, b: Runs) -> Runs:
    """Keys in both."""
    found: list[tuple[int, int]] = []
    i = j = 0
    while i < len(a) and j < len(b):
        first, last = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if first < last:
            found.append((first, last))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return tuple(found)


def holds(a: Runs, b: Runs) -> bool:
    """Whether all keys of b are in a."""
    return intersection(a, b) == b
