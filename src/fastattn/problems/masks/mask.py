"""Mask: what all masks with a meaning are.

A mask speaks of positions. The position of query i is i, or i + kv_len - q_len where the mask holds a Causal("bottom_right"):
one corner holds for all that is combined.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING

from fastattn.problems import dense_masks
from fastattn.problems.masks.runs import Runs
from fastattn.problems.masks.values import whole_numbers

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fastattn.problems.masks.picture import Picture


class Mask:
    """Which keys each query sees: a frozen, hashable value. a & b shows what both show, a | b what either does."""

    __slots__ = ()

    def __and__(self, other: Mask) -> Mask:
        from fastattn.problems.masks.combined import Intersection, combined

        return combined(Intersection, self, other)

    def __or__(self, other: Mask) -> Mask:
        from fastattn.problems.masks.combined import Union, combined

        return combined(Union, self, other)

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

    def added(self) -> tuple[Tensor, ...]:
        """Tensors that are added to the scores as well, which a Bias holds."""
        return ()

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

    def fixes_corner(self) -> bool:
        """Whether position 0 must lie at its anchor: what is combined with it must not have another one."""
        return False

    def is_per_batch(self) -> bool:
        """Whether batch entries differ."""
        return False

    @property
    def page_table(self) -> Tensor | None:
        """The pages that make up the keys of each batch entry, int [batch, pages], where k and v of the call are such."""
        return None

    def heads(self) -> int:
        """For how many heads it has a bias each; 0: it has none."""
        return 0

    def shifts(self) -> bool:
        """Whether a query's distance to a key says all."""
        return False

    def for_heads(self, count: int) -> Mask:
        """The same for the first heads, or for more, whose biases begin anew."""
        return self

    def of_lengths(self, q_len: int, kv_len: int, device: torch.device) -> Mask:
        """The same for tensors of these lengths: one that stands for others becomes one of those."""
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

        With a bias it is what is added: float [batch or 1, heads, q_len, kv_len], -inf where a key is hidden; float64, or as
        the tensor of a Bias. rows: the queries that are wanted, in place of all.
        """
        import torch

        i = torch.arange(q_len, dtype=torch.int64, device=device) if rows is None else rows
        j = torch.arange(kv_len, dtype=torch.int64, device=device)
        found = self.part(range(batch), i + self.offset(q_len, kv_len), j, kv_len)
        for tensor in self.added():
            if tensor.shape[-2] not in (1, q_len) or tensor.shape[-1] not in (1, kv_len):
                raise ValueError(f"{self!r} does not fit q_len {q_len}, kv_len {kv_len}")
            bias = tensor if rows is None or tensor.shape[-2] == 1 else tensor[..., rows, :]
            found = dense_masks.intersect(bias, found) if found.dtype is torch.bool else found + bias
        return found

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
        known = [field for field in fields(self) if field.repr]  # type: ignore[arg-type]
        for at, field in enumerate(known):
            if (value := getattr(self, field.name)) != field.default:
                said.append(repr(value) if len(said) == at else f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(said)})"

    def parts(self) -> tuple[Mask, ...]:
        """The masks all of which must let a key be seen."""
        return (self,)
