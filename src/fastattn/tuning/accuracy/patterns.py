"""Which pairs a made-up mask leaves: patterns to check with, to time with, and to find tiles in."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastattn.problems.problem import Problem

# pattern(problem, generator, (b|1, h|1, q|1, k|1)) -> bool of that shape, True where a query sees a key
Pattern = Callable[[Problem, torch.Generator, tuple[int, ...]], Tensor]


def random_visible(p: Problem, g: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """Three quarters of the pairs; where rows differ some see nothing, and nothing sees the last keys."""
    visible = torch.rand(shape, generator=g, dtype=torch.float32, device=g.device) < 0.75
    if shape[3] > 1 or "k" in p.mask_shape:
        visible[..., 0] = True
        if p.kv_len > 4:
            visible[..., -(p.kv_len // 8) - 1 :] = False  # as padding does
    if "q" in p.mask_shape and p.q_len > 1:
        visible[..., :: max(2, p.q_len // 4), :] = False
    return visible


def half_visible(p: Problem, g: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """What is timed: a triangle, keys that are padded to twice their number in the mean, or both where batch entries differ.

    Kernels that look at no mask's content take as long with any other. The last key is seen: a tail that is lost shows.
    """
    rows, keys = (torch.arange(n, dtype=torch.int64, device=g.device) for n in shape[2:])
    triangle = keys <= rows[:, None] + shape[3] - shape[2]
    if shape[2] > 1 and shape[0] == 1:
        return triangle.expand(shape)
    lengths = [max(1, p.kv_len * (b + 1) // (shape[0] + 1)) for b in range(shape[0])]
    padded = (keys >= p.kv_len - keys.new_tensor(lengths)[:, None, None, None]).expand(shape)
    return padded & triangle if shape[2] > 1 else padded


def structured(p: Problem, g: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """Windows, documents, keys that all see, rows that see nothing; random holes in some of it."""
    (q_len, kv_len), device = shape[2:], g.device
    rows, keys = (torch.arange(n, dtype=torch.int64, device=device) for n in (q_len, kv_len))
    if q_len == 1:
        return ((keys >= kv_len // 3) & (keys < kv_len // 2)).expand(shape)
    middle = rows[:, None] * kv_len // q_len
    window = (keys - middle).abs() <= kv_len // 8
    documents = keys // max(1, kv_len // 4) == middle // max(1, kv_len // 4)
    seen = torch.where(rows[:, None] < q_len // 2, window | (keys < 3), documents)
    holes = torch.rand(q_len, kv_len, generator=g, dtype=torch.float32, device=device) < 0.9
    seen = seen & (holes | (rows[:, None] >= q_len // 4)) & (rows[:, None] < q_len - q_len // 8)
    return seen.expand(shape)
