"""Mask: what all masks with a meaning are, and how they combine.

A mask speaks of positions. The position of query i is i, or i + kv_len - q_len where the mask holds a Causal("bottom_right"):
one corner holds for all that is combined.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import reduce
from math import lcm
from typing import TYPE_CHECKING, Any

from fastattn.problems.masks import runs
from fastattn.problems.masks.runs import Runs
from fastattn.problems.masks.values import whole_numbers

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fastattn.problems.masks.picture import Picture

KINDS: dict[str, type[Mask]] = {}  # by name: what can be read back from its words


class Mask:
    """Which keys each query sees: a frozen, hashable value. a & b shows what both show, a | b what either does."""

    __slots__ = ()

    def __init_subclass__(cls) -> None:
        KINDS[cls.__name__] = cls

    def __and__(self, other: Mask) -> Mask:
        return _combined(Intersection, self, other)

    def __or__(self, other: Mask) -> Mask:
        return _combined(Union, self, other)

    # --- what a kind of mask says

    def sees(self, b: Tensor, p: Tensor, j: Tensor, kv_len: int) -> Tensor:
        """Whether the query at position p of batch entry b sees key j of kv_len: bool, broadcast over the three."""
        raise NotImplementedError

    def runs(self, b: int, rows: range, kv_len: int) -> tuple[Runs, Runs]:
        """(keys that some query at these positions may see, keys that all of them see).

        Where the positions have a step, of those keys only that lie in step with them.
        """
        raise NotImplementedError

    def bias(self, p: Tensor, j: Tensor) -> Tensor | None:
        """What is added to the scores, [heads, queries, keys] in float64, or [1, ...] where heads agree; None: nothing."""
        return None

    def cuts(self, b: int, end: int) -> Iterable[int]:
        """Positions before `end` at which what queries see changes at once: tiles that end there hide less."""
        return ()

    def step(self) -> int:
        """n where a query sees no more than every n-th key, counted from its own position."""
        return 1

    @property
    def anchor(self) -> str:
        """Where position 0 lies: "top_left" or "bottom_right"."""
        return "top_left"

    def is_per_batch(self) -> bool:
        """Whether batch entries differ."""
        return False

    def heads(self) -> int:
        """For how many heads it has a bias each; 0: it has none."""
        return 0

    def shifts(self) -> bool:
        """Whether a query's distance to a key says all."""
        return False

    def for_heads(self, count: int) -> Mask:
        """The same for the first heads, or for more, whose biases begin anew."""
        return self

    def like(self, kv_len: int) -> Mask:
        """The mask that stands for all that are about the same, in batches of any size: they share a verdict."""
        return self

    def check(self, batch: int, heads: int, q_len: int, kv_len: int) -> None:
        """Raises ValueError where the mask cannot be one of such a problem."""

    # --- what can be asked of every mask

    def dense(
        self, batch: int, q_len: int, kv_len: int, device: torch.device | str = "cpu", *, rows: Tensor | None = None
    ) -> Tensor:
        """The same as a tensor: bool [batch or 1, 1, q_len, kv_len], True where a query sees a key.

        With a bias it is what is added: float64 [batch or 1, heads, q_len, kv_len], -inf where a key is hidden. rows: the
        queries that are wanted, in place of all.
        """
        import torch

        i = torch.arange(q_len, dtype=torch.int64, device=device) if rows is None else rows
        j = torch.arange(kv_len, dtype=torch.int64, device=device)
        return self.part(range(batch), i + self.offset(q_len, kv_len), j, kv_len)

    def part(self, entries: range, p: Tensor, j: Tensor, kv_len: int) -> Tensor:
        """dense() of some batch entries, the queries at positions p and the keys j."""
        import torch

        entries = entries if self.is_per_batch() else range(1)
        b = torch.tensor(entries, dtype=torch.int64, device=p.device)
        seen = self.sees(b[:, None, None, None], p[:, None], j, kv_len).expand(len(entries), 1, len(p), len(j))
        bias = self.bias(p, j)
        return seen if bias is None else bias.masked_fill(seen.logical_not(), float("-inf"))

    def show(self, q_len: int, kv_len: int | None = None, entry: int = 0) -> Picture:
        """A picture of it for these lengths: print it, save() it as PNG, or let a notebook show it. entry: of the batch.

        Raises TypeError or ValueError for lengths that are no whole numbers from 1 on.
        """
        from fastattn.problems.masks.picture import Picture

        kv_len = q_len if kv_len is None else kv_len
        whole_numbers("q_len and kv_len", (q_len, kv_len), 1)
        return Picture(self, q_len, kv_len, entry)

    def offset(self, q_len: int, kv_len: int) -> int:
        """The position of the first query."""
        return kv_len - q_len if self.anchor == "bottom_right" else 0

    def __repr__(self) -> str:
        """As it is written: what is as usual is not said, and what comes after it is named."""
        said: list[str] = []
        known = fields(self)  # type: ignore[arg-type]
        for at, field in enumerate(known):
            if (value := getattr(self, field.name)) != field.default:
                said.append(repr(value) if len(said) == at else f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(said)})"

    def parts(self) -> tuple[Mask, ...]:
        """The masks all of which must let a key be seen."""
        return (self,)


@dataclass(frozen=True, slots=True, repr=False)
class _Combined(Mask):
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

    def shifts(self) -> bool:
        return all(mask.shifts() for mask in self.of)

    def for_heads(self, count: int) -> Mask:
        return type(self)(tuple(mask.for_heads(count) for mask in self.of))

    def like(self, kv_len: int) -> Mask:
        return type(self)(tuple(mask.like(kv_len) for mask in self.of))

    def check(self, batch: int, heads: int, q_len: int, kv_len: int) -> None:
        for mask in self.of:
            mask.check(batch, heads, q_len, kv_len)


class Intersection(_Combined):
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


class Union(_Combined):
    """What any of some masks shows: a | b."""

    __slots__ = ()

    def sees(self, b: Tensor, p: Tensor, j: Tensor, kv_len: int) -> Tensor:
        return reduce(lambda x, y: x | y, (mask.sees(b, p, j, kv_len) for mask in self.of))

    def runs(self, b: int, rows: range, kv_len: int) -> tuple[Runs, Runs]:
        some, every = zip(*(mask.runs(b, rows, kv_len) for mask in self.of), strict=True)
        return reduce(runs.union, some), reduce(runs.union, every)

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.of))


def _combined(kind: type[_Combined], a: Mask, b: Any) -> Mask:
    if not isinstance(b, Mask):
        return NotImplemented
    of = [part for mask in (a, b) for part in (mask.of if isinstance(mask, kind) else (mask,))]
    of = tuple(sorted(dict.fromkeys(of), key=lambda part: type(part).__name__))  # a & b is b & a
    if kind is Union and any(mask.heads() for mask in of):
        raise ValueError(f"{a!r} | {b!r}: a bias is added to what is seen, and goes with &")
    if len({leaf.anchor for leaf in leaves(kind(of)) if isinstance(leaf, KINDS["Causal"])}) > 1:
        raise ValueError(f"{a!r} and {b!r} have different corners: a mask has one position for each query")
    return of[0] if len(of) == 1 else kind(of)


def all_of(some: Iterable[Mask]) -> Mask:
    """What all of some masks show. Raises ValueError where they have different corners."""
    return reduce(lambda a, b: a & b, some)


def leaves(mask: Mask) -> list[Mask]:
    """All that is combined in a mask."""
    return [leaf for part in mask.of for leaf in leaves(part)] if isinstance(mask, _Combined) else [mask]
