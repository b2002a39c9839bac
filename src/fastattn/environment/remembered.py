"""Results that are remembered until fastattn.clear(): what follows from masks alone, which may be large."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import ParamSpec, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R")


def remembered(most: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """functools.lru_cache(most), which forget() empties."""

    def around(function: Callable[P, R]) -> Callable[P, R]:
        kept = lru_cache(most)(function)
        _forgetting.append(kept.cache_clear)
        return cast("Callable[P, R]", kept)

    return around


_forgetting: list[Callable[[], None]] = []


def forget() -> None:
    """Let go of all that is remembered."""
    for empty in _forgetting:
        empty()
