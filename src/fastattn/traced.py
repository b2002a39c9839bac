"""attention() while torch.compile or torch.export is tracing: one graph, no break, no lock, no file, no clock.

Validation needs no values, so it runs while tracing. What runs is F.sdpa with the conversions that our semantics ask for.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastattn import masks
from fastattn.device import sdpa
from fastattn.inputs import as_structured, check_layout, parse
from fastattn.layouts import from_bhsd, to_bhsd


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any = None,
    layout: str = "bhsd",
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    window: Any = None,
    softcap: float = 0.0,
    score_mod: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_kv: Any = None,
    max_q_len: Any = None,
    max_kv_len: Any = None,
    kv_lens: Any = None,
    page_table: Any = None,
    return_lse: bool = False,
    kernel: str | None = None,
    accuracy: str | float | None = None,
) -> Tensor:
    """fastattn.attention, as it is traced."""
    parse(
        {
            "dropout_p": dropout_p,
            "window": window,
            "softcap": softcap,
            "score_mod": score_mod,
            "cu_seqlens_q": cu_seqlens_q,
            "cu_seqlens_kv": cu_seqlens_kv,
            "max_q_len": max_q_len,
            "max_kv_len": max_kv_len,
            "kv_lens": kv_lens,
            "page_table": page_table,
            "return_lse": return_lse,
            "is_causal": is_causal,
            "scale": scale,
            "kernel": kernel,
            "accuracy": accuracy,
        }
    )
    check_layout(layout)
    return default(q, k, v, mask, layout, is_causal, scale)


def default(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, layout: str, is_causal: bool, scale: float | None
) -> Tensor:
    """F.sdpa with our semantics, for any kind of tensor: what is served wherever nothing may be learnt."""
    q, k, v = to_bhsd(q, layout), to_bhsd(k, layout), to_bhsd(v, layout)
    structured = as_structured(mask)
    if isinstance(structured, masks.Causal):
        if structured.corner == "top_left":
            mask, is_causal = None, True
        else:
            visible = masks.triangle(q, q.shape[2], k.shape[2], k.shape[2] - q.shape[2])
            if is_causal:
                visible = visible & masks.triangle(q, q.shape[2], k.shape[2], 0)
            mask, is_causal = visible, False
    elif mask is not None and is_causal:
        mask, is_causal = masks.intersect(mask, q, q.shape[2], k.shape[2], 0), False
    if is_causal and scale is not None and scale <= 0:
        # torch's CPU kernel masks before it scales: -inf * scale is NaN or +inf
        mask, is_causal = masks.triangle(q, q.shape[2], k.shape[2], 0), False
    gqa = not q.is_nested and bool(q.shape[1] != k.shape[1])
    out = sdpa(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=gqa)
    return from_bhsd(out, layout)
