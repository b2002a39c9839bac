"""Results that are remembered until fastattn.clear(): what follows from masks and lengths alone, which may be large.

Under FakeTensorMode and its like nothing is remembered, nor recalled: its tensors have no data, and must not meet real ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

from fastattn.environment.torch_private import replaces_tensors

P = ParamSpec("P")
R = TypeVar("R")


def remembered(most: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """functools.lru_cache(most), which forget() empties."""

    def around(function: Callable[P, R]) -> Callable[P, R]:
        kept = lru_cache(most)(function)
        _forgetting.append(kept.cache_clear)

        @wraps(function)
        def ask(*args: P.args, **named: P.kwargs) -> R:
            return function(*args, **named) if replaces_tensors() else kept(*args, **named)

        return ask

    return around


_forgetting: list[Callable[[], None]] = []


def forget() -> None:
    """Let go of all that is remembered."""
    for empty in _forgetting:
        empty()
