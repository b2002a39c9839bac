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

# A float mask hides what it makes lower than this: no score that float32 holds comes up against it. finfo.min of bfloat16
# and float32 is below; that of float16 is not, as scores may come near it.
HIDES = -1e30
EVERY = 16  # of these rows one is looked at first


def tiling_of_dense(mask: Tensor, batch: int, q_len: int, kv_len: int, most: float = 1.0) -> Tiling | None:
    """The tiling of a bool or float mask that is broadcast to (batch, heads, q_len, kv_len).

    None where it does not pay: more than the share `most` of all pairs would lie in tiles, or heads have masks of their own.
    """
    mask = _without_repeats(as_4d(mask.detach()))
    if mask.shape[1] > 1 or mask.shape[3] != kv_len or not (batch and q_len and kv_len):
        return None
    heads_mask = mask[:, 0]  # (b|1, q|1, k)
    size = rows_of_a_tile(q_len) if heads_mask.shape[1] > 1 else 1
    if most < 1.0:
        first = _seen_by_blocks(heads_mask[:, ::EVERY], max(1, size // EVERY))
        if _share(_spans(first), first.shape[0] * first.shape[1] * kv_len) > most:
            return None
    seen = _seen_by_blocks(heads_mask, size)
    return tiling_of(_tiles(heads_mask, seen, size, batch, q_len), batch, q_len, kv_len)


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


def _seen_by_blocks(mask: Tensor, size: int) -> Tensor:
    """(b|1, blocks, kv_len) bool: whether some row of each block of `size` rows sees a key."""
    whole = mask.shape[1] // size * size
    parts = [mask[:, :whole].unflatten(1, (-1, size))] if whole else []
    parts += [mask[:, None, whole:]] if whole < mask.shape[1] else []
    if mask.dtype is torch.bool:  # amax of bytes is ten times as fast as any() of bools
        return torch.cat([part.view(torch.uint8).amax(2) for part in parts], 1) > 0
    highest = torch.cat([part.amax(2) for part in parts], 1)
    return (highest < HIDES).logical_not_()  # a NaN is seen


def _spans(seen: Tensor) -> list[list[tuple[int, int, int]]]:
    """For each batch entry and block: (first key that is seen, last + 1, how many are); all 0 where none is."""
    kv_len = seen.shape[2]
    count = seen.sum(-1)
    some = (count > 0).long()
    bytes_ = seen.view(torch.uint8)
    first, last = bytes_.argmax(-1) * some, (kv_len - bytes_.flip(-1).argmax(-1)) * some
    return torch.stack([first, last, count], -1).tolist()


def _share(spans: list[list[tuple[int, int, int]]], pairs: int) -> float:
    """What share of all would lie in tiles; a gap in the middle may leave out more, which only a closer look tells."""
    return sum(min(last - first, count + GAP) for blocks in spans for first, last, count in blocks) / pairs


def _tiles(mask: Tensor, seen: Tensor, size: int, batch: int, q_len: int) -> Iterator[Tile]:
    has_rows, every_key = mask.shape[1] > 1, ((0, mask.shape[2]),)
    for b, blocks in enumerate(_spans(seen)):
        entries = slice(0, batch) if mask.shape[0] == 1 else slice(b, b + 1)
        for i, (first, last, count) in enumerate(blocks):
            rows = slice(i * size, min(q_len, (i + 1) * size)) if has_rows else slice(0, q_len)
            of_rows = mask[b : b + 1, rows if has_rows else slice(None)]
            keys = _runs(seen[b, i]) if last - first - count >= GAP else ((first, last),)
            tile = Tile(entries, rows, keys, True)
            part = tile.of_keys(of_rows)
            if _has_even_rows(part, of_rows):
                yield tile._replace(keys=every_key)
            elif first < last:
                yield tile._replace(is_masked=not _hides_nothing(part))


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


def _has_even_rows(part: Tensor, rows: Tensor) -> bool:
    """Whether a row is as low everywhere, and not -inf: softmax gives it even weights, over keys that no other row sees."""
    if part.dtype is torch.bool:
        return False
    low = part.amax(-1) < HIDES if part.shape[-1] else torch.ones(part.shape[:-1], dtype=torch.bool, device=part.device)
    return bool(low.any()) and bool((rows.amax(-1)[low] > float("-inf")).any())
