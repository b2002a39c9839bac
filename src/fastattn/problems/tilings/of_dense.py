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


def tiling_of_dense(mask: Tensor, batch: int, q_len: int, kv_len: int, worth: Worth | None = None) -> Tiling | None:
    """The tiling of a bool or float mask that is broadcast to (batch, heads, q_len, kv_len).

    None where it is not worth it, or heads have masks of their own.
    """
    mask = _without_repeats(as_4d(mask.detach()))
    if mask.shape[1] > 1 or mask.shape[3] != kv_len or not (batch and q_len and kv_len):
        return None
    heads_mask = mask[:, 0]  # (b|1, q|1, k)
    size = rows_of_a_tile(q_len) if heads_mask.shape[1] > 1 else 1
    if worth is not None and not worth.allows(*_least_shares(heads_mask[:, ::EVERY], max(1, size // EVERY))):
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


def _by_blocks(mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(b|1, blocks, kv_len): whether some row of a block of `size` rows sees a key, and whether none needs a mask there."""
    whole = mask.shape[1] // size * size
    parts = [mask[:, :whole].unflatten(1, (-1, size))] if whole else []
    parts += [mask[:, None, whole:]] if whole < mask.shape[1] else []
    if mask.dtype is torch.bool:  # amax of bytes is ten times as fast as any() of bools
        parts = [part.view(torch.uint8) for part in parts]
    highest = torch.cat([part.amax(2) for part in parts], 1)
    lowest = torch.cat([part.amin(2) for part in parts], 1)  # apart: aminmax of bytes is ten times as slow
    if mask.dtype is torch.bool:
        return highest > 0, lowest > 0
    return (highest < HIDES).logical_not_(), (lowest == 0) & (highest == 0)  # a NaN is seen


def _spans(seen: Tensor, free: Tensor) -> list[list[tuple[int, int, int, int]]]:
    """For each batch entry and block: (first key that is seen, last + 1, how many are, how many need no mask)."""
    kv_len = seen.shape[2]
    count = seen.sum(-1)
    some = (count > 0).long()
    bytes_ = seen.view(torch.uint8)
    first, last = bytes_.argmax(-1) * some, (kv_len - bytes_.flip(-1).argmax(-1)) * some
    return torch.stack([first, last, count, free.sum(-1)], -1).tolist()


def _least_shares(rows: Tensor, size: int) -> tuple[float, float]:
    """What share of all pairs would lie in tiles at least, and in masked ones, by some of the rows.

    A gap in the middle may leave out more, which only a closer look tells.
    """
    seen, free = _by_blocks(rows, size)
    of_tiles = [
        (min(last - first, count + GAP), count > frees)
        for blocks in _spans(seen, free)
        for first, last, count, frees in blocks
    ]
    pairs = seen.numel()
    return sum(keys for keys, _ in of_tiles) / pairs, sum(keys for keys, is_masked in of_tiles if is_masked) / pairs


def _tiles(mask: Tensor, size: int, batch: int, q_len: int) -> Iterator[Tile]:
    seen, free = _by_blocks(mask, size)
    has_rows, every_key = mask.shape[1] > 1, ((0, mask.shape[2]),)
    for b, blocks in enumerate(_spans(seen, free)):
        entries = slice(0, batch) if mask.shape[0] == 1 else slice(b, b + 1)
        for i, (first, last, count, frees) in enumerate(blocks):
            rows = slice(i * size, min(q_len, (i + 1) * size)) if has_rows else slice(0, q_len)
            keys = _runs(seen[b, i]) if last - first - count >= GAP else ((first, last),)
            tile = Tile(entries, rows, keys, True)
            if mask.dtype is not torch.bool and _has_even_rows(
                tile, mask[b : b + 1, rows if has_rows else slice(None)]
            ):
                yield tile._replace(keys=every_key)
            elif first < last:
                yield tile._replace(is_masked=frees < tile.key_count)


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
    low = part.amax(-1) < HIDES if part.shape[-1] else torch.ones(part.shape[:-1], dtype=torch.bool, device=part.device)
    return bool(low.any()) and bool((rows.amax(-1)[low] > float("-inf")).any())
