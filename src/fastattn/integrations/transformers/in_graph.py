"""Masks while torch.compile is tracing, where no tensor can be read: what the arguments alone say of them.

Their dense mask is made as ever, and told what it means by an attribute. Where attend() takes that, nothing reads the tensor,
and it falls out of the graph. Whatever else a model does with the mask it does with the dense one, and what it makes of it is
told nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false, has_static_value

from fastattn.environment.graph_constants import as_constant
from fastattn.integrations.transformers import library, tried_masks
from fastattn.integrations.transformers.read_masks import Lengths, Unknown, read
from fastattn.problems import masks
from fastattn.problems.masks import Mask

TRIANGLE = masks.Causal()


def make_mask(given: dict[str, Any]) -> Tensor | None:
    """A mask as attention functions are given it: their dense one, which may be told; None where layers know what it means."""
    told = None if torch.compiler.is_exporting() else _read(given)
    knows_none = guard_or_false(library.q_length(given) == 1) or _models_are_for_sdpa(given.get("config"))
    if told is TRIANGLE and knows_none:
        return None
    dense = library.sdpa_mask(**given) if knows_none else library.dense_mask(given)
    if dense is not None and told is not None:
        dense.fastattn_told = told  # type: ignore[attr-defined]
    return dense


def told(mask: Tensor, query: Tensor, key: Tensor) -> Any:
    """The Mask that a tensor was told, where it is of all these queries and keys; else the tensor."""
    found = getattr(mask, "fastattn_told", None)
    is_whole = guard_or_false(mask.size(2) == query.size(2)) and guard_or_false(mask.size(3) == key.size(2))
    return found if found is not None and is_whole else mask


def _read(given: dict[str, Any]) -> Mask | None:
    """What a mask without padding means; None where the arguments do not say it.

    Their mask functions are closures made in the graph, which cannot be looked into here. But allow_is_causal_skip and
    allow_is_bidirectional_skip say that nothing was laid over the plain mask, and local_size how far a token sees.
    """
    q_start, kv_start = given.get("q_offset", 0), given.get("kv_offset", 0)
    has_tensors = any(isinstance(given.get(name), Tensor) for name in ("attention_mask", "cache_position"))
    if has_tensors or isinstance(q_start, Tensor) or isinstance(kv_start, Tensor):
        return None
    q_len, kv_len = given["q_length"], given["kv_length"]
    if not (guard_or_false(q_len == kv_len) and guard_or_false(q_start == kv_start)):
        return None
    is_causal, size = given.get("allow_is_causal_skip", True), given.get("local_size")
    if size is None:
        is_theirs = given.get("mask_function") is library.masks.causal_mask_function
        return TRIANGLE if is_causal and is_theirs and _is_triangle() else None
    owner = given.get("config")
    is_window = getattr(owner, "sliding_window", None) == size and getattr(owner, "attention_chunk_size", None) is None
    is_plain = is_causal or given.get("allow_is_bidirectional_skip", False)
    if not (is_plain and is_window and has_static_value(size) and _is_window(as_constant(size), is_causal)):
        return None
    size = as_constant(size)
    if not is_causal:
        return masks.Window(size, size)
    if has_static_value(kv_len) and kv_len <= size:
        return TRIANGLE
    return masks.Window(size - 1, -1) & TRIANGLE


# --- what runs as plain Python while tracing: its results are constants of the graph


def _is_triangle() -> bool:
    return tried_masks.means_what_we_think("causal_mask_function")


def _is_window(size: int, is_causal: bool) -> bool:
    """Whether their mask functions of a sliding window mean what we take them for."""
    name = "sliding_window_causal_mask_function" if is_causal else "sliding_window_bidirectional_mask_function"
    want = masks.Window(size - 1, -1) & TRIANGLE if is_causal else masks.Window(size, size)
    try:
        return read(getattr(library.masks, name)(size), Lengths(1, size + 1, size + 1, 0, 0)) == want
    except (AttributeError, Unknown):
        return False


def _models_are_for_sdpa(owner: Any) -> bool:
    return library.models_are_for_sdpa(owner)


for _constant in (_is_triangle, _is_window, _models_are_for_sdpa):
    _constant._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result
