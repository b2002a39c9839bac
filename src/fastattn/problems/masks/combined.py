"""How masks combine: what all of some masks show, and what any of them does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from math import lcm
from typing import TYPE_CHECKING, Any

from fastattn.problems.masks import runs
from fastattn.problems.masks.mask import Mask
from fastattn.problems.masks.runs import Runs

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, repr=False)
class Combined(Mask):
    """Several masks in one."""

    of: tuple[Mask, ...]

    def cuts(self, b: int, end: int) -> Iterable[int]:
        return {cut for mask in self.of for cut in mask.cuts(b, end)}

    @property
    def anchor(self) -> str:
        return next((mask.anchor for mask in self.of if mask.anchor != "top_left"), "top_left")

    def is_per_batch(self) -> bool:
        return any(mask.is_per_batch() for mask in self.of)

    def heads(self) -> int:
        return max(mask.heads() for mask in self.of)

    def added(self) -> tuple[Tensor, ...]:
        return tuple(tensor for mask in self.of for tensor in mask.added())

    def shifts(self) -> bool:
        return all(mask.shifts() for mask in self.of)

    def for_heads(self, count: int) -> Mask:
        return type(self)(tuple(mask.for_heads(count) for mask in self.of))

    def like(self, kv_len: int) -> Mask:
        return type(self)(tuple(mask.like(kv_len) for mask in self.of))

    def check(self, batch: int, heads: int, q_len: int, kv_len: int) -> None:
        for mask in self.of:
            mask.check(batch, heads, q_len, kv_len)


class Intersection(Combined):
    """What all of some masks show: a & b."""

    __slots__ = ()

    def sees(self, b: Tensor, p: Tensor, j: Tensor, kv_len: int) -> Tensor:
        return reduce(lambda x, y: x & y, (mask.sees(b, p, j, kv_len) for mask in self.of))

    def runs(self, b: int, rows: range, kv_len: int) -> tuple[Runs, Runs]:
        some, every = zip(*(mask.runs(b, rows, kv_len) for mask in self.of), strict=True)
        return reduce(runs.intersection, some), reduce(runs.intersection, every)

    def bias(self, p: Tensor, j: Tensor) -> Tensor | None:
        found = None
        for mask in self.of:
            bias = mask.bias(p, j)
            if bias is not None:
                found = bias if found is None else found + bias
        return found

    def step(self) -> int:
        return lcm(*(mask.step() for mask in self.of))

    def parts(self) -> tuple[Mask, ...]:
        return self.of

    def __repr__(self) -> str:
        return " & ".join(f"({mask!r})" if isinstance(mask, Union) else repr(mask) for mask in self.of)


class Union(Combined):
    """What any of some masks shows: a | b."""

    __slots__ = ()

    def sees(self, b: Tensor, p: Tensor, j: Tensor, kv_len: int) -> Tensor:
        return reduce(lambda x, y: x | y, (mask.sees(b, p, j, kv_len) for mask in self.of))

    def runs(self, b: int, rows: range, kv_len: int) -> tuple[Runs, Runs]:
        some, every = zip(*(mask.runs(b, rows, kv_len) for mask in self.of), strict=True)
        return reduce(runs.union, some), reduce(runs.union, every)

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.of))


def combined(kind: type[Combined], a: Mask, b: Any) -> Mask:
    """a & b or a | b. Raises ValueError for masks that do not go together."""
    if not isinstance(b, Mask):
        return NotImplemented
    of = [part for mask in (a, b) for part in (mask.of if isinstance(mask, kind) else (mask,))]
    of = tuple(sorted(dict.fromkeys(of), key=lambda part: type(part).__name__))  # a & b is b & a
    if kind is Union and any(mask.heads() or mask.added() for mask in of):
        raise ValueError(f"{a!r} | {b!r}: a bias is added to what is seen, and goes with &")
    if len({leaf.anchor for leaf in leaves(kind(of)) if leaf.fixes_corner()}) > 1:
        raise ValueError(f"{a!r} and {b!r} have different corners: a mask has one position for each query")
    return of[0] if len(of) == 1 else kind(of)


def all_of(some: Iterable[Mask]) -> Mask:
    """What all of some masks show. Raises ValueError where they have different corners."""
    return reduce(lambda a, b: a & b, some)


def leaves(mask: Mask) -> list[Mask]:
    """All that is combined in a mask."""
    return [leaf for part in mask.of for leaf in leaves(part)] if isinstance(mask, Combined) else [mask]
