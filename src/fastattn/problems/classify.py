"""From the exact call key to the Problem that stands for its kind, and to the facts of the one call: pure rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.environment.device import Device
from fastattn.environment.text import dtype_name
from fastattn.problems import bands, masks
from fastattn.problems.call_facts import CallFacts, each, extent, has_aligned_rows
from fastattn.problems.call_key import CallKey, TensorSpec, after_autocast, is_block_mask
from fastattn.problems.layouts import dense_strides, order_in_memory, stride_class
from fastattn.problems.problem import Problem


def classify(key: CallKey, default_accuracy: str | float = "exact") -> tuple[Problem, CallFacts]:
    """The Problem of a call, and its facts. default_accuracy: the rung of a call that names none."""
    decode = None
    if key.options.window is not None:
        from fastattn.problems.sliding_window_decode import SlidingWindowDecode  # here, as no other call needs it

        decode = SlidingWindowDecode.of(key)
    key = decode.sliced(key) if decode else key
    q, k, v, mask, state, options = key.q, key.k, key.v, key.mask, key.state, key.options
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    corner = whole = None  # whole: all that a Mask hides, where it is more than a triangle and a window
    if mask is not None and isinstance(mask, masks.Causal):
        corner = mask.corner
    elif mask is not None and isinstance(mask, masks.Mask):
        whole = mask if key.also is None else mask & key.also
    corner, window = bands.simplest_band(corner, options.is_causal, options.window, q_len, kv_len)
    tensors = [s for s in (q, k, v, mask) if isinstance(s, TensorSpec)]
    dense = mask if isinstance(mask, TensorSpec) else None
    mask_shape, mask_strides = _mask_class(dense, q, kv_len) if dense else ("", "")
    if whole is not None:  # to a kernel it is a bool mask that all heads share
        entries, heads = whole.is_per_batch() and batch > 1, whole.heads() > 1
        mask_shape, mask_strides = f"{'b' if entries else '1'}{'h' if heads else '1'}qk", "contiguous"
    scale = options.scale
    is_cast = state.autocast is not None and any(s.dtype is not after_autocast(s.dtype, state) for s in tensors)
    asks_grad = any(s.requires_grad for s in tensors)
    problem = Problem(
        device=Device.of(q.device).type,
        dtype=dtype_name(after_autocast(q.dtype, state)),
        head_dim=head_dim,
        head_dim_v=v.shape[3],
        q_heads=q_heads,
        kv_heads=kv_heads,
        batch=batch,
        q_len=q_len,
        kv_len=kv_len,
        strides=(stride_class(q.shape, q.stride), stride_class(k.shape, k.stride), stride_class(v.shape, v.stride)),
        mask=dtype_name(after_autocast(dense.dtype, state))
        if dense
        else _kind(mask, whole, after_autocast(q.dtype, state)),
        structure=repr(whole.like(kv_len)) if whole is not None else "",
        mask_shape=mask_shape,
        mask_strides=mask_strides,
        mask_grad=bool(dense and dense.requires_grad and state.grad),
        causal=corner,
        scale="positive" if scale is None or scale > 0 else "zero" if scale == 0 else "negative",
        needs_grad=state.grad and (asks_grad or _captures_grad(options.score_mod)),
        deterministic=state.deterministic,
        switches=state.switches,
        accuracy=options.accuracy if options.accuracy is not None else default_accuracy,
        layout=key.layout,
        threads=state.threads,
        flash_impl=state.flash_impl,
        cast_from=tuple(dtype_name(s.dtype) for s in tensors) if is_cast else (),
        window=window,
        softcap=float(options.softcap),
        dropout=options.dropout_p > 0,
        lse=options.return_lse,
        score_mod=options.score_mod is not None,
        kept=key.is_kept,
    )
    facts = CallFacts(
        extent=max(extent(s.shape, s.stride) for s in tensors),
        aligned=each(s.aligned for s in (q, k, v)),  # a mask that is not costs nobody else a copy
        aligned_rows=each(has_aligned_rows(s.shape, s.stride, s.dtype.itemsize) for s in (q, k, v)),
        switched_off=state.off,
        autocast=state.autocast is not None,
        asks_grad=asks_grad,
        mask_asks_grad=bool(dense and dense.requires_grad),
        q_order=order_in_memory(q.shape, q.stride),
        dense_last_dims=all(_last_stride(s, key) == 1 for s in (q, k, v)),
        dense_mask=dense is None or _last_stride(dense, key) == 1,
        sixteenths=options.dropout_p * 16 % 1 == 0,
        decode=decode,
        also=key.also,
    )
    return problem, facts


def _captures_grad(function: Any) -> bool:
    """Whether a caller's function holds a tensor that requires grad."""
    held = [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if _is_filled(cell)]
    return any(isinstance(x, Tensor) and x.requires_grad for x in held)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _kind(mask: Any, whole: masks.Mask | None, dtype: torch.dtype) -> str | None:
    """Problem.mask of what is no tensor. A bias is not rounded to half precision: it grows with the distance."""
    if whole is not None:
        return dtype_name(torch.promote_types(dtype, torch.float32)) if whole.heads() else "bool"
    return "block" if is_block_mask(mask) else None


def _last_stride(s: TensorSpec, key: CallKey) -> int:
    """The last stride that F.sdpa's choice of a kernel sees: autocast's copy is dense."""
    if s.dtype is after_autocast(s.dtype, key.state):
        return s.stride[-1]
    return dense_strides(s.shape, order_in_memory(s.shape, s.stride))[-1]


def _mask_class(mask: TensorSpec, q: TensorSpec, kv_len: int) -> tuple[str, str]:
    """(which dimensions of (b, h, q, k) are not broadcast, stride class): "bhqk" is dense, "b11k" a padding mask."""
    shape = (1,) * (4 - len(mask.shape)) + mask.shape
    stride = (0,) * (4 - len(mask.shape)) + mask.stride
    pattern = "".join(
        name if n != 1 or (n == full == 1 and name in "qk") else "1"
        for name, n, full in zip("bhqk", shape, (q.shape[0], q.shape[1], q.shape[2], kv_len), strict=True)
    )
    return pattern, stride_class(shape, stride)
