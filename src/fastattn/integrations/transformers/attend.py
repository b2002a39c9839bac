"""The attention function: what each layer calls, served by attention() where it can be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.dispatch.attention import attention
from fastattn.integrations.transformers import library
from fastattn.integrations.transformers.told_mask import ToldMask, as_plain
from fastattn.problems import masks

# Arguments that choose keys: an answer without them is another model's.
_NEEDED = {
    "indices": "the keys of sparse attention (indices)",
    "block_indices": "the blocks of sparse attention (block_indices)",
    "read_index": "continuous batching (read_index)",
}
# Arguments that only an eager path of theirs serves, and why a call with them is not served.
_EAGER = {
    "output_attentions": "the weights are asked for (output_attentions)",
    "head_mask": "there is a head_mask",
    "sinks": "each query has a sink of its own (sinks)",
}
_SPECIAL = frozenset((*_NEEDED, *_EAGER))


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    """softmax(scaling * query key^T + mask) value, as transformers calls it.

    query: [batch, q_heads, q_len, head_dim]; key, value: [batch, kv_heads, kv_len, ...], never repeated. attention_mask: what
    make_mask made, or a tensor. s_aux: attention sinks, a score for each head that takes part in the softmax and has no value.
    Returns ([batch, q_len, q_heads, head_dim_v], None, or the weights where output_attentions asks for them).
    """
    why = "" if _SPECIAL.isdisjoint(more) else _why_not(more)
    if why:
        given = {"position_bias": position_bias, "softcap": softcap, "s_aux": s_aux}
        given = {name: x for name, x in given.items() if x is not None} | {"dropout": dropout, "scaling": scaling}
        return _by_their_own(why, module, query, key, value, attention_mask, is_causal, {**given, **more})
    causal = False
    if attention_mask is None:
        q_len = query.size(2)
        causal = q_len > 1 and _is_causal(module, is_causal)
        if causal and key.size(2) > q_len:  # a cache of fixed length that was empty
            key, value = key[:, :, :q_len], value[:, :, :q_len]
            position_bias = None if position_bias is None else position_bias[..., :q_len]
    elif attention_mask.__class__ is ToldMask:
        kv_len = key.size(2)
        if attention_mask.lengths != (query.size(2), kv_len):
            attention_mask = attention_mask.dense()[..., :kv_len]
        else:
            (first, last), attention_mask = attention_mask.told
            if last - first != kv_len:
                key, value = key[:, :, first:last], value[:, :, first:last]
                position_bias = None if position_bias is None else position_bias[..., first:last]
    elif torch.compiler.is_dynamo_compiling():
        from fastattn.integrations.transformers import in_graph

        found = in_graph.told(attention_mask, query, key)
        attention_mask = found if position_bias is None or found is in_graph.TRIANGLE else attention_mask
    if isinstance(attention_mask, masks.Causal) and attention_mask.corner == "top_left":
        attention_mask, causal = None, True
    if position_bias is not None:
        if isinstance(attention_mask, masks.Mask):
            attention_mask = attention_mask.dense(query.size(0), query.size(2), key.size(2), query.device)
        if library.bias_mask is None:
            raise NotImplementedError("fastattn: position_bias needs transformers 5")
        attention_mask, causal = library.bias_mask(position_bias, attention_mask, causal, query, key), False
    options: dict[str, Any] = {} if scaling is None else {"scale": scaling}
    if causal:
        options["is_causal"] = True
    if dropout:
        options["dropout_p"] = dropout
    if softcap:
        options["softcap"] = softcap
    if s_aux is not None:
        options["sinks"] = s_aux.reshape(-1)
    if query.size(0) == key.size(0):
        out = attention(query, key, value, attention_mask, **options)
    else:  # learned queries of batch 1, which F.sdpa broadcasts
        out = attention(query.expand(key.size(0), -1, -1, -1), key, value, attention_mask, **options)
    return out.transpose(1, 2).contiguous(), None


def _is_causal(module: Any, said: bool | None) -> bool:
    """Whether a call without a mask is causal: by its argument, the layer, or else as in what its models were written for."""
    said = getattr(module, "is_causal", None) if said is None else said
    return library.file_is_for_sdpa(type(module).__module__) if said is None else said


def _why_not(more: dict[str, Any]) -> str:
    """Why a call goes to a path of their own, "" where attention() serves it. Raises NotImplementedError where none does."""
    for name, given in more.items():
        if given is not None and given is not False:
            if name in _NEEDED:
                raise NotImplementedError(
                    f'attn_implementation="fastattn" does not serve {_NEEDED[name]};'
                    ' use this model with "sdpa", or "eager" where it has no other'
                )
            if name in _EAGER:
                return _EAGER[name]
    return ""


def _by_their_own(
    why: str,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    is_causal: bool | None,
    given: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Their eager path, with the mask that it adds; their sdpa where the model's file has none."""
    eager = library.eager_of(module)
    library.pass_on(f"{why}: {'eager' if eager else 'sdpa'}")
    mask = as_plain(mask)
    if eager is None:
        return library.sdpa(module, query, key, value, mask, is_causal=_is_causal(module, is_causal), **given)
    if mask is None and query.shape[2] > 1 and _is_causal(module, is_causal):
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is not None and mask.dtype is torch.bool:
        hidden = torch.finfo(query.dtype).min
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(mask.logical_not(), hidden)
    return eager(module, query, key, value, mask, **given)
