"""attention() while torch.compile or torch.export is tracing: one graph, no break, and nothing left of us at run time.

Where all sizes are static, a lookup whose result is a constant of the graph names the stored winner, and its Call is inlined:
the winner's own operators stand in the graph. Else, and wherever nothing is stored, it is F.sdpa with the conversions that our
semantics ask for. Nothing is timed. A verdict learnt later reaches compiled code when it is compiled again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastattn.dispatch import passed_on
from fastattn.environment.errors import NoKernelError
from fastattn.environment.torch_private import sdpa as torch_sdpa
from fastattn.problems import masks
from fastattn.problems.call_key import as_structured, is_block_mask
from fastattn.problems.call_options import CallOptions, check_layout, is_ordinary, parse_options
from fastattn.problems.rewriting import rewrite


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Any, layout: str, given: dict[str, Any]) -> Any:
    """fastattn.attention, as it is traced."""
    if not is_ordinary(q, mask, layout, given):
        ordinary = rewrite(q, k, v, mask, layout, given)
        if ordinary is not None:
            return ordinary.back(attention(*ordinary[:5], ordinary.options))
    options = parse_options(given)
    check_layout(layout)
    if options.score_mod is not None or is_block_mask(mask):
        if options.kernel not in (None, "flex"):
            raise NoKernelError(f"kernel {options.kernel!r} cannot do a score_mod or a BlockMask", [])
        return passed_on.attend(q, k, v, mask, layout, options)
    is_told = isinstance(mask, masks.Mask) and not isinstance(mask, masks.Causal)
    name = "" if is_told else stored(q, k, v, mask, layout, options)
    if name:
        return CALLS[name](q, k, v, mask)
    return passed_on.attend(q, k, v, mask, layout, options)


def sdpa(q: Any, k: Any, v: Any, mask: Any, dropout_p: Any, is_causal: Any, scale: Any, enable_gqa: Any) -> Tensor:
    """fastattn.sdpa, as it is traced."""
    is_plain = isinstance(q, Tensor) and not q.is_nested
    if is_plain and as_structured(mask) is not mask:
        # torch's causal biases compare the function, which is not torch's here
        options = CallOptions(is_causal=is_causal, scale=scale, dropout_p=dropout_p)
        return passed_on.attend(q, k, v, mask, "bhsd", options)
    if is_plain and passed_on.why_sdpa_is_passed_on(q, k, v, mask, is_causal, enable_gqa) is None:
        options = CallOptions(is_causal=is_causal, scale=scale, dropout_p=dropout_p)
        name = stored(q, k, v, mask, "sdpa", options)
        if name:
            return CALLS[name](q, k, v, mask)
    return torch_sdpa(q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


CALLS: dict[str, Callable[..., Tensor]] = {}  # Calls that traced code inlines, by a name that is constant in its graph


def stored(q: Tensor, k: Tensor, v: Tensor, mask: Any, layout: str, options: CallOptions) -> str:
    """Name in CALLS of what the store says, "" where it says nothing, or a size is a symbol."""
    if not _is_static(q, k, v, mask):
        if options.kernel is not None:
            raise NotImplementedError("attention(): kernel= under torch.compile needs static sizes (dynamic=False)")
        return ""
    structured = as_structured(mask)
    corner = structured.corner if isinstance(structured, masks.Causal) else None
    dense = _facts(mask) if isinstance(mask, Tensor) and structured is mask else None
    return winner((_facts(q), _facts(k), _facts(v), dense, corner), layout, _plain_values(options))


OPTIONS = ("is_causal", "scale", "kernel", "accuracy", "dropout_p", "window", "softcap", "return_lse")


def _plain_values(o: CallOptions) -> tuple[Any, ...]:
    """OPTIONS of the options: plain values, which a graph can hold."""
    return o.is_causal, o.scale, o.kernel, o.accuracy, o.dropout_p, o.window, o.softcap, o.return_lse


def winner(tensors: Any, layout: str, options: tuple[Any, ...]) -> str:
    """Name in CALLS of the stored winner's Call, "" if the default is to serve. Runs as plain Python while tracing."""
    from fastattn.dispatch.compiled_winner import bind_winner

    return bind_winner(tensors, layout, dict(zip(OPTIONS, options, strict=True)), CALLS)


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
