"""sdpa(): F.scaled_dot_product_attention's signature, its answers and its errors, served by fastattn where it can."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastattn.dispatch.entries import Entries, no_tensors
from fastattn.environment import torch_private

if TYPE_CHECKING:
    from fastattn.dispatch.resolve import Resolved


def _resolve(q: Any, k: Any, v: Any, mask: Any, layout: str, options: tuple[Any, ...]) -> Resolved:
    from fastattn.dispatch import drop_in

    return drop_in.drop_in(q, k, v, mask, options)


entries = Entries(_resolve)


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention, served by fastattn where fastattn can.

    It accepts exactly what F.scaled_dot_product_attention of this torch accepts on this device, inputs of other dimensions than
    four and a mask together with is_causal included; whatever fastattn does not serve (subclasses, transforms, ...)
    F.scaled_dot_product_attention answers, and it raises what is to be raised.
    """
    options = (dropout_p, is_causal, scale, enable_gqa)
    try:
        call = entries.first(query, key, value, attn_mask, "sdpa", options)
    except Exception as error:
        call = no_tensors(error)
    if call is None:
        return entries.call(query, key, value, attn_mask, "sdpa", options)
    return call(query, key, value, attn_mask)


def _traced(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What Dynamo inlines instead."""
    from fastattn.dispatch import compiled

    return compiled.sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


torch_private.trace_instead(sdpa, _traced)
torch_private.run_as_python(sdpa)
