"""A tile is a dense rectangle of the score matrix, a tiling the tiles in which every visible pair lies once.

The keys of a tile may lie in several runs: they are gathered, so that each row has all its keys in one tile and nothing
is to be merged. Rows in no tile see nothing: their output is zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fastattn.problems.masks import Mask

Run = tuple[int, int]  # (first, last + 1) of neighbouring keys

GAP = 256  # hidden keys that are worth a second run: gathering keys is a copy


class Tile(NamedTuple):
    """Where a tile lies: batch entries, query rows, the runs of its keys; is_masked: whether some pair in it is hidden.

    Where the rows have a step, its keys lie in the same step. masked_by: the part of a Mask that hides them, if it is one.
    """

    batch: slice
    rows: slice
    keys: tuple[Run, ...]
    is_masked: bool
    masked_by: Mask | None = None

    @property
    def key_count(self) -> int:
        return sum(len(self._range(pair)) for pair in self.keys)

    @property
    def row_count(self) -> int:
        return len(range(self.rows.start, self.rows.stop, self.rows.step or 1))

    def positions(self, offset: int) -> range:
        """Where its rows lie; offset: the position of the first row of all."""
        return range(self.rows.start + offset, self.rows.stop + offset, self.rows.step or 1)

    def _range(self, pair: Run) -> range:
        return range(*pair, self.rows.step or 1)

    @property
    def query(self) -> tuple[slice, slice, slice]:
        """Its place in q and in the output, (b, h, s, d)."""
        return self.batch, slice(None), self.rows

    def of_rows(self, x: Tensor) -> Tensor:
        """Its part of q."""
        return x[self.query]

    def of_gradient(self, grad: Tensor) -> Tensor:
        """Its part of the output's gradient."""
        return grad[self.query]

    def put_rows(self, x: Tensor, part: Tensor) -> None:
        """Write its part of the output, the log-sum-exp or q's gradient."""
        x[self.query] = part

    def of_keys(self, x: Tensor, dim: int = 2) -> Tensor:
        """Its part of k or v, along the dimension of the keys: a view where they lie in one run."""
        batch = self.batch if x.shape[0] > 1 else slice(None)
        parts = [x[(batch, *self._at(pair, dim)[1:])] for pair in self.keys]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def gathered_bytes(self, x: Tensor) -> int:
        """Of its part of k or v where that is a copy."""
        entries = len(range(x.shape[0])[self.batch])
        return entries * x.shape[1] * self.key_count * x.shape[3] * x.itemsize if len(self.keys) > 1 else 0

    def add_to_keys(self, x: Tensor, part: Tensor | None) -> None:
        """Add what belongs to this tile's keys to the whole of k or v, in place; the inverse of of_keys."""
        if part is None:
            return
        x = x[self.batch]
        sizes = [len(self._range(pair)) for pair in self.keys]
        for pair, piece in zip(self.keys, part.split(sizes, 2), strict=True):
            x[self._at(pair, 2)].add_(piece)

    def _at(self, pair: Run, dim: int) -> tuple[slice, ...]:
        return (*[slice(None)] * dim, slice(*pair, self.rows.step or 1))


class Tiling(NamedTuple):
    """The tiles of a problem. share: of all pairs, those that lie in tiles; masked_share: those in tiles with a mask."""

    tiles: tuple[Tile, ...]
    share: float
    masked_share: float
    has_every_row: bool  # each row lies in a tile


def tiling_of(tiles: Iterable[Tile], batch: int, q_len: int, kv_len: int) -> Tiling:
    """A tiling; neighbours that see the same keys, all of them, are one tile."""
    joined: list[Tile] = []
    for tile in tiles:
        before = joined[-1] if joined else None
        if (
            before is not None
            and not (before.is_masked or tile.is_masked)
            and (before.batch, before.keys) == (tile.batch, tile.keys)
            and before.rows.step == tile.rows.step
            and before.rows.stop - 1 + (tile.rows.step or 1) == tile.rows.start
        ):
            joined[-1] = tile._replace(rows=slice(before.rows.start, tile.rows.stop, tile.rows.step))
        else:
            joined.append(tile)
    rows = [(t.batch.stop - t.batch.start) * t.row_count for t in joined]
    pairs = [count * t.key_count for count, t in zip(rows, joined, strict=True)]
    masked = [n for n, t in zip(pairs, joined, strict=True) if t.is_masked]
    of_all = max(1, batch * q_len * kv_len)
    return Tiling(tuple(joined), sum(pairs) / of_all, sum(masked) / of_all, sum(rows) == batch * q_len)


def rows_of_a_tile(q_len: int) -> int:
    """Query rows of a tile: few enough to follow a triangle closely, enough that the calls cost little beside the work."""
    return 256 if q_len >= 2048 else 128
