"""Tiles of like size in one call: of many short sequences each would be a call that costs more than its work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.environment.remembered import remembered
from fastattn.environment.text import type_name
from fastattn.kernels.kernel import Arguments, Kernel, Run
from fastattn.planning.conversions.conversion import NO, OPTIONAL
from fastattn.planning.conversions.tile_masks import Tiled, own_mask_bytes, tiled_by_mask
from fastattn.planning.conversions.tiles import when_tiles
from fastattn.problems.call_facts import CallFacts
from fastattn.problems.dense_masks import additive
from fastattn.problems.length_buckets import canonical_batch, canonical_length
from fastattn.problems.masks import Mask, parse
from fastattn.problems.problem import Problem
from fastattn.problems.tilings.of_mask import tiling_of_mask
from fastattn.problems.tilings.stack import Stack, filled_up, of_like_size
from fastattn.problems.tilings.tile import Tile

MaskOf = Callable[[Tile], "Tensor | None"]
FEWER = 2  # times fewer calls that are worth a try: rows and keys are copied for it
LOOKED_AT = 1024, 4096  # rows and keys, and
ENTRIES_LOOKED_AT = 16  # batch entries: beyond them there is more of the same


def when_stacked(kernel: Kernel, p: Problem, facts: CallFacts) -> str:
    """Where it leaves so few calls that the copies may be worth it; all of a bucket is decided alike."""
    if not (p.structure and p.q_len and p.kv_len) or when_tiles(kernel, p, facts) == NO:
        return NO
    q_len, kv_len = canonical_length(p.q_len), canonical_length(p.kv_len)
    part = min(1.0, LOOKED_AT[0] / q_len, LOOKED_AT[1] / kv_len)
    rows = max(1, int(part * q_len))
    sizes = min(canonical_batch(p.batch), ENTRIES_LOOKED_AT), rows, rows if p.is_square else max(1, int(part * kv_len))
    bytes_each = _bytes_each(p.q_heads, p.kv_heads, p.head_dim + p.head_dim_v, p.torch_dtype)
    return OPTIONAL if _leaves_few_calls(p.structure, *sizes, bytes_each) else NO


@remembered(256)  # each kernel asks, in each miss
def _leaves_few_calls(structure: str, batch: int, q_len: int, kv_len: int, bytes_each: tuple[int, int, int]) -> bool:
    told = parse(structure).of_lengths(q_len, kv_len, torch.device("cpu"))
    if told.heads():
        return False
    alone, stacks = of_like_size(tiling_of_mask(told, batch, q_len, kv_len, 1).tiles, *bytes_each)
    return bool(stacks) and FEWER * (len(alone) + len(stacks)) <= len(tiling_of_mask(told, batch, q_len, kv_len).tiles)


def _bytes_each(q_heads: int, kv_heads: int, head_dims: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(of a row of q and of the output, of a key and its value, of a pair in the mask)."""
    return q_heads * head_dims * dtype.itemsize, kv_heads * head_dims * dtype.itemsize, dtype.itemsize


def stacked(step: Run, kernel: Kernel, p: Problem, facts: CallFacts) -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Any, a: Arguments) -> Any:
        told = mask.mask if isinstance(mask, Tiled) else mask  # that tiles pay may have been found out before
        assert isinstance(told, Mask), f"stacks are of a mask with a meaning, got {type_name(told)}"
        return step(q, k, v, _in_stacks(told, q, k, v), a)  # type: ignore[arg-type]

    return run


def _in_stacks(mask: Mask, q: Tensor, k: Tensor, v: Tensor) -> Tiled:
    """The tiles of a mask, small ones in stacks."""
    tiled = tiled_by_mask(mask, q, k, fewest=1)
    bytes_each = _bytes_each(q.shape[1], k.shape[1], q.shape[3] + v.shape[3], q.dtype)
    parts = _parts(mask, q.shape[0], q.shape[2], k.shape[2], bytes_each, q.dtype, q.device)

    def mask_of(part: Tile | Stack) -> Tensor | None:
        return part.mask if isinstance(part, Stack) else tiled.mask_of(part)

    own = own_mask_bytes([part for part in parts if not isinstance(part, Stack)], q.dtype)
    own += sum(part.bytes(*bytes_each) for part in parts if isinstance(part, Stack))
    return tiled._replace(parts=parts, mask_of=mask_of, own_bytes=own)


@remembered(2)  # a model asks for the same ones in each layer; they have a mebibyte and more
def _parts(
    mask: Mask,
    batch: int,
    q_len: int,
    kv_len: int,
    bytes_each: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tile | Stack, ...]:
    q, k = (torch.empty(batch, 1, n, 0, dtype=dtype, device=device) for n in (q_len, kv_len))
    tiled = tiled_by_mask(mask, q, k, fewest=1)
    alone, stacks = of_like_size(tiled.tiling.tiles, *bytes_each)
    with torch.inference_mode(False):
        return (*alone, *(_stack(tiles, tiled, q, k) for tiles in stacks))


def _stack(tiles: Sequence[Tile], tiled: Tiled, q: Tensor, k: Tensor) -> Stack:
    """Some tiles of a mask with a meaning as one; q and k say the lengths, the dtype and the device."""
    assert isinstance(tiled.mask, Mask)
    q_len, kv_len, device = q.shape[2], k.shape[2], q.device
    entries = torch.tensor([tile.batch.start for tile in tiles], dtype=torch.int64, device=device)
    rows, is_row = filled_up([(tile.rows.start, tile.rows.stop) for tile in tiles], device)
    keys, is_key = filled_up([tile.keys[0] for tile in tiles], device)
    mask = None
    if any(tile.is_masked for tile in tiles):
        mask = _one_for_all(tiles, tiled.mask_of)
        if mask is None or ((mask == 0) & is_row[..., None] & is_key.logical_not()[:, None]).any():
            at = entries[:, None, None], rows[:, :, None] + tiled.mask.offset(q_len, kv_len), keys[:, None]
            mask = additive(tiled.mask.sees(*at, kv_len) & is_key[:, None], q)[:, None]
        else:  # rows that fill up alone see keys that do
            mask = mask[None]
    elif not is_key.all():
        mask = additive(is_key[:, None], q)[:, None]
    if is_row.all():
        return Stack(entries, rows, keys, None, None, mask)
    return Stack(entries, rows, keys, is_row, is_row.flatten().nonzero()[:, 0], mask)


def _one_for_all(tiles: Sequence[Tile], mask_of: MaskOf) -> Tensor | None:
    """(1, rows, keys) of which each tile's mask is the upper left part; None where there is no such mask."""
    first = tiles[0]
    if first.masked_by is None or not first.masked_by.shifts():
        return None
    if len({(tile.masked_by, tile.keys[0][0] - tile.rows.start) for tile in tiles}) > 1:
        return None
    row, key = first.rows.start, first.keys[0][0]
    rows, keys = max(tile.row_count for tile in tiles), max(tile.key_count for tile in tiles)
    found = mask_of(first._replace(rows=slice(row, row + rows), keys=((key, key + keys),)))
    return None if found is None else found[0]
