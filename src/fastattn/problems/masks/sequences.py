"""The masks that know where sequences begin and end: packed documents, padding, prefixes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby, pairwise
from typing import TYPE_CHECKING, Any

from fastattn.problems.masks import runs
from fastattn.problems.masks.mask import Mask
from fastattn.problems.masks.runs import Runs
from fastattn.problems.masks.values import about, check_entries, each, is_one_number, one_or_each, whole_numbers

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, repr=False)
class Document(Mask):
    """Packed sequences: keys of the query's own document.

    lengths: one number, all documents are that long (the last one may be shorter); or the length of each document; or such a
    list for each batch entry. ids: in their place, the document of each token, [tokens] or [batch, tokens]; equal neighbours
    are one document. Raises TypeError or ValueError for anything else, or for both.
    """

    lengths: int | tuple[int, ...] | tuple[tuple[int, ...], ...]

    def __init__(self, lengths: Any = None, *, ids: Any = None) -> None:
        if (lengths is None) == (ids is None):
            raise TypeError("Document takes either lengths or ids")
        if ids is not None:
            lengths = _for_each(ids, lambda row: _run_lengths(whole_numbers("ids", row, -(2**62))))
        elif is_one_number(lengths):
            lengths = whole_numbers("lengths", lengths, 1)[0]
        else:
            lengths = _for_each(lengths, lambda row: whole_numbers("lengths", row, 1))
        object.__setattr__(self, "lengths", lengths)

    def _ends(self, b: int) -> tuple[int, ...]:
        """Where the documents of an entry end; a length that holds for all gives none."""
        return () if isinstance(self.lengths, int) else _ends_of(self._of_entry(b))

    def _of_entry(self, b: int) -> tuple[int, ...]:
        assert not isinstance(self.lengths, int)
        return self.lengths if isinstance(self.lengths[0], int) else self.lengths[b % len(self.lengths)]  # type: ignore[return-value]

    def sees(self, b: Tensor, p: Tensor, j: Tensor, kv_len: int) -> Tensor:
        if isinstance(self.lengths, int):
            return p // self.lengths == j // self.lengths
        # not _ends(): Dynamo, which traces this, warns of what is kept in a cache
        ends = b.new_tensor(_filled([tuple(accumulate(self._of_entry(entry))) for entry in range(self._entries())]))
        ends = ends[b % ends.shape[0]]  # (..., documents)

        def number(x: Tensor) -> Tensor:  # how many documents of its entry ended before
            return (x[..., None] >= ends).sum(-1)

        return number(p) == number(j)

    def _entries(self) -> int:
        return len(self.lengths) if self.is_per_batch() else 1  # type: ignore[arg-type]

    def _document(self, b: int, p: int) -> tuple[int, int]:
        """(first, last + 1) position of the document that holds p."""
        if isinstance(self.lengths, int):
            first = p // self.lengths * self.lengths
            return first, first + self.lengths
        ends = (0, *self._ends(b))
        at = bisect_right(ends, p)
        return ends[at - 1], ends[at] if at < len(ends) else p + 1

    def runs(self, b: int, rows: range, kv_len: int) -> tuple[Runs, Runs]:
        first, last = self._document(b, rows[0]), self._document(b, rows[-1])
        some = runs.run(first[0], last[1], kv_len)
        return some, some if first == last else ()

    def cuts(self, b: int, end: int) -> Iterable[int]:
        return range(0, end, self.lengths) if isinstance(self.lengths, int) else self._ends(b)

    def is_per_batch(self) -> bool:
        return not isinstance(self.lengths, int) and not isinstance(self.lengths[0], int)

    def like(self, kv_len: int) -> Mask:
        if isinstance(self.lengths, int):
            return self
        count = sum(len(self._ends(b)) for b in range(self._entries())) / self._entries()
        return Document(1 << max(0, round(kv_len / count) - 1).bit_length())  # the next power of two

    def check(self, batch: int, heads: int, q_len: int, kv_len: int) -> None:
        if isinstance(self.lengths, int):
            return
        check_entries(self, self._entries(), batch)
        for b in range(self._entries()):
            if self._ends(b)[-1] != kv_len or q_len > kv_len:
                raise ValueError(
                    f"Document has {self._ends(b)[-1]} tokens in batch entry {b}, got q_len {q_len}, kv_len {kv_len}"
                )


@dataclass(frozen=True, slots=True, repr=False)
class Padding(Mask):
    """The keys that are no padding.

    lengths: how many keys each batch entry has, the others are padding: behind them, or before them with side="left". Or a
    bool tensor [batch, kv_len], True where a key is none. Raises TypeError or ValueError for anything else.
    """

    lengths: int | tuple[int, ...] | tuple[Runs, ...]
    side: str = "right"

    def __init__(self, lengths: Any, side: str = "right") -> None:
        if side not in ("left", "right"):
            raise ValueError(f"side must be 'left' or 'right', got {side!r}")
        if getattr(lengths, "dtype", None) is not None and str(lengths.dtype).endswith("bool"):
            if lengths.ndim != 2:
                raise ValueError(f"a bool padding mask is [batch, kv_len], got shape {tuple(lengths.shape)}")
            lengths = tuple(_true_runs(row) for row in lengths.tolist())
        elif not _are_runs(lengths):
            lengths = one_or_each("lengths", lengths)
        if lengths == ():
            raise ValueError("a padding mask has one batch entry or more, got none")
        object.__setattr__(self, "lengths", lengths)
        object.__setattr__(self, "side", side)

    def _entries(self) -> int:
        return 1 if isinstance(self.lengths, int) else len(self.lengths)

    def _keys(self, b: int, kv_len: int) -> Runs:
        found = self.lengths if isinstance(self.lengths, int) else self.lengths[b % len(self.lengths)]
        if not isinstance(found, int):
            return runs.intersection(found, ((0, kv_len),))
        return runs.run(0, found, kv_len) if self.side == "right" else runs.run(kv_len - found, kv_len, kv_len)

    def sees(self, b: Tensor, p: Tensor, j: Tensor, kv_len: int) -> Tensor:
        keys = [self._keys(entry, kv_len) or ((0, 0),) for entry in range(self._entries())]
        first, last = (b.new_tensor(_filled([[pair[i] for pair in entry] for entry in keys])) for i in (0, 1))
        first, last = (x[b % x.shape[0]] for x in (first, last))  # (..., runs)
        return ((j[..., None] >= first) & (j[..., None] < last)).any(-1)

    def runs(self, b: int, rows: range, kv_len: int) -> tuple[Runs, Runs]:
        keys = self._keys(b, kv_len)
        return keys, keys

    def is_per_batch(self) -> bool:
        return not isinstance(self.lengths, int)

    def like(self, kv_len: int) -> Mask:
        counts = [sum(last - first for first, last in self._keys(b, kv_len)) for b in range(self._entries())]
        mean = about(sum(counts) / len(counts), kv_len)
        return Padding(
            (mean - mean // 2, min(about(kv_len, kv_len), mean + mean // 2)) if self.is_per_batch() else mean, self.side
        )

    def check(self, batch: int, heads: int, q_len: int, kv_len: int) -> None:
        check_entries(self, self._entries(), batch)
        lengths = (self.lengths,) if isinstance(self.lengths, int) else self.lengths
        most = max(n if isinstance(n, int) else max((last for _, last in n), default=0) for n in lengths)
        if most > kv_len:
            raise ValueError(f"Padding speaks of {most} keys, got kv_len {kv_len}")


@dataclass(frozen=True, slots=True, repr=False)
class Prefix(Mask):
    """The first keys, which all queries see: `Causal() | Prefix(n)` is a prefix language model's.

    lengths: one number, or one for each batch entry. Raises TypeError or ValueError for anything but whole numbers from 0 on.
    """

    lengths: int | tuple[int, ...]

    def __init__(self, lengths: Any) -> None:
        object.__setattr__(self, "lengths", one_or_each("lengths", lengths))

    def sees(self, b: Tensor, p: Tensor, j: Tensor, kv_len: int) -> Tensor:
        lengths = each(self.lengths)
        return j < b.new_tensor(lengths)[b % len(lengths)]

    def runs(self, b: int, rows: range, kv_len: int) -> tuple[Runs, Runs]:
        seen = runs.run(0, each(self.lengths)[b % len(each(self.lengths))], kv_len)
        return seen, seen

    def is_per_batch(self) -> bool:
        return not isinstance(self.lengths, int)

    def like(self, kv_len: int) -> Mask:
        lengths = each(self.lengths)
        mean = about(sum(lengths) / len(lengths), kv_len)
        return Prefix((mean, mean) if self.is_per_batch() else mean)

    def check(self, batch: int, heads: int, q_len: int, kv_len: int) -> None:
        check_entries(self, len(each(self.lengths)), batch)


@lru_cache(256)
def _ends_of(lengths: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(accumulate(lengths))


def _for_each(given: Any, read: Callable[[Any], tuple[int, ...]]) -> tuple[int, ...] | tuple[tuple[int, ...], ...]:
    """One tuple, or one for each batch entry where the values are nested."""
    given = given.tolist() if hasattr(given, "tolist") else given
    is_nested = isinstance(given, Sequence) and len(given) > 0 and isinstance(given[0], Sequence)
    return tuple(read(row) for row in given) if is_nested else read(given)


def _run_lengths(ids: tuple[int, ...]) -> tuple[int, ...]:
    """Lengths of the runs of equal numbers."""
    return tuple(len(list(same)) for _, same in groupby(ids))


def _true_runs(row: Sequence[bool]) -> Runs:
    """The runs of True."""
    ends = (0, *accumulate(len(list(same)) for _, same in groupby(row)))
    return tuple((first, last) for first, last in pairwise(ends) if row[first])


def _are_runs(given: Any) -> bool:
    """Whether these are the runs of each entry, as repr writes them."""
    if not isinstance(given, tuple) or not all(isinstance(entry, tuple) for entry in given):
        return False
    return all(len(pair) == 2 and pair[0] < pair[1] for entry in given for pair in entry) and all(
        entry == runs.joined(entry) for entry in given
    )


def _filled(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """The rows, all as long as the longest: the last number repeats."""
    most = max(map(len, rows))
    return [[*row, *[row[-1]] * (most - len(row))] for row in rows]
