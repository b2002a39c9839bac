"""attention() while torch.compile or torch.export is tracing: one graph, no break, and nothing left of us at run time.

Where all sizes are static, a lookup whose result is a constant of the graph names the stored winner, and its Call is inlined:
the winner's own operators stand in the graph. Else, and wherever nothing is stored, it is F.sdpa with the conversions that our
semantics ask for. Nothing is timed. A verdict learnt later reaches compiled code when it is compiled again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.environment.errors import NoKernelError
from fastattn.environment.torch_private import sdpa
from fastattn.kernels.kernel import Arguments
from fastattn.kernels.plain_math import sdpa_math
from fastattn.problems import masks
from fastattn.problems.call_key import as_structured, check_block_mask_alone, is_block_mask
from fastattn.problems.call_options import CallOptions, check_layout, parse_options
from fastattn.problems.layouts import from_bhsd, to_bhsd
from fastattn.problems.problem import default_scale


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
) -> Any:
    """fastattn.attention, as it is traced."""
    options = parse_options(
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
    if options.score_mod is not None or is_block_mask(mask):
        if options.kernel not in (None, "flex"):
            raise NoKernelError(f"kernel {options.kernel!r} cannot do a score_mod or a BlockMask", [])
        return default(q, k, v, mask, layout, options)
    name = stored(q, k, v, mask, layout, options)
    if name:
        return CALLS[name](q, k, v, mask)
    return default(q, k, v, mask, layout, options)


def stored(q: Tensor, k: Tensor, v: Tensor, mask: Any, layout: str, options: CallOptions) -> str:
    """Name in CALLS of what the store says, "" where it says nothing, or a size is a symbol."""
    if not _is_static(q, k, v, mask):
        if options.kernel is not None:
            raise NotImplementedError("attention(): kernel= under torch.compile needs static sizes (dynamic=False)")
        return ""
    structured = as_structured(mask)
    corner = structured.corner if isinstance(structured, masks.Causal) else None
    dense = _facts(mask) if isinstance(mask, Tensor) and structured is mask else None
    return winner((_facts(q), _facts(k), _facts(v), dense, corner), layout, _asked(options))


ASKED = ("is_causal", "scale", "kernel", "accuracy", "dropout_p", "window", "softcap", "return_lse")


def _asked(o: CallOptions) -> tuple[Any, ...]:
    """ASKED of the options: plain values, which a graph can hold."""
    return o.is_causal, o.scale, o.kernel, o.accuracy, o.dropout_p, o.window, o.softcap, o.return_lse


CALLS: dict[str, Callable[..., Tensor]] = {}  # Calls that traced code inlines, by a name that is constant in its graph


def find(*facts: Any) -> str:
    """resolve.py puts its own in this place, as imports only point down."""
    return ""


def winner(facts: Any, layout: str, asked: tuple[Any, ...]) -> str:
    """Name in CALLS of the stored winner's Call, "" if the default is to serve. Runs as plain Python while tracing."""
    return find(facts, layout, asked)


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


def default(q: Tensor, k: Tensor, v: Tensor, mask: Any, layout: str, o: CallOptions) -> Any:
    """F.sdpa with our semantics, for any kind of tensor: what is served wherever nothing may be learnt.

    What F.sdpa cannot do is plain math, or flex_attention where the caller's own function is part of it.
    """
    q, k, v = to_bhsd(q, layout), to_bhsd(k, layout), to_bhsd(v, layout)
    is_custom = o.score_mod is not None or is_block_mask(mask)
    is_math = o.softcap > 0 or o.return_lse
    if is_block_mask(mask):
        check_block_mask_alone(o)
    structured = as_structured(mask)
    corner = "top_left" if o.is_causal else None
    if isinstance(structured, masks.Causal):
        mask = None
        if structured.corner == "bottom_right" and o.is_causal:
            mask = masks.visible(q, q.shape[2], k.shape[2], None, 0)
        corner = structured.corner
    window = o.window
    if window is not None and mask is None and not is_custom and type(q.shape[2]) is int and q.shape[2] == 1:
        lower, upper = masks.band(corner, window, 1, k.shape[2])  # one query in a window: on the keys that it sees
        first, last = max(0, lower or 0), k.shape[2] if upper is None else upper + 1
        k, v, corner, window = k[:, :, first:last], v[:, :, first:last], None, None
    is_plain = corner == "top_left" and mask is None and window is None and not (is_custom or is_math)
    # torch's CPU kernel masks before it scales: -inf * scale is NaN or +inf
    is_causal = is_plain and (o.scale is None or o.scale > 0)
    lower = upper = None
    if (corner is not None or window is not None) and not is_causal:
        lower, upper = masks.band(corner, window, q.shape[2], k.shape[2])
    if (lower is not None or upper is not None) and not is_custom:
        mask = masks.intersect(mask, masks.visible(q, q.shape[2], k.shape[2], lower, upper))
    if isinstance(q, Tensor):  # a branch, as F.sdpa takes no symbolic bool
        gqa = True if not q.is_nested and q.shape[1] != k.shape[1] else False  # noqa: SIM210
    else:
        gqa = q.shape[1] != k.shape[1]  # torch.fx's proxies: an operation of their graph
    if is_custom:
        return from_bhsd(_flex(q, k, v, mask, lower, upper, o, gqa), layout)
    if not is_math:
        return from_bhsd(sdpa(q, k, v, mask, o.dropout_p, is_causal, scale=o.scale, enable_gqa=gqa), layout)
    scale = default_scale(q.shape[3]) if o.scale is None else o.scale
    mask = mask[None, None] if mask is not None and mask.dim() == 2 else mask
    a = Arguments(scale, softcap=o.softcap, dropout_p=o.dropout_p, lse=o.return_lse)
    device = q.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(
        device
    ):  # cast as F.sdpa casts, then no more
        q, k, v, mask = (_cast(x, torch.get_autocast_dtype(device)) for x in (q, k, v, mask))
        with torch.autocast(device, enabled=False):
            found = sdpa_math(q, k, v, mask, a)
    else:
        found = sdpa_math(q, k, v, mask, a)
    return (from_bhsd(found[0], layout), found[1]) if o.return_lse else from_bhsd(found, layout)


def _cast(x: Any, dtype: torch.dtype) -> Any:
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
