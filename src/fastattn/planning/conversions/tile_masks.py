"""A tiling together with the masks of its tiles: of a Mask, of a dense mask that is looked at, or one tile of all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.environment.remembered import remembered
from fastattn.problems.dense_masks import additive, as_4d
from fastattn.problems.masks import Mask
from fastattn.problems.masks.runs import Runs
from fastattn.problems.tilings.of_dense import tiling_of_dense
from fastattn.problems.tilings.of_mask import FEWEST, tiling_of_mask
from fastattn.problems.tilings.stack import Stack
from fastattn.problems.tilings.tile import Tile, Tiling, tiling_of
from fastattn.problems.tilings.worth import Worth

FAR = 2**40  # where a tile is taken to lie if only distances count


class Tiled(NamedTuple):
    """parts: the tiles as they are computed. mask_of: the mask of one, (b|1, h|1, rows, keys). mask: the whole.

    own_bytes: of what the graphs of all tiles would hold: masks that no other tile shares, stacks. dtype: of q.
    """

    tiling: Tiling
    parts: tuple[Tile | Stack, ...]
    mask_of: Callable[[Any], Tensor | None]
    mask: Tensor | Mask
    own_bytes: int
    dtype: torch.dtype


def tiled_by_mask(mask: Mask, q: Tensor, k: Tensor, fewest: int = FEWEST) -> Tiled:
    """Tiles with masks that are made when they are needed, in the form that is added to the scores.

    fewest: rows of a tile that ends where the mask changes.
    """
    (batch, _, q_len, _), kv_len = q.shape, k.shape[2]
    offset = mask.offset(q_len, kv_len)
    dtype = torch.promote_types(q.dtype, torch.float32) if mask.heads() else q.dtype

    def mask_of(tile: Tile) -> Tensor | None:
        if tile.masked_by is None:
            return None
        at, keys, entries = tile.positions(offset), tile.keys, range(batch)[tile.batch]
        if tile.masked_by.shifts():
            shift = FAR - at.start
            at, keys = (
                range(FAR, at.stop + shift, at.step),
                tuple((first + shift, last + shift) for first, last in keys),
            )
        if not tile.masked_by.is_per_batch():
            entries = range(1)
        size = _bytes(tile, dtype)
        make = next((kept for most, kept in _KEPT if size <= most), _made)
        return make(tile.masked_by, entries, at, keys, kv_len, dtype, q.device)

    tiling = tiling_of_mask(mask, batch, q_len, kv_len, fewest)
    return Tiled(tiling, tiling.tiles, mask_of, mask, own_mask_bytes(tiling.tiles, dtype), q.dtype)


def own_mask_bytes(tiles: Iterable[Tile], dtype: torch.dtype) -> int:
    """Of the masks that no other tile shares."""
    own = [tile for tile in tiles if tile.masked_by is not None and not tile.masked_by.shifts()]
    return sum(_bytes(tile, dtype) for tile in own)


def _made(
    mask: Mask, entries: range, at: range, keys: Runs, kv_len: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The mask of a tile whose queries lie at these positions, as it is added."""
    with torch.inference_mode(False):
        p = torch.arange(at.start, at.stop, at.step, dtype=torch.int64, device=device)
        parts = [torch.arange(*pair, at.step, dtype=torch.int64, device=device) for pair in keys]
        seen = mask.part(entries, p, parts[0] if len(parts) == 1 else torch.cat(parts), kv_len)
        if seen.dtype is not torch.bool:
            return seen.to(dtype)
        return additive(seen, torch.empty(0, dtype=dtype, device=device))


# For other tiles and calls, by their bytes: all tiles of a window but the first ones have one mask, which costs some
# milliseconds. The most that all take is 64 MiB.
_KEPT = ((2**20, remembered(32)(_made)), (2**23, remembered(4)(_made)))


def _bytes(tile: Tile, dtype: torch.dtype) -> int:
    heads = 1 if tile.masked_by is None else max(1, tile.masked_by.heads())
    return heads * tile.row_count * tile.key_count * dtype.itemsize


def tiled_by_look(mask: Tensor, q: Tensor, k: Tensor, worth: Worth | None = None) -> Tiled | None:
    """The tiles of a dense mask; None where they are not worth it."""
    tiling = tiling_of_dense(mask, q.shape[0], q.shape[2], k.shape[2], worth)
    return None if tiling is None else _sliced(mask, tiling, q)


def tiled_again(tiled: Tiled, q: Tensor, k: Tensor) -> Tiled:
    """The same tiles with masks for q as it is now: it may have been cast since."""
    if tiled.dtype is q.dtype:
        return tiled
    mask = tiled.mask
    return tiled_by_mask(mask, q, k) if isinstance(mask, Mask) else _sliced(mask, tiled.tiling, q)


def undivided(mask: Tensor, q: Tensor, k: Tensor) -> Tiled:
    """One tile of all."""
    (batch, _, q_len, _), kv_len = q.shape, k.shape[2]
    whole = Tile(slice(0, batch), slice(0, q_len), ((0, kv_len),), True)
    return _sliced(mask, tiling_of([whole], batch, q_len, kv_len), q)


def _sliced(mask: Tensor, tiling: Tiling, q: Tensor) -> Tiled:
    whole = as_4d(mask)

    def mask_of(tile: Tile) -> Tensor | None:
        if not tile.is_masked:
            return None
        rows = whole if whole.shape[2] == 1 else whole[:, :, tile.rows]
        return tile.of_keys(rows, 3)

    masked = [tile for tile in tiling.tiles if tile.is_masked]
    entries = [len(range(whole.shape[0])[tile.batch]) if whole.shape[0] > 1 else 1 for tile in masked]
    own = whole.shape[1] * sum(n * _bytes(tile, q.dtype) for n, tile in zip(entries, masked, strict=True))
    return Tiled(tiling, tiling.tiles, mask_of, mask, own, q.dtype)
