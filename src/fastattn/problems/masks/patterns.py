"""The masks that say all by positions and are no bands: dilation, chunks, grids, global tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

from fastattn.problems.masks import runs
from fastattn.problems.masks.mask import Mask
from fastattn.problems.masks.runs import Runs
from fastattn.problems.masks.values import one_or_each, whole_numbers

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, repr=False)
class Dilated(Mask):
    """Every n-th key, the query's own included: |p - j| is a multiple of `every`.

    `Dilated(4) & Window(64, 64)` is a dilated window. Raises TypeError or ValueError where it is no whole number from 1 on.
    """

    every: int

    def __post_init__(self) -> None:
        whole_numbers("every", self.every, 1, 1)

    def sees(self, b: Tensor, p: Tensor, j: Tensor, kv_len: int) -> Tensor:
        return (p - j) % self.every == 0

    def runs(self, b: int, rows: range, kv_len: int) -> tuple[Runs, Runs]:
        all_keys = runs.run(0, kv_len, kv_len)
        return all_keys, all_keys if rows.step % self.every == 0 else ()

    def step(self) -> int:
        return self.every

    def shifts(self) -> bool:
        return True


@dataclass(frozen=True, slots=True, repr=False)
class Chunked(Mask):
    """Keys in the same chunk of `size` positions (Llama 4 takes it together with Causal).

    Raises TypeError or ValueError where size is no whole number from 1 on.
    """

    size: int

    def __post_init__(self) -> None:
        whole_numbers("size", self.size, 1, 1)

    def sees(self, b: Tensor, p: Tensor, j: Tensor, kv_len: int) -> Tensor:
        return p // self.size == j // self.size

    def runs(self, b: int, rows: range, kv_len: int) -> tuple[Runs, Runs]:
        first, last = rows[0] // self.size, rows[-1] // self.size
        some = runs.run(first * self.size, (last + 1) * self.size, kv_len)
        return some, some if first == last else ()

    def cuts(self, b: int, end: int) -> Iterable[int]:
        return range(0, end, self.size)


@dataclass(frozen=True, slots=True, repr=False)
class Neighborhood(Mask):
    """Tokens of a grid, row by row: a query sees the tokens within `radius` steps along each dimension.

    grid: (h, w), or the sizes of 1 or 3 dimensions; radius: one number, or one for each. Raises TypeError or ValueError for
    sizes below 1, radii below 0, or another count of radii.
    """

    grid: tuple[int, ...]
    radius: tuple[int, ...]

    def __init__(self, grid: Any, radius: Any) -> None:
        grid = whole_numbers("grid", grid, 1)
        radius = whole_numbers("radius", radius, 0)
        radius = radius * len(grid) if len(radius) == 1 else whole_numbers("radius", radius, 0, len(grid))
        object.__setattr__(self, "grid", grid)
        object.__setattr__(self, "radius", radius)

    def sees(self, b: Tensor, p: Tensor, j: Tensor, kv_len: int) -> Tensor:
        step = prod(self.grid[1:])
        seen = (p // step - j // step).abs() <= self.radius[0]  # not wrapped: tokens may go on behind it
        for size, radius in zip(self.grid[1:], self.radius[1:], strict=True):
            whole, step = step, step // size
            seen = seen & ((p % whole // step - j % whole // step).abs() <= radius)
        return seen

    def runs(self, b: int, rows: range, kv_len: int) -> tuple[Runs, Runs]:
        step = prod(self.grid[1:])
        first, last = rows[0] // step - self.radius[0], rows[-1] // step + self.radius[0] + 1
        return runs.run(first * step, last * step, kv_len), ()

    def cuts(self, b: int, end: int) -> Iterable[int]:
        return range(0, end, prod(self.grid[1:]))

    def check(self, batch: int, heads: int, q_len: int, kv_len: int) -> None:
        if kv_len != prod(self.grid) or q_len > kv_len:
            raise ValueError(f"{self!r} is for {prod(self.grid)} tokens, got q_len {q_len}, kv_len {kv_len}")


@dataclass(frozen=True, slots=True, repr=False)
class Global(Mask):
    """Tokens that see every key, and that every query sees (Longformer, arXiv 2004.05150).

    tokens: how many at the start, or the positions of some. Raises TypeError or ValueError for anything but whole numbers
    from 0 on.
    """

    tokens: int | tuple[int, ...]

    def __init__(self, tokens: Any) -> None:
        found = one_or_each("tokens", tokens)
        object.__setattr__(self, "tokens", found if isinstance(found, int) else tuple(sorted(set(found))))

    def _runs(self) -> Runs:
        return _runs_of(self.tokens)

    def sees(self, b: Tensor, p: Tensor, j: Tensor, kv_len: int) -> Tensor:
        import torch

        own, other = (x.new_zeros(x.shape, dtype=torch.bool) for x in (p, j))
        for first, last in _runs_of_tokens(self.tokens):  # no cache, which Dynamo would warn of
            own, other = own | ((p >= first) & (p < last)), other | ((j >= first) & (j < last))
        return own | other

    def runs(self, b: int, rows: range, kv_len: int) -> tuple[Runs, Runs]:
        own = ((rows[0], rows[-1] + 1),)
        tokens, all_keys = runs.intersection(self._runs(), ((0, kv_len),)), runs.run(0, kv_len, kv_len)
        some = all_keys if runs.intersection(own, self._runs()) else tokens
        return some, all_keys if runs.holds(self._runs(), own) else tokens

    def cuts(self, b: int, end: int) -> Iterable[int]:
        return (cut for pair in self._runs() for cut in pair)


def _runs_of_tokens(tokens: int | tuple[int, ...]) -> Runs:
    if isinstance(tokens, int):
        return ((0, tokens),) if tokens else ()
    return runs.joined((token, token + 1) for token in tokens)


_runs_of = lru_cache(64)(_runs_of_tokens)
