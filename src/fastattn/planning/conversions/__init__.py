"""Conversions: what must be done to the caller's tensors for a kernel. Each lives here once, as a row.

A row says when it applies to a kernel and a problem, and wraps a step (q, k, v, mask, arguments) -> out in another one
that converts on the way in and, where needed, on the way out. Rows stand in the order in which they are applied.
"""

from __future__ import annotations

from fastattn.planning.conversions import blocks
from fastattn.planning.conversions.conversion import Conversion
from fastattn.planning.conversions.dtype import fp32, when_by_heads, when_fp32
from fastattn.planning.conversions.head_dim import pad_head_dims, when_pad
from fastattn.planning.conversions.heads import gqa_expand, gqa_fold, when_gqa_expand, when_gqa_fold
from fastattn.planning.conversions.kv_len import pad_lengths, when_pad_lengths
from fastattn.planning.conversions.kv_parts import split_kv, when_split_kv
from fastattn.planning.conversions.mask_blocks import mask_blocks, when_mask_blocks
from fastattn.planning.conversions.mask_forms import mask_additive, mask_dense, when_mask_additive, when_mask_dense
from fastattn.planning.conversions.memory_layout import contiguous, dense, when_contiguous, when_dense
from fastattn.planning.conversions.own_forms import (
    cached,
    gathered,
    packed,
    paged,
    when_cached,
    when_gathered,
    when_packed,
    when_paged,
)
from fastattn.planning.conversions.recompute import recompute, when_recompute
from fastattn.planning.conversions.tile_stacks import stacked, when_stacked
from fastattn.planning.conversions.tiles import in_tiles, when_tiles
from fastattn.problems.problem import Problem

COPIES = ("contiguous", "by_heads", "chunks")  # worth trying, and not on top of tiles: these are small

CONVERSIONS: tuple[Conversion, ...] = (
    Conversion("gathered", "the pages of each entry's cache in one piece", when_gathered, gathered),
    Conversion("stacked", "small tiles of like size in one call", when_stacked, stacked, requires="tiles"),
    Conversion("tiles", "only the tiles of the scores that a mask leaves", when_tiles, in_tiles, instead_of=COPIES),
    Conversion("packed", "told where packed sequences begin, in place of a mask", when_packed, packed),
    Conversion("cached", "told how much of a cache is filled, in place of a mask", when_cached, cached),
    Conversion("paged", "told the pages of a cache as well, and they stay where they are", when_paged, paged),
    Conversion("mask_dense", "the triangle or window as a dense mask", when_mask_dense, mask_dense),
    Conversion("mask_blocks", "a mask as squares that are skipped or not", when_mask_blocks, mask_blocks),
    Conversion("mask_additive", "a bool mask as the float mask that is added", when_mask_additive, mask_additive),
    Conversion("gqa_fold", "the query group folded into rows", when_gqa_fold, gqa_fold),
    Conversion("gqa_expand", "keys and values repeated for each query head", when_gqa_expand, gqa_expand),
    Conversion("split_kv", "the keys in parts, for each thread some", when_split_kv, split_kv),
    Conversion(
        "pad_lengths",
        "keys padded to a multiple of 32",
        when_pad_lengths,
        pad_lengths,
        instead_of=("contiguous", "by_heads", "fp32"),
    ),
    Conversion("contiguous", "q, k, v copied to dense memory", when_contiguous, contiguous),
    Conversion("by_heads", "a few heads at a time", when_by_heads, blocks.by_heads, requires="fp32"),
    Conversion("fp32", "cast to float32, the output back", when_fp32, fp32),
    Conversion("head_dim_pad", "head dims padded with zeros", when_pad, pad_head_dims),
    Conversion("dense", "q, k, v copied to dense memory in the kernel's layout", when_dense, dense),
    Conversion("recompute", "in blocks; the backward makes each block's scores again", when_recompute, recompute),
    Conversion("chunks", "cut into blocks of heads and query rows", blocks.when_chunks, blocks.chunks),
)
BY_NAME = {c.name: c for c in CONVERSIONS}


def in_order(names: tuple[str, ...], p: Problem) -> tuple[str, ...]:
    """Names of conversions as they are applied: as the rows stand, but in training all is cast before it is cut into tiles.

    Each tile would keep a cast copy of the keys that it shares with others. Without gradients no copy outlives its tile.
    """
    if not ({"tiles", "fp32"} <= {*names} and p.needs_grad) or p.mask in ("float16", "bfloat16"):
        return names  # of a mask in half precision a tile casts its part
    return ("fp32", *(name for name in names if name != "fp32"))
