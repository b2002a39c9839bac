"""The mask function: from what transformers says of a mask to a mask with a meaning, or to their own dense one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.environment import torch_private
from fastattn.integrations.transformers import library
from fastattn.integrations.transformers.read_masks import Lengths, Unknown, padding, read
from fastattn.integrations.transformers.told_mask import CAN_BE_MADE, Told, ToldMask
from fastattn.problems import masks
from fastattn.problems.masks import Mask
from fastattn.problems.masks.combined import Union


def make_mask(**given: Any) -> Tensor | None:
    """A mask as attention functions are given it: a ToldMask, their dense bool mask, or None as for their sdpa.

    What None means a layer knows by its `is_causal`, which is right only where its models were written for sdpa: others are
    never given None. Made once a call of the model for each kind of layer, and shared by all of these.
    """
    if torch.compiler.is_dynamo_compiling():
        from fastattn.integrations.transformers import in_graph

        return in_graph.make_mask(given)
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch_private.dispatch_modes():
        return library.their_mask(given)
    owner = given.get("config")
    if owner is not None and not library.asks_the_interface(owner):
        library.say(
            f"{type(owner).__name__}: its models do not ask for an attention function; they attend by themselves, eagerly"
        )
        return library.eager_mask(**given)
    try:
        if not CAN_BE_MADE:
            raise Unknown("this torch has no tensors without memory")
        n = _lengths(given)
        told = _told(given, n)
    except Unknown as why:
        return _theirs(given, why)
    return None if _may_be_none(told, n, given) else ToldMask(told, n.batch, n.q_len, n.kv_len, _device(given))


def _may_be_none(told: Told, n: Lengths, given: dict[str, Any]) -> bool:
    """Whether None says the same: torch's triangle where the caller speaks of a causal mask, all keys of a single query."""
    skips_causal, skips_all = given.get("allow_is_causal_skip", True), given.get("allow_is_bidirectional_skip", False)
    if told.keys != (0, n.kv_len):
        return False
    if told.mask is None and n.q_len == 1:
        return skips_causal
    if told.mask is None:
        is_said = skips_all and not skips_causal
    else:
        is_said = skips_causal and told.mask == masks.Causal() and n.q_len == n.kv_len
    return is_said and library.models_are_for_sdpa(given.get("config"))


def _theirs(given: dict[str, Any], why: Unknown) -> Tensor | None:
    """Their dense mask; where their sdpa would do without one, what it would take None for."""
    dense = library.sdpa_mask(**given) if CAN_BE_MADE else library.dense_mask(given)
    if dense is not None:
        library.say(f"a dense mask is made: {why}")
        return dense
    if library.models_are_for_sdpa(given.get("config")):
        return None
    q_len, kv_len = library.q_length(given), given["kv_length"]
    is_triangle = given.get("allow_is_causal_skip", True) and q_len > 1
    told = Told((0, q_len), masks.Causal()) if is_triangle else Told((0, kv_len), None)
    return ToldMask(told, given["batch_size"], q_len, kv_len, _device(given))


def _device(given: dict[str, Any]) -> Any:
    at = given.get("cache_position")
    return at.device if at is not None else given.get("device", "cpu")


def _lengths(given: dict[str, Any]) -> Lengths:
    """The lengths, which 4.57 and 5.x say differently. Raises Unknown."""
    at = given.get("cache_position")
    q_len, q_start = library.q_length(given), at[:1] if at is not None else given.get("q_offset", 0)
    reads = torch.device(_device(given)).type == "cpu"
    if isinstance(q_start, Tensor):  # a cache of fixed length counts in a tensor
        if not (reads and type(q_start) is Tensor and q_start.device.type == "cpu"):
            raise Unknown("what a tensor on a device says is not read")
        q_start = int(q_start)
    sizes = (given["batch_size"], q_len, given["kv_length"], q_start, given.get("kv_offset", 0))
    if not all(type(size) is int for size in sizes):
        raise Unknown("sizes that are symbols")
    return Lengths(*sizes, reads=reads, is_padded=given.get("attention_mask") is not None)


def _told(given: dict[str, Any], n: Lengths) -> Told:
    """Which keys are seen. Raises Unknown."""
    function = given.get("mask_function", library.masks.causal_mask_function)
    own = n.q_start - n.kv_start  # the key of the first query
    end = own + n.q_len  # behind that of the last one
    mask = read(function, n._replace(kv_len=end)) if own >= 0 and end <= n.kv_len else None
    if not _is_causal(mask):
        end = n.kv_len
        mask = read(function, n)
        if mask is not None and (end - n.q_len if mask.anchor == "bottom_right" else 0) != own:
            raise Unknown("queries whose positions neither begin nor end with the keys")
    seen = _unpadded(given.get("attention_mask"), n, end)
    if n.q_len == 1 and not (mask is not None and mask.is_per_batch()):
        return _of_one_query(mask, seen, own, end)
    hidden = None if seen is None else padding(seen, n)
    if hidden is None:
        return Told((0, end), mask)
    if mask is None:
        longest = _longest(hidden)
        return Told((0, longest or end), None if longest and isinstance(hidden.lengths, int) else hidden)
    return Told((0, end), mask & hidden)


def _of_one_query(mask: Mask | None, seen: Tensor | None, own: int, end: int) -> Told:
    """One query sees a run of keys, less what is padding."""
    run = ((0, end),) if mask is None else mask.runs(0, range(own, own + 1), end)[1]
    if len(run) != 1:
        raise Unknown("a query that sees keys apart from each other")
    [(first, end)] = run
    seen = None if seen is None else seen[:, first:end]
    return Told((first, end), None if seen is None or bool(seen.all()) else seen[:, None, None])


def _is_causal(mask: Mask | None) -> bool:
    """Whether no query sees a key behind its own."""
    if isinstance(mask, Union):
        return all(_is_causal(part) for part in mask.of)
    return mask is not None and any(isinstance(part, masks.Causal) for part in mask.parts())


def _unpadded(attention_mask: Tensor | None, n: Lengths, end: int) -> Tensor | None:
    """Bool [batch, end]: the keys that are no padding. Raises Unknown."""
    if attention_mask is None:
        return None
    if not n.reads or type(attention_mask) is not Tensor or attention_mask.dtype is not torch.bool:
        raise Unknown("a padding mask on a device, or one that is no plain bool tensor")
    if attention_mask.dim() != 2 or attention_mask.shape[0] != n.batch:
        raise Unknown(f"a padding mask of shape {tuple(attention_mask.shape)}")
    seen = attention_mask[:, n.kv_start : n.kv_start + end]
    return seen if seen.shape[1] == end else torch.nn.functional.pad(seen, (0, end - seen.shape[1]))


def _longest(hidden: masks.Padding) -> int:
    """How many keys are left without those at the end that are padding for all; 0 where it cannot be said so."""
    lengths = hidden.lengths if isinstance(hidden.lengths, tuple) else (hidden.lengths,)
    if hidden.side != "right":
        return 0
    return max((length for length in lengths if isinstance(length, int)), default=0)
