"""DTensors that are sharded alike over batch or heads, or replicated: each rank attends on its own parts, and none waits.

Any other placement is F.sdpa's affair.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastattn.dispatch.circumstances import PASS, Circumstances, what_is_allowed
from fastattn.problems.layouts import TO_BHSD

Call = Callable[..., Any]


def local_sdpa(circumstances: Circumstances, tensors: list[Any], options: tuple[Any, ...]) -> Call | None:
    """The Call of sdpa() on each rank's parts; None where that is not the answer. tensors: q, k, v, and a mask or none."""
    dropout_p, is_causal, scale, enable_gqa = options
    if not _are_alike(circumstances, tensors, 0, 1) or dropout_p:
        return None
    from fastattn.dispatch.sdpa import sdpa

    return _on_parts(lambda q, k, v, mask: sdpa(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa))


def local_attention(
    circumstances: Circumstances, q: Any, k: Any, v: Any, mask: Any, layout: str, given: dict[str, Any]
) -> Call | None:
    """The same of attention(). A mask with a meaning may be of the whole batch, and is not served so."""
    tensors = [q, k, v] if mask is None else [q, k, v, mask]
    if not circumstances.foreign or not _are_alike(circumstances, tensors, *TO_BHSD[layout][:2]):
        return None
    if given.get("dropout_p") or given.get("return_lse") or given.get("score_mod") is not None:
        return None
    from fastattn.dispatch.attention import attention

    return _on_parts(lambda q, k, v, mask: attention(q, k, v, mask, layout, **given))


def _are_alike(circumstances: Circumstances, tensors: list[Any], batch: int, heads: int) -> bool:
    """Whether each rank's output is attention of its own parts. batch, heads: these dimensions of q, k and v."""
    if not circumstances.foreign or type(tensors[0]).__name__ != "DTensor":
        return False
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if what_is_allowed(circumstances._replace(foreign=False))[0] == PASS or not all(
        type(x) is DTensor for x in tensors
    ):
        return False
    (q, k, v), masks = tensors[:3], tensors[3:]
    if any(x.device_mesh != q.device_mesh for x in tensors) or not q.placements == k.placements == v.placements:
        return False
    split = [(n, p) for n, p in zip(q.device_mesh.shape, q.placements, strict=True) if type(p) is not Replicate]
    dims = [p.dim if type(p) is Shard else None for _, p in split]
    if not q.dim() == k.dim() == v.dim() == 4 or len(set(dims)) < len(dims) or not set(dims) <= {batch, heads}:
        return False
    # the parts are of one size: else heads of q may lie apart from their keys
    if any(x.shape[dim] % n for x in (q, k, v) for (n, _), dim in zip(split, dims, strict=True) if dim is not None):
        return False
    at = [-4 if dim == batch else -3 for dim in dims]
    return all(_is_whole(mask, at, Replicate) for mask in masks)


def _is_whole(mask: Any, at: list[int], replicate: type) -> bool:
    """Whether each rank has all of the mask that its part needs, and its gradient is no sum over ranks. at: what is split."""
    is_split = any(mask.dim() >= -dim and mask.shape[dim] != 1 for dim in at)
    asks_grad = mask.requires_grad and torch.is_grad_enabled()
    return all(type(p) is replicate for p in mask.placements) and not (is_split or asks_grad)


def _on_parts(call: Call) -> Call:
    """call(q, k, v, mask) on each rank's parts, its output placed as q is, with gradients."""
    from torch.distributed.tensor import DTensor

    def run(q: Any, k: Any, v: Any, mask: Any) -> Any:
        out = call(q.to_local(), k.to_local(), v.to_local(), mask if mask is None else mask.to_local())
        return DTensor.from_local(out, q.device_mesh, q.placements, run_check=False)

    return run
