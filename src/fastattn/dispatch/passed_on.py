"""Calls that are passed on to F.sdpa: why, and how, with the conversions that our semantics ask for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.dispatch.four_dims import MASK_AND_CAUSAL, OTHER_HEADS, is_one_head_broadcast
from fastattn.dispatch.torch_function import stock_sdpa
from fastattn.kernels.kernel import Arguments
from fastattn.kernels.plain_math import sdpa_math
from fastattn.problems import bands, dense_masks, masks
from fastattn.problems.call_key import as_structured, check_block_mask_alone, is_block_mask, is_kept, told
from fastattn.problems.call_options import CallOptions
from fastattn.problems.layouts import from_bhsd, to_bhsd
from fastattn.problems.problem import default_scale

# asked once, as Dynamo of torch 2.11 cannot trace the question
AUTOCAST_DEVICES = frozenset(kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind))


def why_not_in_graph(q: Tensor, k: Tensor, v: Tensor, mask: Any, is_causal: Any, enable_gqa: Any) -> str | None:
    """Why a call of F.sdpa with these tensors stays what it is in a graph of torch.compile, None if it may be served."""
    if not q.dim() == k.dim() == v.dim() == 4:
        return "inputs that are not 4-D"
    if mask is not None and is_causal:
        return MASK_AND_CAUSAL
    if mask is not None and mask.dim() == 3:
        return "a 3-D mask"
    if q.shape[1] != k.shape[1] and not enable_gqa and not is_one_head_broadcast(q, k, v, enable_gqa):
        return OTHER_HEADS.why
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any, layout: str, o: CallOptions) -> Any:
    """F.sdpa with our semantics, for any kind of tensor: what is served wherever nothing may be learnt.

    What F.sdpa cannot do is plain math, or flex_attention where the caller's own function is part of it.
    """
    q, k, v = to_bhsd(q, layout), to_bhsd(k, layout), to_bhsd(v, layout)
    mask = mask.of if is_kept(mask) else mask
    is_custom = o.score_mod is not None or is_block_mask(mask)
    is_math = o.softcap > 0 or o.return_lse
    if is_block_mask(mask):
        check_block_mask_alone(o)
    structured = as_structured(mask)
    corner = "top_left" if o.is_causal else None
    if isinstance(structured, masks.Mask) and not isinstance(structured, masks.Causal):
        if isinstance(structured, masks.FilledPagesUnread):
            k, v = structured.gathered(k), structured.gathered(v)
        for leaf in masks.leaves(structured):
            if isinstance(leaf, masks.Filled):  # 0 times what lies behind may be NaN
                k, v = (x.masked_fill(leaf.unread(x.shape[2], x.device), 0.0) for x in (k, v))
        o, structured, mask = _dense_of(structured, o, q, k)
        corner = "top_left" if o.is_causal else None
    if isinstance(structured, masks.Causal):
        mask = None
        if structured.corner == "bottom_right" and o.is_causal:
            mask = bands.visible(q, q.shape[2], k.shape[2], None, 0)
        corner = structured.corner
    window = o.window
    if window is not None and mask is None and not is_custom and type(q.shape[2]) is int and q.shape[2] == 1:
        lower, upper = bands.band(corner, window, 1, k.shape[2])  # one query in a window: on the keys that it sees
        first, last = max(0, lower or 0), k.shape[2] if upper is None else upper + 1
        k, v, corner, window = k[:, :, first:last], v[:, :, first:last], None, None
    is_plain = corner == "top_left" and mask is None and window is None and not (is_custom or is_math)
    # torch's CPU kernel masks before it scales: -inf * scale is NaN or +inf
    is_causal = is_plain and (o.scale is None or o.scale > 0)
    lower = upper = None
    if (corner is not None or window is not None) and not is_causal:
        lower, upper = bands.band(corner, window, q.shape[2], k.shape[2])
    if (lower is not None or upper is not None) and not is_custom:
        mask = dense_masks.intersect(mask, bands.visible(q, q.shape[2], k.shape[2], lower, upper))
    if isinstance(q, Tensor):  # a branch, as F.sdpa takes no symbolic bool
        gqa = True if not q.is_nested and q.shape[1] != k.shape[1] else False  # noqa: SIM210
    else:
        gqa = q.shape[1] != k.shape[1]  # torch.fx's proxies: an operation of their graph
    if is_custom:
        return from_bhsd(_flex(q, k, v, mask, lower, upper, o, gqa), layout)
    if not is_math:
        return from_bhsd(stock_sdpa(q, k, v, mask, o.dropout_p, is_causal, scale=o.scale, enable_gqa=gqa), layout)
    scale = default_scale(q.shape[3]) if o.scale is None else o.scale
    mask = mask[None, None] if mask is not None and mask.dim() == 2 else mask
    a = Arguments(scale, softcap=o.softcap, dropout_p=o.dropout_p, lse=o.return_lse)
    device = q.device.type
    if device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device):  # cast as F.sdpa casts, then no more
        q, k, v, mask = (cast(x, torch.get_autocast_dtype(device)) for x in (q, k, v, mask))
        with torch.autocast(device, enabled=False):
            found = sdpa_math(q, k, v, mask, a)
    else:
        found = sdpa_math(q, k, v, mask, a)
    return (from_bhsd(found[0], layout), found[1]) if o.return_lse else from_bhsd(found, layout)


def _dense_of(mask: masks.Mask, o: CallOptions, q: Tensor, k: Tensor) -> tuple[CallOptions, Any, Any]:
    """(options, a triangle, a tensor) that hide what a Mask and the options do."""
    o, rest, also = told(mask, o)
    if rest is None or isinstance(rest, masks.Causal):
        return o, rest, None
    whole = rest if also is None else rest & also
    batch, heads, q_len, kv_len = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    if not torch.compiler.is_compiling():  # its errors would be traced
        whole.check(batch, heads, q_len, kv_len)
    dense = whole.dense(batch, q_len, kv_len, q.device)
    return o, None, dense if dense.dtype is torch.bool else dense.to(q.dtype)


def cast(x: Any, dtype: torch.dtype) -> Any:
    """As F.sdpa casts its inputs under autocast."""
    return x.to(dtype) if x is not None and x.is_floating_point() and x.dtype is not torch.float64 else x


def _flex(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, lower: int | None, upper: int | None, o: CallOptions, gqa: bool
) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    if o.dropout_p or o.return_lse or (mask is not None and not is_block_mask(mask)):
        raise NotImplementedError(
            "attention(): score_mod or a BlockMask with dropout_p, return_lse or another mask, traced"
        )
    score_mod, softcap = o.score_mod, o.softcap

    def change(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        score = softcap * torch.tanh(score / softcap) if softcap else score
        score = score if score_mod is None else score_mod(score, b, h, i, j)
        if lower is not None:
            score = torch.where(j >= i + lower, score, -float("inf"))
        return score if upper is None else torch.where(j <= i + upper, score, -float("inf"))

    return flex_attention(q, k, v, score_mod=change, block_mask=mask, scale=o.scale, enable_gqa=gqa)  # type: ignore[return-value]
