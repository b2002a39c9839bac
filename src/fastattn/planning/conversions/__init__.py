"""Conversions: what must be done to the caller's tensors for a kernel. Each lives here once, as a row.

A row says when it applies to a kernel and a problem, and wraps a step (q, k, v, mask, arguments) -> out in another one
that converts on the way in and, where needed, on the way out. Rows stand in the order in which they are applied.
"""

from __future__ import annotations

from fastattn.kernels.kernel import Kernel
from fastattn.planning.conversions.conversion import Conversion
from fastattn.problems.problem import Problem

COPIES = ("contiguous", "by_heads", "chunks")  # worth trying, and not on top of tiles: these are small


def _is_told(kernel: Kernel, p: Problem) -> bool:
    """Whether a mask with a meaning says what is hidden."""
    return bool(p.structure)


def _is_half(kernel: Kernel, p: Problem) -> bool:
    return kernel.fp32 and p.dtype in ("float16", "bfloat16")


CONVERSIONS: tuple[Conversion, ...] = (
    Conversion("gathered", "the pages of each entry's cache in one piece", "own_forms", _is_told),
    Conversion("stacked", "small tiles of like size in one call", "tile_stacks", _is_told, requires="tiles"),
    Conversion(
        "tiles",
        "only the tiles of the scores that a mask leaves",
        "tiles",
        lambda kernel, p: p.is_masked,
        instead_of=COPIES,
        is_loop=True,
    ),
    Conversion(
        "packed",
        "told where packed sequences begin, in place of a mask",
        "own_forms",
        lambda kernel, p: kernel.load_packed and p.structure,
        is_own_form=True,
    ),
    Conversion(
        "cached",
        "told how much of a cache is filled, in place of a mask",
        "own_forms",
        lambda kernel, p: kernel.load_cached and p.structure,
        is_own_form=True,
    ),
    Conversion(
        "paged",
        "told the pages of a cache as well, and they stay where they are",
        "own_forms",
        lambda kernel, p: kernel.load_paged and p.structure,
        is_own_form=True,
    ),
    Conversion(
        "kept",
        "what a KVCache keeps in the kernel's own order, where only new tokens are written",
        "kept",
        lambda kernel, p: kernel.load_kept and p.kept,
        is_own_form=True,
    ),
    Conversion(
        "mask_dense",
        "the triangle or window as a dense mask",
        "mask_forms",
        lambda kernel, p: p.structure or p.is_banded,
    ),
    Conversion(
        "mask_blocks",
        "a mask as squares that are skipped or not",
        "mask_blocks",
        lambda kernel, p: kernel.mask_blocks and p.structure,
    ),
    Conversion(
        "mask_additive",
        "a bool mask as the float mask that is added",
        "mask_forms",
        lambda kernel, p: p.is_masked and kernel.masks and "bool" not in kernel.masks,
    ),
    Conversion(
        "gqa_fold",
        "the query group folded into rows",
        "heads",
        lambda kernel, p: kernel.gqa_fold and p.group > 1,
        spares="gqa_expand",
    ),
    Conversion(
        "gqa_expand",
        "keys and values repeated for each query head",
        "heads",
        lambda kernel, p: kernel.gqa is not True and p.group > 1,
    ),
    Conversion(
        "split_kv",
        "the keys in parts, for each thread some",
        "kv_parts",
        lambda kernel, p: kernel.split_kv and p.batch == 1,
    ),
    Conversion(
        "pad_lengths",
        "keys padded to a multiple of 32",
        "kv_len",
        lambda kernel, p: kernel.pad_lengths and p.dtype == "bfloat16",
        instead_of=("contiguous", "by_heads", "fp32"),
    ),
    Conversion(
        "contiguous",
        "q, k, v copied to dense memory",
        "memory_layout",
        lambda kernel, p: not kernel.dense and (kernel.aligned or set(p.strides) != {"contiguous"}),
    ),
    Conversion("by_heads", "a few heads at a time", "blocks", _is_half, requires="fp32", is_loop=True),
    Conversion("fp32", "cast to float32, the output back", "dtype", _is_half),
    Conversion(
        "head_dim_pad",
        "head dims padded with zeros",
        "head_dim",
        lambda kernel, p: (
            kernel.head_dims
            or max(kernel.head_dim_multiple, kernel.head_dim_bytes) > 1
            or (kernel.equal_head_dims and p.head_dim != p.head_dim_v)
        ),
    ),
    Conversion(
        "dense",
        "q, k, v copied to dense memory in the kernel's layout",
        "memory_layout",
        lambda kernel, p: kernel.dense,
    ),
    Conversion(
        "recompute",
        "in blocks; the backward makes each block's scores again",
        "recompute",
        lambda kernel, p: kernel.load_backward and p.needs_grad,
        is_loop=True,
    ),
    Conversion(
        "chunks", "cut into blocks of heads and query rows", "blocks", lambda kernel, p: kernel.chunks, is_loop=True
    ),
)
BY_NAME = {c.name: c for c in CONVERSIONS}
IN_BLOCKS = frozenset(c.name for c in CONVERSIONS if c.is_loop)
OWN_FORMS = frozenset(c.name for c in CONVERSIONS if c.is_own_form)


def as_applied(names: tuple[str, ...], p: Problem) -> tuple[str, ...]:
    """Names of conversions as they are applied: as the rows stand, but in training all is cast before it is cut into tiles.

    Each tile would keep a cast copy of the keys that it shares with others. Without gradients no copy outlives its tile.
    """
    if not ({"tiles", "fp32"} <= {*names} and p.needs_grad) or p.mask in ("float16", "bfloat16"):
        return names  # of a mask in half precision a tile casts its part
    return ("fp32", *(name for name in names if name != "fp32"))
