"""Attention tile by tile: only those rectangles of the score matrix are computed in which a key is visible.

Each row has all its keys in one tile, so tiles need not be merged, and any kernel that can do a dense rectangle serves.
The backward is our own: slicing under autograd would allocate a whole gradient for each slice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.kernels.kernel import Arguments, Kernel, Run
from fastattn.planning.conversions.conversion import NO, OPTIONAL, REQUIRED
from fastattn.planning.conversions.double_backward import followed_gradients, must_be_followed
from fastattn.planning.conversions.mask_forms import when_mask_dense
from fastattn.planning.default_output import output_order
from fastattn.problems.call_facts import CallFacts
from fastattn.problems.dense_masks import additive
from fastattn.problems.layouts import empty_in_order
from fastattn.problems.masks import Mask
from fastattn.problems.problem import Problem
from fastattn.problems.tilings.of_dense import tiling_of_dense
from fastattn.problems.tilings.of_mask import hiding, tiling_of_mask
from fastattn.problems.tilings.tile import Tile, Tiling

ROWS = 256  # of queries at least: with fewer there is little to leave out
PAIRS = 2**18  # of a query and a key at least: below, finding tiles costs what they save


class Tiled(NamedTuple):
    """A mask and the tiling that was found for it. of: the mask of a tile, (b|1, h|1, rows, keys)."""

    tiling: Tiling
    of: Callable[[Tile], Tensor | None]
    mask: Tensor | Mask | None


def may_be_tiled(p: Problem) -> bool:
    """Whether a dense mask of this kind may have a structure worth looking for. On CUDA to look would wait for the device."""
    has_keys = p.mask not in (None, "block") and "k" in p.mask_shape and not (p.is_banded or p.structure)
    one_for_all_heads = "h" not in p.mask_shape or p.mask_strides == "expanded"
    return p.device == "cpu" and has_keys and one_for_all_heads


def when_tiles(kernel: Kernel, p: Problem, facts: CallFacts) -> str:
    is_told = bool(p.structure) or (p.is_banded and p.mask is None and when_mask_dense(kernel, p, facts) == REQUIRED)
    if p.dropout or p.mask_grad or not (is_told or may_be_tiled(p)):
        return NO
    if is_told and "additive" in kernel.masks and p.dense_mask_bytes > p.memory_limit:
        return REQUIRED
    is_large = p.q_len >= ROWS and p.q_len * p.kv_len >= PAIRS
    return OPTIONAL if kernel.tiles and is_large else NO


def share_in_tiles(p: Problem, mask: Tensor | Mask | None) -> float | None:
    """Of all pairs of a problem with this mask, the share that lies in tiles."""
    told = p.told_mask if mask is None else mask
    if isinstance(told, Mask):
        return round(tiling_of_mask(told, p.batch, p.q_len, p.kv_len).share, 4)
    tiling = tiling_of_dense(told, p.batch, p.q_len, p.kv_len) if told is not None else None
    return None if tiling is None else round(tiling.share, 4)


def in_tiles(step: Run, kernel: Kernel, p: Problem, facts: CallFacts) -> Run:
    order = output_order(p, facts)
    band = None if p.structure else p.told_mask

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Any, a: Arguments) -> Any:
        told = band if mask is None else mask
        if isinstance(told, Mask):
            tiled, a = _told(told, q, k), a._replace(lower=None, upper=None)
        else:
            tiled = told if isinstance(told, Tiled) else _look(told, q, k)
            assert tiled is not None, "without a limit there always is a tiling, unless heads have masks of their own"
        if not a.needs_grad:
            return _forward(step, order, tiled, q, k, v, a)
        found = _InTiles.apply(step, order, tiled, a, q, k, v)
        return found if a.lse else found[0]

    return run


def _told(mask: Mask, q: Tensor, k: Tensor) -> Tiled:
    (batch, _, q_len, _), kv_len = q.shape, k.shape[2]
    offset, made = mask.offset(q_len, kv_len), {}
    bias_dtype = torch.promote_types(q.dtype, torch.float32)

    def of(tile: Tile) -> Tensor | None:
        if not tile.is_masked:
            return None
        rest = hiding(mask, tile, q_len, kv_len)
        # tiles that lie alike to the diagonal have one mask, where a distance says all
        start = tile.rows.start + offset if rest.shifts() else 0
        where = (rest, tile.row_count, tile.rows.step, tile.batch.start if rest.is_per_batch() else 0,
                 tile.rows.start + offset - start, *(key - start for pair in tile.keys for key in pair))  # fmt: skip
        if where not in made:
            p, j = (
                torch.tensor(numbers, dtype=torch.int64, device=q.device)
                for numbers in (tile.positions(offset), tile.key_numbers())
            )
            part = rest.part(range(batch)[tile.batch], p, j, kv_len)
            made[where] = additive(part, q) if part.dtype is torch.bool else part.to(bias_dtype)
        return made[where]

    return Tiled(tiling_of_mask(mask, batch, q_len, kv_len), of, mask)


def where_they_pay(tiled_step: Run, plain: Run, most: float) -> Run:
    """Tiles where they leave out enough of this very mask: a share of `most` of all pairs lies in them at most."""

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        tiled = _look(mask, q, k, most)
        return plain(q, k, v, mask, a) if tiled is None else tiled_step(q, k, v, tiled, a)  # type: ignore[arg-type]

    return run


def _look(mask: Any, q: Tensor, k: Tensor, most: float = 1.0) -> Tiled | None:
    tiling = tiling_of_dense(mask, q.shape[0], q.shape[2], k.shape[2], most)
    if tiling is None or tiling.share > most:
        return None

    def of(tile: Tile) -> Tensor | None:
        if not tile.is_masked:
            return None
        rows = mask if mask.shape[2] == 1 else mask[:, :, tile.rows]
        return tile.of_keys(rows, 3)

    return Tiled(tiling, of, mask)


def _forward(step: Run, order: Any, tiled: Tiled, q: Tensor, k: Tensor, v: Tensor, a: Arguments) -> Any:
    shape = (*q.shape[:3], v.shape[3])
    out = empty_in_order(q, shape, order)
    lse = q.new_empty(shape[:3], dtype=torch.float32) if a.lse else None
    if not tiled.tiling.has_every_row:
        out.zero_()
        if lse is not None:
            lse.fill_(float("-inf"))
    for tile in tiled.tiling.tiles:
        found = step(q[tile.query], tile.of_keys(k), tile.of_keys(v), tiled.of(tile), a)
        if lse is not None:
            found, lse[tile.query] = found
        out[tile.query] = found
    return out if lse is None else (out, lse)


class _InTiles(torch.autograd.Function):
    """Keeps the graph of each tile; the gradients of keys and values are added up in place."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, step: Run, order: Any, tiled: Tiled, a: Arguments, q: Tensor, k: Tensor, v: Tensor
    ) -> Any:
        wanted = ctx.needs_input_grad[4:]
        ctx.parts = []
        ctx.save_for_backward(q, k, v)

        def followed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
            q, k, v = (x.detach().requires_grad_(is_wanted) for x, is_wanted in zip((q, k, v), wanted, strict=True))
            with torch.enable_grad():
                found = step(q, k, v, mask, a)
            ctx.parts.append(((q, k, v), found[0] if a.lse else found))
            return (found[0].detach(), found[1]) if a.lse else found.detach()

        found = _forward(followed, order, tiled, q, k, v, a)
        ctx.tiled, ctx.a = tiled, a._replace(lse=False)
        ctx.version = tiled.mask._version if isinstance(tiled.mask, Tensor) else None
        out, lse = found if a.lse else (found, q.new_empty(0))
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        wanted = ctx.needs_input_grad[4:]
        if must_be_followed(grad):
            mask = ctx.tiled.mask
            if isinstance(mask, Tensor) and mask._version != ctx.version:
                raise RuntimeError("the mask was changed in place between this attention and its backward")
            found = followed_gradients(q, k, v, mask, ctx.a, grad, (*wanted, False))
            return None, None, None, None, *list(found)[:3]
        # several tiles add to the same keys: their sum is rounded once
        wide = torch.promote_types(q.dtype, torch.float32)
        dq = torch.zeros_like(q)
        dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        with torch.autocast(q.device.type, enabled=False):  # the caller's may be on while its backward runs
            for tile, (inputs, out) in zip(ctx.tiled.tiling.tiles, ctx.parts, strict=True):
                asked = [x for x in inputs if x.requires_grad]
                found = iter(torch.autograd.grad(out, asked, grad[tile.query], retain_graph=True))
                of_q, of_k, of_v = (next(found) if x.requires_grad else None for x in inputs)
                if of_q is not None:
                    dq[tile.query] = of_q
                tile.add_to_keys(dk, of_k)
                tile.add_to_keys(dv, of_v)
        given = (dq, dk.to(k.dtype), dv.to(v.dtype))
        return None, None, None, None, *(x if is_wanted else None for x, is_wanted in zip(given, wanted, strict=True))
