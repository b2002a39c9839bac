"""The masks that packing and caches come to: packed sequences, and caches that are filled to some length.

`attention(layout="thd")` and `kv_lens` make them where Document and Padding do not say it all.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from fastattn.problems import bands
from fastattn.problems.masks import runs
from fastattn.problems.masks.mask import Mask
from fastattn.problems.masks.runs import Runs
from fastattn.problems.masks.values import about, check_entries, each, one_or_each, whole_numbers

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, repr=False)
class Packed(Mask):
    """Packed sequences whose queries and keys have lengths of their own: a query sees keys of its sequence.

    queries, keys: the length of each sequence, 0 too; or one number each for sequences that are all alike. corner: "", or of
    the triangle in each sequence. window: (left, right) around that diagonal, -1 is no limit. Raises TypeError or ValueError
    for anything else.
    """

    queries: int | tuple[int, ...]
    keys: int | tuple[int, ...]
    corner: str = ""
    window: bands.Sides = (-1, -1)

    def __init__(self, queries: Any, keys: Any, corner: str = "", window: Any = (-1, -1)) -> None:
        queries, keys = one_or_each("queries", queries), one_or_each("keys", keys)
        if len(each(queries)) != len(each(keys)) or isinstance(queries, int) != isinstance(keys, int):
            raise ValueError(f"queries and keys are of as many sequences, got {queries!r} and {keys!r}")
        if corner not in ("", *bands.CORNERS):
            raise ValueError(f"corner must be '' or one of {', '.join(map(repr, bands.CORNERS))}, got {corner!r}")
        for name, value in (("queries", queries), ("keys", keys), ("corner", corner)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "window", whole_numbers("window", window, -1, 2))

    def _band(self, q_len: int, kv_len: int) -> tuple[int, int]:
        """Of a sequence: its query i sees its keys from i + lower to i + upper."""
        lower, upper = bands.band(self.corner or None, self.window, q_len, kv_len)
        return -q_len if lower is None else lower, kv_len if upper is None else upper

    def sees(self, b: Tensor, p: Tensor, j: Tensor, kv_len: int) -> Tensor:
        if isinstance(self.queries, int) and isinstance(self.keys, int):
            if not (self.queries and self.keys):
                return (p < 0) & (j < 0)  # there is nothing to see
            of_query, of_key = p // self.queries, j // self.keys
            lower, upper = self._band(self.queries, self.keys)
            distance = j - of_key * self.keys - (p - of_query * self.queries)
            return (of_query == of_key) & (distance >= lower) & (distance <= upper)
        # one more sequence holds what lies behind the last: nothing sees it
        sizes = [*zip(each(self.queries), each(self.keys), strict=True), (0, 0)]
        q_ends, k_ends = (p.new_tensor([*accumulate(lengths)][:-1]) for lengths in zip(*sizes, strict=True))
        lowest, highest = p.new_tensor([self._band(*size) for size in sizes]).unbind(-1)
        q_firsts, k_firsts = (x.new_zeros(len(sizes)).index_copy_(0, _from_1(x), x) for x in (q_ends, k_ends))
        of_query, of_key = (
            (x[..., None] >= ends).sum(-1) for x, ends in ((p, q_ends), (j, k_ends))
        )  # how many sequences ended before
        distance = (j - k_firsts[of_key]) - (p - q_firsts[of_query])
        seen = (of_query == of_key) & (of_query < len(sizes) - 1) & (p >= 0)
        return seen & (distance >= lowest[of_query]) & (distance <= highest[of_query])

    def _sequences(self, rows: range) -> Iterator[tuple[int, int, int, int]]:
        """(first query, queries, first key, keys) of each sequence that has one of these rows."""
        if isinstance(self.queries, int) and isinstance(self.keys, int):
            if self.queries:
                for n in range(rows[0] // self.queries, rows[-1] // self.queries + 1):
                    yield n * self.queries, self.queries, n * self.keys, self.keys
            return
        q_firsts, k_firsts = _firsts(self.queries), _firsts(self.keys)  # type: ignore[arg-type]
        for n in range(bisect_right(q_firsts, rows[0]) - 1, len(q_firsts) - 1):
            if q_firsts[n] > rows[-1]:
                return
            yield q_firsts[n], q_firsts[n + 1] - q_firsts[n], k_firsts[n], k_firsts[n + 1] - k_firsts[n]

    def runs(self, b: int, rows: range, kv_len: int) -> tuple[Runs, Runs]:
        some: Runs = ()
        every: Runs = ()
        for first_query, queries, first_key, keys in self._sequences(rows):
            lower, upper = self._band(queries, keys)
            low, high = max(0, rows[0] - first_query), min(queries - 1, rows[-1] - first_query)
            last_key = min(kv_len, first_key + keys)
            if low <= high:
                begin, end = max(first_key, first_key + low + lower), first_key + high + upper + 1
                some = runs.union(some, runs.run(begin, min(last_key, end), kv_len))
            if rows[0] >= first_query and rows[-1] < first_query + queries:
                begin, end = max(first_key, first_key + high + lower), first_key + low + upper + 1
                every = runs.run(begin, min(last_key, end), kv_len)
        return some, every

    def cuts(self, b: int, end: int) -> Iterable[int]:
        if isinstance(self.queries, int):
            return range(0, end, max(1, self.queries))
        return _firsts(self.queries)

    def of_lengths(self, q_len: int, kv_len: int, device: Any) -> Mask:
        if not (isinstance(self.queries, int) and isinstance(self.keys, int)):
            return self
        return Packed(*both_cut(self.queries, q_len, self.keys, kv_len), self.corner, self.window)

    def like(self, kv_len: int) -> Mask:
        if isinstance(self.queries, int):
            return self
        sizes = [(q, k) for q, k in zip(each(self.queries), each(self.keys), strict=True) if q and k] or [(1, 1)]
        queries, keys = (
            1 << max(0, round(sum(n) / len(sizes)) - 1).bit_length() for n in zip(*sizes, strict=True)
        )  # the next powers of two
        return Packed(queries, keys, self.corner, self.window)

    def check(self, batch: int, heads: int, q_len: int, kv_len: int) -> None:
        if isinstance(self.queries, int):
            return
        for name, lengths, most in (("q", self.queries, q_len), ("kv", each(self.keys), kv_len)):
            if sum(lengths) > most:
                raise ValueError(f"Packed speaks of {sum(lengths)} tokens, got {name}_len {most}")


@dataclass(frozen=True, slots=True, repr=False)
class Filled(Mask):
    """A cache that is filled to some length: the keys behind it may hold anything, and are not read.

    keys: how many are filled, one number or one for each batch entry. queries: 0, or how many there are: they are then the
    last of the filled tokens, and query i of n sees keys up to filled - n + i. left: keys that such a query sees before its
    own, -1 is no limit. Raises TypeError or ValueError for anything else.
    """

    keys: int | tuple[int, ...]
    queries: int = 0
    left: int = -1

    def __init__(self, keys: Any, queries: Any = 0, left: Any = -1) -> None:
        object.__setattr__(self, "keys", one_or_each("keys", keys))
        object.__setattr__(self, "queries", whole_numbers("queries", queries, 0, 1)[0])
        object.__setattr__(self, "left", whole_numbers("left", left, -1, 1)[0])

    def filled(self, b: Tensor) -> Tensor:
        """How much of batch entries is filled."""
        keys = each(self.keys)
        return b.new_tensor(keys)[b % len(keys)]

    def sees(self, b: Tensor, p: Tensor, j: Tensor, kv_len: int) -> Tensor:
        return self.sees_of(self.filled(b), p, j)

    def sees_of(self, filled: Tensor, p: Tensor, j: Tensor) -> Tensor:
        """sees() where so much is filled."""
        if not self.queries:
            return j < filled
        at = p + filled - self.queries
        seen = (j <= at) & (j < filled)
        return seen & (j >= at - self.left) if self.left >= 0 else seen

    def runs(self, b: int, rows: range, kv_len: int) -> tuple[Runs, Runs]:
        filled = each(self.keys)[b % len(each(self.keys))]
        if not self.queries:
            keys = runs.run(0, filled, kv_len)
            return keys, keys
        low, high = (at + filled - self.queries for at in (rows[0], rows[-1]))
        first_of_low, first_of_high = (0, 0) if self.left < 0 else (low - self.left, high - self.left)
        end = min(kv_len, filled)
        return runs.run(first_of_low, high + 1, end), runs.run(first_of_high, low + 1, end)

    def of_lengths(self, q_len: int, kv_len: int, device: Any) -> Mask:
        """One that stands for longer caches is filled to no more than there is, and its queries are those there are."""
        keys = tuple(min(n, kv_len) for n in each(self.keys))
        return replace(self, keys=keys if self.is_per_batch() else keys[0], queries=q_len if self.queries else 0)

    def unread(self, kv_len: int, device: Any) -> Tensor:
        """(b|1, 1, kv_len, 1) bool: the keys behind the filled part."""
        import torch

        keys = torch.tensor(each(self.keys), dtype=torch.int64, device=device)
        return torch.arange(kv_len, dtype=torch.int64, device=device)[:, None] >= keys[:, None, None, None]

    def is_per_batch(self) -> bool:
        return not isinstance(self.keys, int)

    def like(self, kv_len: int) -> Mask:
        mean = about(sum(each(self.keys)) / len(each(self.keys)), kv_len)
        around = (mean - mean // 2, min(about(kv_len, kv_len), mean + mean // 2))
        return Filled(around if self.is_per_batch() else mean, self.queries, self.left)

    def check(self, batch: int, heads: int, q_len: int, kv_len: int) -> None:
        check_entries(self, len(each(self.keys)), batch)
        if self.queries not in (0, q_len):
            raise ValueError(f"Filled speaks of {self.queries} queries, got q_len {q_len}")
        if max(each(self.keys)) > kv_len:
            raise ValueError(f"Filled speaks of {max(each(self.keys))} keys, got kv_len {kv_len}")


def both_cut(queries: int, q_len: int, keys: int, kv_len: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens cut into sequences of one length, as many of queries as of keys; the last one may be shorter."""
    cut = [
        (length,) * (tokens // length) + ((tokens % length,) if tokens % length else ()) if length else ()
        for length, tokens in ((queries, q_len), (keys, kv_len))
    ]
    count = max(1, *map(len, cut))
    of_q, of_kv = (lengths + (0,) * (count - len(lengths)) for lengths in cut)
    return of_q, of_kv


@lru_cache(256)
def _firsts(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Where each sequence begins, and the end of the last."""
    return (0, *accumulate(lengths))


def _from_1(ends: Tensor) -> Tensor:
    import torch

    return torch.arange(1, len(ends) + 1, dtype=torch.int64, device=ends.device)
