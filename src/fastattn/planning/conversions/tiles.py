"""Attention tile by tile: only those rectangles of the score matrix are computed in which a key is visible.

Each row has all its keys in one tile, so tiles need not be merged, and any kernel that can do a dense rectangle serves.
The backward is our own: slicing under autograd would allocate a whole gradient for each slice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.kernels.kernel import Arguments, Kernel, Run
from fastattn.planning.conversions.conversion import NO, OPTIONAL, REQUIRED
from fastattn.planning.conversions.double_backward import followed_gradients, must_be_followed
from fastattn.planning.conversions.mask_forms import when_mask_dense
from fastattn.planning.conversions.own_forms import takes_own_form
from fastattn.planning.conversions.tile_masks import Tiled, tiled_again, tiled_by_look, tiled_by_mask, undivided
from fastattn.planning.default_output import output_order
from fastattn.problems.call_facts import CallFacts
from fastattn.problems.layouts import empty_in_order
from fastattn.problems.length_buckets import DECODE_Q_LEN
from fastattn.problems.masks import Mask
from fastattn.problems.problem import Problem
from fastattn.problems.tilings.of_dense import hides_nothing, tiling_of_dense
from fastattn.problems.tilings.of_mask import tiling_of_mask
from fastattn.problems.tilings.tile import Tile, Tiling
from fastattn.problems.tilings.worth import Worth

ROWS = 256  # of queries at least: with fewer there is little to leave out
PAIRS = 2**18  # of a query and a key at least: below, finding tiles costs what they save
# of products of numbers, in each batch entry, where tiles are whole entries: a call each is then worth it
WORK = 2**21
KEPT = 2  # times the bytes of q, k, v and the output: the most that tiles hold until the backward


def may_be_tiled(p: Problem) -> bool:
    """Whether a dense mask of this kind may have a structure worth looking for. On CUDA to look would wait for the device."""
    has_keys = p.mask not in (None, "block") and "k" in p.mask_shape and not (p.is_banded or p.structure)
    one_for_all_heads = "h" not in p.mask_shape or p.mask_strides == "expanded"
    return p.device == "cpu" and has_keys and one_for_all_heads


def is_large(p: Problem) -> bool:
    """Whether leaving out may be worth the search for what to leave out."""
    if "b" in p.mask_shape and ("q" not in p.mask_shape or p.q_len <= DECODE_Q_LEN):
        return p.q_heads * p.q_len * p.kv_len * p.head_dim >= WORK
    return p.q_len >= ROWS and p.q_len * p.kv_len >= PAIRS


def when_tiles(kernel: Kernel, p: Problem, facts: CallFacts) -> str:
    is_told = bool(p.structure) or (p.is_banded and p.mask is None and when_mask_dense(kernel, p, facts) == REQUIRED)
    if p.is_unread or takes_own_form(kernel, p):
        return NO
    if p.dropout or p.mask_grad or not (is_told or may_be_tiled(p)):
        return NO
    if p.has_unread_keys or (is_told and "additive" in kernel.masks and p.dense_mask_bytes > p.memory_limit):
        return REQUIRED
    return OPTIONAL if kernel.tiles and is_large(p) else NO


def tiling_with(p: Problem, mask: Tensor | Mask | None) -> Tiling | None:
    """The tiling of a problem with this mask."""
    told = p.told_mask if mask is None else mask
    if isinstance(told, Mask):
        return tiling_of_mask(told, p.batch, p.q_len, p.kv_len)
    return tiling_of_dense(told, p.batch, p.q_len, p.kv_len) if told is not None else None


def tiles(step: Run, kernel: Kernel, p: Problem, facts: CallFacts) -> Run:
    order = output_order(p, facts)
    band = None if p.structure else p.told_mask

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Any, a: Arguments) -> Any:
        if isinstance(mask, Tiled):
            tiled = tiled_again(mask, q, k)
        elif isinstance(mask, Mask) or band is not None:
            tiled = tiled_by_mask(mask if isinstance(mask, Mask) else band, q, k)  # type: ignore[arg-type]
        else:
            tiled = tiled_by_look(mask, q, k) or undivided(mask, q, k)
        if isinstance(tiled.mask, Mask):
            a = a._replace(lower=None, upper=None)  # it is the band
        if not a.needs_grad:
            return _forward(step, order, tiled, q, k, v, a)
        found = _InTiles.apply(step, order, tiled, a, q, k, v)
        return found if a.lse else found[0]

    return run


def where_they_pay(tiled_step: Run, plain: Run, worth: Worth) -> Run:
    """Tiles where those of this very mask are worth it. One that hides nothing is none."""

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Any, a: Arguments) -> Any:
        if isinstance(mask, Mask):
            tiled = tiled_by_mask(mask, q, k)
            tiled = tiled if worth.has(tiled.tiling) else None
        else:
            tiled = tiled_by_look(mask, q, k, worth)
            mask = None if tiled is None and hides_nothing(mask) else mask
        return plain(q, k, v, mask, a) if tiled is None else tiled_step(q, k, v, tiled, a)  # type: ignore[arg-type]

    return run


def _forward(step: Run, order: Any, tiled: Tiled, q: Tensor, k: Tensor, v: Tensor, a: Arguments) -> Any:
    shape = (*q.shape[:3], v.shape[3])
    out = empty_in_order(q, shape, order)
    lse = q.new_empty(shape[:3], dtype=torch.float32) if a.lse else None
    if not tiled.tiling.has_every_row:
        out.zero_()
        if lse is not None:
            lse.fill_(float("-inf"))
    for tile in tiled.parts:
        found = step(tile.of_rows(q), tile.of_keys(k), tile.of_keys(v), tiled.mask_of(tile), a)
        if lse is not None:
            found, of_lse = found
            tile.put_rows(lse, of_lse)
        tile.put_rows(out, found)
    return out if lse is None else (out, lse)


class _InTiles(torch.autograd.Function):
    """Keeps the graph of each tile, or makes it again; the gradients of keys and values are added up in place."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, step: Run, order: Any, tiled: Tiled, a: Arguments, q: Tensor, k: Tensor, v: Tensor
    ) -> Any:
        ctx.save_for_backward(q, k, v)
        ctx.step, ctx.tiled, ctx.a = step, tiled, a._replace(lse=False)
        ctx.version = _version(tiled.mask)
        wanted, graphs = ctx.needs_input_grad[4:], []
        of_call = q.nbytes + k.nbytes + v.nbytes + math.prod(q.shape[:3]) * v.shape[3] * v.itemsize
        gathered = sum(x.gathered_bytes(kv) for x in tiled.parts if isinstance(x, Tile) for kv in (k, v))
        keeps = tiled.own_bytes + gathered <= KEPT * of_call

        def followed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
            graph, lse = _followed(step, q, k, v, mask, a, wanted)
            graphs.append(graph)
            return (graph[1].detach(), lse) if a.lse else graph[1].detach()

        found = _forward(followed if keeps else step, order, tiled, q, k, v, a)
        ctx.graphs = graphs if keeps else None
        out, lse = found if a.lse else (found, q.new_empty(0))
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        tiled, wanted = ctx.tiled, ctx.needs_input_grad[4:]
        graphs, ctx.graphs = ctx.graphs, None  # a second backward makes them again
        if graphs is None and ctx.version != _version(tiled.mask):
            raise RuntimeError("the mask was changed in place between this attention and its backward")
        if must_be_followed(grad):
            found = followed_gradients(q, k, v, tiled.mask, ctx.a, grad, (*wanted, False))
            return None, None, None, None, *list(found)[:3]
        # several tiles add to the same keys: their sum is rounded once
        wide = torch.promote_types(q.dtype, torch.float32)
        dq = torch.zeros_like(q)
        dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        with torch.autocast(q.device.type, enabled=False):  # the caller's may be on while its backward runs
            for i, tile in enumerate(tiled.parts):
                if graphs is not None:
                    inputs, out = graphs[i]
                    graphs[i] = None
                else:
                    part = (tile.of_rows(q), tile.of_keys(k), tile.of_keys(v), tiled.mask_of(tile))
                    inputs, out = _followed(ctx.step, *part, ctx.a, wanted)[0]
                asked = [x for x in inputs if x.requires_grad]
                found = iter(torch.autograd.grad(out, asked, tile.of_gradient(grad)))
                of_q, of_k, of_v = (next(found) if x.requires_grad else None for x in inputs)
                if of_q is not None:
                    tile.put_rows(dq, of_q)
                tile.add_to_keys(dk, of_k)
                tile.add_to_keys(dv, of_v)
        gradients = (dq, dk.to(k.dtype), dv.to(v.dtype))
        return (
            None,
            None,
            None,
            None,
            *(x if is_wanted else None for x, is_wanted in zip(gradients, wanted, strict=True)),
        )


def _followed(
    step: Run, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments, wanted: Sequence[bool]
) -> tuple[tuple[tuple[Tensor, ...], Tensor], Tensor | None]:
    """((inputs, output) of a tile with a graph of its own between them, log-sum-exp)."""
    q, k, v = (x.detach().requires_grad_(is_wanted) for x, is_wanted in zip((q, k, v), wanted, strict=True))
    with torch.enable_grad():
        found = step(q, k, v, mask, a)
    out, lse = found if a.lse else (found, None)
    return ((q, k, v), out), lse


def _version(mask: Tensor | Mask) -> int | None:
    """How often a mask was written into; None where nobody counts."""
    return None if isinstance(mask, Mask) or mask.is_inference() else mask._version
