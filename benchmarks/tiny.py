"""The tiny problems that overhead is measured on: so little work that what comes before it shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TINY = (1, 4, 16, 32)
Problem = tuple[Tensor, Tensor, Tensor]  # q, k, v


def tensors(*shape: int, grad: bool = False) -> Problem:
    """q, k and v of one problem, float32."""
    q, k, v = (torch.randn(shape or TINY, requires_grad=grad) for _ in range(3))
    return q, k, v


def many(count: int) -> list[Problem]:
    """Problems that differ in heads and lengths, all of them tiny."""
    return [tensors(1, 1 + i % 8, 16 + i // 8, 32) for i in range(count)]


def decoding(low: int, high: int) -> list[Problem]:
    """One query on a KV cache that grows by a key a call."""
    q = torch.randn(1, 4, 1, 32)
    cache = torch.randn(2, 1, 4, high, 32)
    return [(q, cache[0, :, :, :n], cache[1, :, :, :n]) for n in range(low, high + 1)]


def in_turn(call: Callable[..., object], problems: Sequence[Problem]) -> Callable[[], None]:
    """call(q, k, v, None) on each problem, one after the other."""

    def run() -> None:
        for q, k, v in problems:
            call(q, k, v, None)

    return run
