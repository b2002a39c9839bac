"""fastattn in the place of F.scaled_dot_product_attention: the same signature, the same answers, the same errors."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastattn.dispatch import compiled
from fastattn.dispatch.attention import Front
from fastattn.environment.log import log
from fastattn.environment.torch_private import sdpa as torch_sdpa
from fastattn.problems.call_options import CallOptions

_front = Front()


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

    It accepts exactly what F.scaled_dot_product_attention of this torch accepts on this device; whatever fastattn does not
    serve (dropout, inputs that are not 4-D, subclasses, transforms, ...) F.scaled_dot_product_attention answers, and it raises
    what is to be raised.
    """
    options = (dropout_p, is_causal, scale, enable_gqa)
    try:
        first = _front.first
        call = first and first(query, key, value, attn_mask, "sdpa", options)
        if call is None:
            call = _front.lookup(query, key, value, attn_mask, "sdpa", options)
    except Exception:
        call = None
    if call is not None:
        return call(query, key, value, attn_mask)
    from fastattn.dispatch import resolve

    generation = _front.generation
    served = resolve.drop_in(query, key, value, attn_mask, *options)
    out = served.call(query, key, value, attn_mask)
    if served.remember:
        _front.publish(served, query, key, value, attn_mask, "sdpa", options, generation)
    return out


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
    if (
        isinstance(query, Tensor) and query.dim() == key.dim() == value.dim() == 4 and not query.is_nested
        and not (attn_mask is not None and (is_causal or attn_mask.dim() == 3))
        and (enable_gqa or query.shape[1] == key.shape[1])
    ):  # fmt: skip
        options = CallOptions(is_causal=is_causal, scale=scale, dropout_p=dropout_p)
        name = compiled.stored(query, key, value, attn_mask, "bhsd", options)
        if name:
            return compiled.CALLS[name](query, key, value, attn_mask)
    return torch_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


sdpa._torchdynamo_inline = _traced  # type: ignore[attr-defined]


class Patch:
    """The handle of patch(): `undo()` it, or let a `with` block undo it at its end.

    It patches when it is made, not at `with`. It undoes itself only if it is still the one in place; otherwise somebody
    patched over it, and what they put there stays.
    """

    def __init__(self) -> None:
        self._before = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = sdpa
        self._done = False

    def undo(self) -> bool:
        """Put back what was there before; whether that was done."""
        if self._done or self._before is sdpa:  # undone, or it was in place already
            return False
        if F.scaled_dot_product_attention is not sdpa:
            log.warning("F.scaled_dot_product_attention was patched again since; it is left as it is")
            return False
        F.scaled_dot_product_attention = self._before
        self._done = True
        return True

    def __repr__(self) -> str:
        if self._done:
            state = "undone"
        elif F.scaled_dot_product_attention is not sdpa:
            state = "patched over"
        else:
            state = "nothing to undo, fastattn was in place already" if self._before is sdpa else "in place"
        return f"<fastattn.patch: {state}>"

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exc: object) -> None:
        self.undo()


def patch() -> Patch:
    """Put `fastattn.sdpa` in the place of torch.nn.functional.scaled_dot_product_attention, for the whole process.

    It takes effect when it is called; `with` only undoes it at the end of the block. Code that imported the function by
    name before keeps the old one. Patching twice is harmless: the second handle has nothing to undo.
    """
    return Patch()
