"""The tiling of a dense mask: what a caller's tensor hides, found by looking at it.

It is looked at in every call, as somebody may have written into it since. A few rows are looked at first: they tell a mask
that hides nothing worth while, and then no more is read.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastattn.problems.dense_masks import as_4d
from fastattn.problems.tilings.tile import GAP, Run, Tile, Tiling, rows_of_a_tile, tiling_of
from fastattn.problems.tilings.worth import Worth

# A float mask hides what it makes lower than this: no score that float32 holds comes up against it. finfo.min of bfloat16
# and float32 is below; that of float16 is not, as scores may come near it.
HIDES = -1e30
EVERY = 16  # of these rows one is looked at first
# Bytes of a block of rows: of a smaller one all is read for what needs no mask, in one step for all blocks (a step for each
# tile took five times as long in masks of 512 x 512); of a larger one the tile's own keys alone.
READ_AT_ONCE = 2**18


def tiling_of_dense(mask: Tensor, batch: int, q_len: int, kv_len: int, worth: Worth | None = None) -> Tiling | None:
    """The tiling of a bool or float mask that is broadcast to (batch, heads, q_len, kv_len).

    None where it is not worth it, or heads have masks of their own.
    """
    mask = _without_repeats(as_4d(mask.detach()))
    if mask.shape[1] > 1 or mask.shape[3] != kv_len or not (batch and q_len and kv_len):
        return None
    heads_mask = mask[:, 0]  # (b|1, q|1, k)
    size = rows_of_a_tile(q_len) if heads_mask.shape[1] > 1 else 1
    if worth is not None and not worth.allows(*_least_shares(heads_mask, size)):
        return None
    tiling = tiling_of(_tiles(heads_mask, size, batch, q_len), batch, q_len, kv_len)
    return tiling if worth is None or worth.has(tiling) else None


def hides_nothing(mask: Tensor) -> bool:
    """Whether a bool or float mask hides nothing and adds nothing; one that does is seldom read to its end."""
    mask = _without_repeats(as_4d(mask.detach()))
    return mask.numel() > 0 and all(_hides_nothing(part) for part in (mask[:, :, ::EVERY], mask))


def _without_repeats(mask: Tensor) -> Tensor:
    """The mask with one entry in each dimension along which it is repeated in memory (Tensor.expand)."""
    for dim in range(4):
        if mask.stride(dim) == 0 and mask.shape[dim] > 1:
            mask = mask.narrow(dim, 0, 1)
    return mask


def _blocks(mask: Tensor, size: int) -> list[Tensor]:
    """The mask as (b|1, blocks, rows, kv_len), in blocks of `size` rows and a last one of what is left."""
    mask = mask.view(torch.uint8) if mask.dtype is torch.bool else mask  # amax of bytes is ten times as fast as any()
    whole = mask.shape[1] // size * size
    parts = [mask[:, :whole].unflatten(1, (-1, size))] if whole else []
    return [*parts, mask[:, None, whole:]] if whole < mask.shape[1] else parts


def _by_blocks(mask: Tensor, size: int, *, closely: bool) -> tuple[Tensor, Tensor | None]:
    """(b|1, blocks, kv_len): whether some row of a block sees a key; and if closely, whether none needs a mask there."""
    blocks = _blocks(mask, size)
    highest = torch.cat([block.amax(2) for block in blocks], 1)
    seen = highest > 0 if mask.dtype is torch.bool else _hides(highest).logical_not_()  # a NaN is seen
    if not closely:
        return seen, None
    lowest = torch.cat([block.amin(2) for block in blocks], 1)  # apart: aminmax is many times as slow
    return seen, lowest > 0 if mask.dtype is torch.bool else (lowest == 0) & (highest == 0)


def _hides(x: Tensor) -> Tensor:
    """Where a float mask hides; float16 would take HIDES for -inf, which is not below itself."""
    return x.to(torch.float32) < HIDES


def _spans(seen: Tensor, free: Tensor | None) -> list[list[tuple[int, int, int, int]]]:
    """For each batch entry and block: (first key that is seen, last + 1, how many are, how many need no mask)."""
    kv_len = seen.shape[2]
    count = seen.sum(-1)
    some = (count > 0).long()
    bytes_ = seen.view(torch.uint8)
    first, last = bytes_.argmax(-1) * some, (kv_len - bytes_.flip(-1).argmax(-1)) * some
    return torch.stack([first, last, count, torch.zeros_like(count) if free is None else free.sum(-1)], -1).tolist()


def _least_shares(mask: Tensor, size: int) -> tuple[float, float]:
    """What share of all pairs lies in tiles at least, and in masked ones, by some of the rows.

    A tile with gaps holds what is seen, and gaps that are too small to leave out, which only a closer look tells.
    """
    entries, q_len, kv_len = mask.shape
    of_all = of_masked = 0
    for blocks in _spans(*_by_blocks(mask[:, ::EVERY], max(1, size // EVERY), closely=True)):
        for i, (first, last, count, frees) in enumerate(blocks):
            pairs = min(size, q_len - i * size) * (last - first if last - first - count < GAP else count)
            of_all += pairs
            of_masked += pairs if count > frees else 0
    pairs = max(1, entries * q_len * kv_len)
    return of_all / pairs, of_masked / pairs


def _tiles(mask: Tensor, size: int, batch: int, q_len: int) -> Iterator[Tile]:
    in_one = size * mask.shape[2] * mask.itemsize <= READ_AT_ONCE
    seen, free = _by_blocks(mask, size, closely=in_one)
    has_rows, every_key = mask.shape[1] > 1, ((0, mask.shape[2]),)
    for b, blocks in enumerate(_spans(seen, free)):
        entries = slice(0, batch) if mask.shape[0] == 1 else slice(b, b + 1)
        for i, (first, last, count, frees) in enumerate(blocks):
            rows = slice(i * size, min(q_len, (i + 1) * size)) if has_rows else slice(0, q_len)
            keys = _runs(seen[b, i]) if last - first - count >= GAP else ((first, last),)
            tile = Tile(entries, rows, keys, True)
            if mask.dtype is not torch.bool and _has_even_rows(tile, _rows(mask, b, rows)):
                yield tile._replace(keys=every_key)
            elif first < last:
                is_free = frees == tile.key_count if in_one else _hides_nothing(tile.of_keys(_rows(mask, b, rows)))
                yield tile._replace(is_masked=False) if is_free else tile


def _rows(mask: Tensor, b: int, rows: slice) -> Tensor:
    """(1, rows, kv_len) of a batch entry."""
    return mask[b : b + 1, rows if mask.shape[1] > 1 else slice(None)]


def _runs(seen: Tensor) -> tuple[Run, ...]:
    """Runs of keys that are seen, at least GAP apart."""
    keys = seen.nonzero().flatten()
    ends = (keys.diff() > GAP).nonzero().flatten()
    firsts = torch.cat([keys[:1], keys[ends + 1]]).tolist()
    lasts = torch.cat([keys[ends], keys[-1:]]).tolist()
    return tuple((first, last + 1) for first, last in zip(firsts, lasts, strict=True))


def _hides_nothing(part: Tensor) -> bool:
    """Whether a tile needs no mask."""
    if part.dtype is torch.bool:
        return bool(part.view(torch.uint8).amin())
    low, high = part.aminmax()
    return bool((low == 0) & (high == 0))


def _has_even_rows(tile: Tile, rows: Tensor) -> bool:
    """Whether a row is as low everywhere, and not -inf: softmax gives it even weights, over keys that no other row sees."""
    part = tile.of_keys(rows)
    low = _hides(part.amax(-1)) if part.shape[-1] else torch.ones(part.shape[:-1], dtype=torch.bool, device=part.device)
    return bool(low.any()) and bool((rows.amax(-1)[low] > float("-inf")).any())
