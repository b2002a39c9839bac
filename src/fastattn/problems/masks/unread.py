"""Packed sequences and caches whose lengths nobody reads, as they lie on a GPU: reading one would wait for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from fastattn.environment.remembered import remembered
from fastattn.problems import bands
from fastattn.problems.masks import runs
from fastattn.problems.masks.mask import Mask
from fastattn.problems.masks.packed import Filled, Packed, both_cut
from fastattn.problems.masks.runs import Runs
from fastattn.problems.masks.values import about

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """Where each packed sequence begins and the end of the last: int32 [sequences + 1], as kernels take them.

    No sequence is longer than max_q and max_kv, some may be empty. tokens: how many queries and keys lie in sequences, None
    where nobody knows.
    """

    cu_q: Tensor
    cu_kv: Tensor
    max_q: int
    max_kv: int
    tokens: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, repr=False, init=False)
class PackedUnread(Packed):
    """Packed sequences that lie on a GPU: as Packed, but their lengths are not read. attention(layout="thd") makes them there.

    queries, keys: about how long a sequence is, one number each. corner, window: as of Packed. are_same: each sequence has as
    many queries as keys. sequences: where they begin; without them they are as long as queries and keys say. Raises TypeError
    or ValueError for anything else.
    """

    are_same: bool = False
    sequences: Sequences | None = None

    def __init__(
        self, queries: int, keys: int, corner: str = "", window: Any = (-1, -1), are_same: bool = False, sequences: Any = None,
    ) -> None:  # fmt: skip
        Packed.__init__(self, queries, keys, corner, window)
        if not (isinstance(self.queries, int) and isinstance(self.keys, int)) or (are_same and queries != keys):
            raise ValueError(
                f"queries and keys are a number each, the same one with are_same, got {queries!r}, {keys!r}"
            )
        object.__setattr__(self, "are_same", are_same)
        object.__setattr__(self, "sequences", sequences)

    def sees(self, b: Tensor, p: Tensor, j: Tensor, kv_len: int) -> Tensor:
        if self.sequences is None:
            return Packed.sees(self, b, p, j, kv_len)
        of_q, of_kv = (cu.long() for cu in (self.sequences.cu_q, self.sequences.cu_kv))
        n, m = ((x[..., None] >= ends[1:]).sum(-1) for x, ends in ((p, of_q), (j, of_kv)))  # how many ended before
        i, j = p - of_q[n], j - of_kv[m]  # those behind the last sequence see nothing, and are not seen
        seen = (n == m) & (n < of_q.shape[0] - 1)
        if self.corner == "bottom_right":
            longer = of_kv.diff() - of_q.diff()
            i = i + longer[n.where(n < longer.shape[0], 0)]
        lower, upper = bands.band(self.corner or None, self.window, 0, 0)
        seen = seen if upper is None else seen & (j <= i + upper)
        return seen if lower is None else seen & (j >= i + lower)

    def runs(self, b: int, rows: range, kv_len: int) -> tuple[Runs, Runs]:
        if self.sequences is None:
            return Packed.runs(self, b, rows, kv_len)
        return runs.run(0, kv_len, kv_len), ()  # any key may be seen, none is known to be

    def of_lengths(self, q_len: int, kv_len: int, device: Any) -> Mask:
        if self.sequences is not None:
            return self
        lengths = both_cut(self.queries, q_len, self.keys, kv_len)  # type: ignore[arg-type]
        sequences = sequences_of_lengths(*lengths, device)
        return PackedUnread(
            self.queries, self.keys, self.corner, self.window, self.are_same, replace(sequences, tokens=None)  # type: ignore[arg-type]
        )  # fmt: skip

    def like(self, kv_len: int) -> Mask:
        return _about_as_long(self.queries, self.keys, self.corner, self.window, self.are_same)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, repr=False, init=False)
class FilledUnread(Filled):
    """A cache that is filled to lengths that lie on a GPU: as Filled, but they are not read. kv_lens makes it there.

    keys, queries, left: as of Filled, keys standing for what is not known. lengths: how much of each batch entry is filled,
    int32 [batch], no more than there are keys. Raises TypeError or ValueError for anything else.
    """

    lengths: Any = None  # a Tensor

    def __init__(self, keys: Any, queries: Any = 0, left: Any = -1, lengths: Any = None) -> None:
        Filled.__init__(self, keys, queries, left)
        object.__setattr__(self, "lengths", lengths)

    def __eq__(self, other: object) -> bool:
        """Lengths equal themselves alone."""
        if not isinstance(other, FilledUnread) or self.lengths is not other.lengths:
            return False
        return (self.keys, self.queries, self.left) == (other.keys, other.queries, other.left)

    def __hash__(self) -> int:
        return hash((self.keys, self.queries, self.left, id(self.lengths)))

    def sees(self, b: Tensor, p: Tensor, j: Tensor, kv_len: int) -> Tensor:
        return self.sees_of(self.filled(b) if self.lengths is None else self.lengths.long()[b], p, j)

    def runs(self, b: int, rows: range, kv_len: int) -> tuple[Runs, Runs]:
        if self.lengths is None:
            return Filled.runs(self, b, rows, kv_len)
        return runs.run(0, kv_len, kv_len), ()  # any key may be seen, none is known to be

    def is_per_batch(self) -> bool:
        return True

    def like(self, kv_len: int) -> Mask:
        return half_filled(kv_len, self.queries, self.left)

    def check(self, batch: int, heads: int, q_len: int, kv_len: int) -> None:
        entries = batch if self.lengths is None else len(self.lengths)
        if entries != batch or self.queries not in (0, q_len):
            raise ValueError(
                f"a cache of {entries} entries and {self.queries} queries, got batch {batch}, q_len {q_len}"
            )


@lru_cache(64)  # a hit asks for it
def _about_as_long(queries: int, keys: int, corner: str, window: tuple[int, int], are_same: bool) -> PackedUnread:
    queries, keys = (1 << max(0, n - 1).bit_length() for n in (queries, keys))
    return PackedUnread(queries, keys, corner, window, are_same)


@lru_cache(64)  # a hit asks for it
def half_filled(kv_len: int, queries: int, left: int) -> FilledUnread:
    """Two entries, filled to a quarter and to three quarters."""
    half = about(kv_len / 2, kv_len)
    return FilledUnread((half - half // 2, half + half // 2), queries, left)


@remembered(64)  # the next layer asks for the same ones
def sequences_of_lengths(queries: tuple[int, ...], keys: tuple[int, ...], device: Any) -> Sequences:
    """The sequences of these lengths, on a device."""
    import torch

    def starts(lengths: tuple[int, ...]) -> Tensor:
        cu = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cpu")
        return cu.to(device, non_blocking=True)  # from memory that is not pinned: nothing waits, and it may go at once

    with torch.inference_mode(False):
        cu_q = starts(queries)
        cu_kv = cu_q if queries == keys else starts(keys)
    return Sequences(cu_q, cu_kv, max(queries), max(keys), (sum(queries), sum(keys)))
