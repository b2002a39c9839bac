"""A stack: small tiles of like size in the place of batch entries, so that one call computes them all.

Their rows and keys are copied side by side, the shorter ones filled up by half at most: with their own first row and key
once more, so that nothing else is read. What fills up is hidden, and its answers are thrown away.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.problems.tilings.tile import Tile

SIZES = (16, 24, 32, 48, 64, 96, 128, 192, 256)  # rows or keys between two of them are alike
PAIRS = 2**14  # of a small tile at most: a larger one is worth a call, and not worth a copy
STACK_BYTES = (
    4 * 2**20
)  # of copies and mask in a stack: larger ones leave the caches, and malloc maps them anew in each call


@dataclass(frozen=True, eq=False)
class Stack:
    """To those who compute it, it is one tile.

    entries: the batch entry of each tile; rows, keys: where they lie in it, [tiles, rows] and [tiles, keys], filled up;
    is_row: which rows are no filling, None where all are, and `own` where those stand in all rows. mask: (tiles|1, 1, rows,
    keys), as it is added, or None.
    """

    entries: Tensor
    rows: Tensor
    keys: Tensor
    is_row: Tensor | None
    own: Tensor | None
    mask: Tensor | None

    def of_rows(self, x: Tensor) -> Tensor:
        """Its part of q."""
        return _gathered(x, self.entries, self.rows)

    def of_gradient(self, grad: Tensor) -> Tensor:
        """Its part of the output's gradient: filling has none."""
        found = self.of_rows(grad)
        return found if self.is_row is None else found.masked_fill(self.is_row.logical_not()[:, None, :, None], 0.0)

    def of_keys(self, x: Tensor) -> Tensor:
        """Its part of k or v."""
        return _gathered(x, self.entries, self.keys)

    def put_rows(self, x: Tensor, part: Tensor) -> None:
        """Write its part of the output, the log-sum-exp or q's gradient."""
        x, part = x.transpose(1, 2), part.transpose(1, 2).flatten(0, 1)
        entries, rows = self.entries[:, None].expand_as(self.rows).flatten(), self.rows.flatten()
        if self.own is not None:
            entries, rows, part = (given.index_select(0, self.own) for given in (entries, rows, part))
        if x.shape[0] == 1:  # whole rows are copied at once
            x[0].index_copy_(0, rows, part)
        else:
            x.index_put_((entries, rows), part)

    def add_to_keys(self, x: Tensor, part: Tensor | None) -> None:
        """Add what belongs to its keys to the whole of k or v, in place."""
        if part is None:
            return
        x, part = x.transpose(1, 2), part.transpose(1, 2).to(x.dtype)
        if x.shape[0] == 1:
            x[0].index_add_(0, self.keys.flatten(), part.flatten(0, 1))
        else:
            x.index_put_((self.entries[:, None], self.keys), part, accumulate=True)

    def bytes(self, row_bytes: int, key_bytes: int, pair_bytes: int) -> int:
        """Of its copies and its mask, by what one of each takes."""
        pairs = self.mask.numel() if self.mask is not None else 0
        return self.rows.numel() * row_bytes + self.keys.numel() * key_bytes + pairs * pair_bytes


def _gathered(x: Tensor, entries: Tensor, at: Tensor) -> Tensor:
    """(tiles, h, at, d) of (b, h, s, d)."""
    x = x.transpose(1, 2)
    if x.shape[0] == 1:
        return x[0].index_select(0, at.flatten()).unflatten(0, at.shape).transpose(1, 2)
    return x[entries[:, None], at].transpose(1, 2)


def of_like_size(
    tiles: Iterable[Tile], row_bytes: int, key_bytes: int, pair_bytes: int
) -> tuple[list[Tile], list[list[Tile]]]:
    """(tiles that stay alone, those of each stack, of one batch entry each). The bytes are of the copy of one, and its mask."""
    alone: list[Tile] = []
    by_size: dict[tuple[int, int], list[Tile]] = {}
    for tile in tiles:
        size = _size(tile)
        if size is None:
            alone.append(tile)
            continue
        each = (tile._replace(batch=slice(b, b + 1)) for b in range(tile.batch.start, tile.batch.stop))
        by_size.setdefault(size, []).extend(each)
    stacks: list[list[Tile]] = []
    for (rows, keys), alike in by_size.items():
        most = max(1, STACK_BYTES // (rows * row_bytes + keys * key_bytes + rows * keys * pair_bytes))
        for first in range(0, len(alike), most):
            some = alike[first : first + most]
            alone.extend(some) if len(some) == 1 else stacks.append(some)
    return alone, stacks


def _size(tile: Tile) -> tuple[int, int] | None:
    """(rows, keys) that a tile is filled up to at most; None where it is worth a call of its own."""
    rows, keys = tile.row_count, tile.key_count
    is_plain = len(tile.keys) == 1 and (tile.rows.step or 1) == 1
    if not is_plain or max(rows, keys) > SIZES[-1] or rows * keys > PAIRS:
        return None
    return SIZES[bisect_left(SIZES, rows)], SIZES[bisect_left(SIZES, keys)]


def filled_up(runs: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(places of runs, [runs, the longest], the first once more where one is shorter; which are no filling)."""
    firsts, ends = torch.tensor(runs, dtype=torch.int64, device=device)[..., None].unbind(1)
    at = firsts + torch.arange(int((ends - firsts).max()), dtype=torch.int64, device=device)
    return torch.where(at < ends, at, firsts), at < ends
