"""Conversions: what must be done to the caller's tensors for a kernel. Each lives here once, as a row.

A row says when it applies to a kernel and a problem, and wraps a step (q, k, v, mask, arguments) -> out in another one
that converts on the way in and, where needed, on the way out. Rows stand in the order in which they are applied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastattn.kernels.kernel import Arguments, Kernel, Run
from fastattn.planning.conversions import blocks
from fastattn.planning.conversions.blocks import NO, OPTIONAL, REQUIRED
from fastattn.planning.conversions.recompute import recompute, when_recompute
from fastattn.problems import masks
from fastattn.problems.layouts import from_bhsd, to_bhsd
from fastattn.problems.problem import Problem


@dataclass(frozen=True, slots=True)
class Conversion:
    """`when(kernel, problem)` answers NO, OPTIONAL, REQUIRED or a reason; `wrap(step, kernel, problem)` makes the step."""

    name: str
    summary: str
    when: Callable[[Kernel, Problem], str]
    wrap: Callable[[Run, Kernel, Problem], Run]
    beside: str = ""  # another conversion, without which this one is worth nothing


def on_out(
    result: Any, change: Callable[[Tensor], Tensor], change_lse: Callable[[Tensor], Tensor] | None = None
) -> Any:
    """What a step returned with its output changed: the output alone, or (out, lse)."""
    if not isinstance(result, tuple):
        return change(result)
    out, lse = result
    return change(out), lse if change_lse is None else change_lse(lse)


# --- mask forms


def _draws(kernel: Kernel, p: Problem) -> bool:
    """Whether it draws this triangle or window itself; on a square problem both corners coincide."""
    if p.window is not None and not kernel.window:
        return False
    if p.causal is None and p.window is None:
        return True
    corner = kernel.corner in (p.causal or "top_left", "any") or bool(kernel.corner and p.q_len == p.kv_len)
    return corner and p.scale in kernel.causal_scales


def _when_mask_dense(kernel: Kernel, p: Problem) -> str:
    if not p.is_banded or (_draws(kernel, p) and (p.mask is None or kernel.mask_and_causal)):
        return NO
    if kernel.masks:
        return REQUIRED
    if p.window is not None and not kernel.window:
        return f"a window is not supported ({p.window[0]}, {p.window[1]})"
    if kernel.corner is None:
        return NO  # no triangle at all: candidates.py says so
    if p.mask is not None:
        return "a mask together with causal is not supported"
    if p.scale not in kernel.causal_scales:
        return f"causal with a scale that is {p.scale}, not {' or '.join(kernel.causal_scales)}"
    return f"causal {p.causal} with q_len {p.q_len} != kv_len {p.kv_len}, it draws {kernel.corner}"


def _mask_dense(step: Run, kernel: Kernel, p: Problem) -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        seen = masks.visible(q, q.shape[2], k.shape[2], a.lower, a.upper)
        return step(q, k, v, masks.intersect(mask, seen), a._replace(lower=None, upper=None))

    return run


def _is_bool_mask(kernel: Kernel, p: Problem) -> bool:
    return p.mask == "bool" or (p.mask is None and _when_mask_dense(kernel, p) == REQUIRED)


def _when_mask_additive(kernel: Kernel, p: Problem) -> str:
    return REQUIRED if _is_bool_mask(kernel, p) and "bool" not in kernel.masks and kernel.masks else NO


def _mask_additive(step: Run, kernel: Kernel, p: Problem) -> Run:
    return lambda q, k, v, mask, a: step(q, k, v, masks.additive(mask, q) if mask is not None else None, a)


# --- heads


def _can_fold(p: Problem) -> bool:
    """Rows of one kv head's queries may be stacked where no row needs to know its own index."""
    return p.group > 1 and not p.is_banded and (p.q_len == 1 or p.mask is None)


def _when_gqa_fold(kernel: Kernel, p: Problem) -> str:
    return OPTIONAL if kernel.gqa_fold and _can_fold(p) else NO


def _gqa_fold(step: Run, kernel: Kernel, p: Problem) -> Run:
    group = p.group

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        b, h, s, d = q.shape
        folded = q.reshape(b, h // group, group * s, d)
        if mask is not None and mask.dim() == 4 and mask.shape[1] > 1:
            mask = mask.reshape(mask.shape[0], h // group, group, mask.shape[3])
        found = step(folded, k, v, mask, a)
        return on_out(found, lambda out: out.reshape(b, h, s, v.shape[3]), lambda lse: lse.reshape(b, h, s))

    return run


def _when_gqa_expand(kernel: Kernel, p: Problem) -> str:
    return REQUIRED if p.group > 1 and not kernel.gqa else NO


def _gqa_expand(step: Run, kernel: Kernel, p: Problem) -> Run:
    group = p.group

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        return step(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), mask, a)

    return run


# --- memory


def _when_contiguous(kernel: Kernel, p: Problem) -> str:
    if kernel.dense:
        return NO  # once, when all else is done
    if (kernel.dense_last_dim and "other" in p.strides) or (kernel.no_broadcast and "expanded" in p.strides):
        return REQUIRED
    if kernel.aligned and not (p.aligned and p.aligned_rows) and not _pads_all(kernel, p):
        return REQUIRED
    # A copy pays only if keys and values are read more than a few times.
    worth = kernel.contiguous and p.q_len >= 64 and set(p.strides) != {"contiguous"}
    return OPTIONAL if worth else NO


def _contiguous(step: Run, kernel: Kernel, p: Problem) -> Run:
    def dense(x: Tensor) -> Tensor:  # dense memory may still start where it should not
        return x.contiguous() if p.aligned else x.clone(memory_format=torch.contiguous_format)

    return lambda q, k, v, mask, a: step(dense(q), dense(k), dense(v), mask, a)


# --- dtypes


def _when_fp32(kernel: Kernel, p: Problem) -> str:
    if p.dtype in ("float16", "bfloat16") and kernel.fp32:
        return OPTIONAL if p.dtype in kernel.dtypes else REQUIRED
    return NO


def _fp32(step: Run, kernel: Kernel, p: Problem) -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        if mask is not None and mask.dtype is not torch.bool:
            mask = mask.float()
        return on_out(step(q.float(), k.float(), v.float(), mask, a), lambda out: out.to(q.dtype))

    return run


def _when_by_heads(kernel: Kernel, p: Problem) -> str:
    return OPTIONAL if _when_fp32(kernel, p) != NO and blocks.are_copies_all(p) else NO


# --- head dims


def _widths(kernel: Kernel, p: Problem) -> tuple[int, int]:
    multiple = kernel.head_dim_multiple
    width, width_v = (-(-d // multiple) * multiple for d in (p.head_dim, p.head_dim_v))
    widest = max(width, width_v)
    return (widest, widest) if kernel.equal_head_dims else (width, width_v)


def _pads_all(kernel: Kernel, p: Problem) -> bool:
    width, width_v = _widths(kernel, p)
    return width > p.head_dim and width_v > p.head_dim_v


def _when_pad(kernel: Kernel, p: Problem) -> str:
    return NO if _widths(kernel, p) == (p.head_dim, p.head_dim_v) else REQUIRED


def _pad(step: Run, kernel: Kernel, p: Problem) -> Run:
    width, width_v = _widths(kernel, p)
    more, more_v, head_dim_v = width - p.head_dim, width_v - p.head_dim_v, p.head_dim_v

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        if more:  # zeros add nothing to q k^T; the scale was taken from the caller's head_dim
            q, k = pad(q, (0, more)), pad(k, (0, more))
        if more_v:
            return on_out(step(q, k, pad(v, (0, more_v)), mask, a), lambda out: out[..., :head_dim_v])
        return step(q, k, v, mask, a)

    return run


# --- dense memory in the kernel's own layout

_DENSE = {"bhsd": "contiguous", "bshd": "transposed", "sbhd": "seq_first"}  # layout -> stride class


def _when_dense(kernel: Kernel, p: Problem) -> str:
    if not kernel.dense:
        return NO
    lies_so = set(p.strides) == {_DENSE[kernel.layout]} and (p.aligned or not kernel.aligned)
    is_made_anew = REQUIRED in (_when_pad(kernel, p), _when_gqa_expand(kernel, p))
    return NO if lies_so and not is_made_anew else REQUIRED


def _dense(step: Run, kernel: Kernel, p: Problem) -> Run:
    layout = kernel.layout

    def dense(x: Tensor) -> Tensor:
        x = from_bhsd(x, layout)
        return to_bhsd(x.contiguous() if p.aligned else x.clone(memory_format=torch.contiguous_format), layout)

    return lambda q, k, v, mask, a: step(dense(q), dense(k), dense(v), mask, a)


CONVERSIONS: tuple[Conversion, ...] = (
    Conversion("mask_dense", "the triangle or window as a dense mask", _when_mask_dense, _mask_dense),
    Conversion("mask_additive", "a bool mask as the float mask that is added", _when_mask_additive, _mask_additive),
    Conversion("gqa_fold", "the query group folded into rows", _when_gqa_fold, _gqa_fold),
    Conversion("gqa_expand", "keys and values repeated for each query head", _when_gqa_expand, _gqa_expand),
    Conversion("contiguous", "q, k, v copied to dense memory", _when_contiguous, _contiguous),
    Conversion("by_heads", "a few heads at a time", _when_by_heads, blocks.by_heads, beside="fp32"),
    Conversion("fp32", "cast to float32, the output back", _when_fp32, _fp32),
    Conversion("head_dim_pad", "head dims padded with zeros", _when_pad, _pad),
    Conversion("dense", "q, k, v copied to dense memory in the kernel's layout", _when_dense, _dense),
    Conversion("recompute", "in blocks; the backward makes each block's scores again", when_recompute, recompute),
    Conversion("chunks", "cut into blocks of heads and query rows", blocks.when_chunks, blocks.chunks),
)
BY_NAME = {c.name: c for c in CONVERSIONS}
