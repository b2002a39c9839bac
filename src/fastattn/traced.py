"""attention() while torch.compile or torch.export is tracing: one graph, no break, and nothing left of us at run time.

Where all sizes are static, a lookup whose result is a constant of the graph names the stored winner, and its Call is inlined:
the winner's own operators stand in the graph. Else, and wherever nothing is stored, it is F.sdpa with the conversions that our
semantics ask for. Nothing is timed. A verdict learnt later reaches compiled code when it is compiled again.
"""

from __future__ import annotations

from collections.abc import Callable
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
    options = parse(
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
    if _is_static(q, k, v, mask):
        structured = as_structured(mask)
        corner = structured.corner if isinstance(structured, masks.Causal) else None
        dense = _facts(mask) if isinstance(mask, Tensor) and structured is mask else None
        facts = (_facts(q), _facts(k), _facts(v), dense, corner)
        name = winner(facts, layout, is_causal, scale, options.kernel, options.accuracy)
        if name:
            return CALLS[name](q, k, v, mask)
    elif options.kernel is not None:
        raise NotImplementedError("attention(): kernel= under torch.compile needs static sizes (dynamic=False)")
    return default(q, k, v, mask, layout, is_causal, scale)


CALLS: dict[str, Callable[..., Tensor]] = {}  # Calls that traced code inlines, by a name that is constant in its graph


def find(*facts: Any) -> str:
    """resolve.py puts its own in this place, as imports only point down."""
    return ""


def winner(facts: Any, layout: str, is_causal: bool, scale: float | None, kernel: str | None, accuracy: Any) -> str:
    """Name in CALLS of the stored winner's Call, "" if the default is to serve. Runs as plain Python while tracing."""
    return find(facts, layout, is_causal, scale, kernel, accuracy)


winner._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result, without its import


def _facts(x: Tensor) -> tuple[Any, ...]:
    return tuple(x.shape), tuple(x.stride()), x.dtype, x.device, x.requires_grad


def _is_static(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> bool:
    """Whether every size is a plain number, not a symbol of a dynamic graph."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # imported already by whoever traces

    for x in (q, k, v, mask):
        if isinstance(x, Tensor) and as_structured(x) is x:
            for n in x.shape:
                if not has_static_value(n):
                    return False
            for n in x.stride():
                if not has_static_value(n):
                    return False
    return True


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
    if isinstance(q, Tensor):  # a branch, as F.sdpa takes no symbolic bool
        gqa = True if not q.is_nested and q.shape[1] != k.shape[1] else False  # noqa: SIM210
    else:
        gqa = q.shape[1] != k.shape[1]  # torch.fx's proxies: an operation of their graph
    out = sdpa(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=gqa)
    return from_bhsd(out, layout)
