"""What is done to masks that are tensors."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def additive(mask: Tensor, like: Tensor) -> Tensor:
    """A bool mask as the float mask that is added to the scores: 0 where it attends, -inf elsewhere.

    Made of the bits of -inf, as whole numbers: on a CPU to fill a tensor by a mask takes up to three times as long.
    """
    import torch

    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[like.itemsize]
    infinity = like.new_full((), float("-inf")).view(bits)
    return mask.logical_not().to(bits, memory_format=torch.contiguous_format).mul_(infinity).view(like.dtype)


def intersect(mask: Tensor | None, seen: Tensor) -> Tensor:
    """`mask` where `seen` is True and hidden elsewhere, in the form of `mask` (bool if there is none)."""
    if mask is None:
        return seen
    if mask.dtype is seen.dtype:
        return mask & seen
    return mask.masked_fill(seen.logical_not(), float("-inf"))


def sees_nothing(mask: Tensor, q_len: int, kv_len: int, lower: int | None = None, upper: int | None = None) -> Tensor:
    """(b|1, h|1, q_len) bool: the queries that a float mask within the band leaves no key."""
    seen = as_4d(mask) != float("-inf")
    seen = seen.expand(*seen.shape[:2], q_len, kv_len)
    if upper is not None:
        seen = seen.tril(upper)
    return (seen if lower is None else seen.triu(lower)).any(-1).logical_not()


FAR = 16.0  # from here on bfloat16 has steps of an eighth, as the scores themselves reach


def drowns_scores(mask: Tensor, is_banded: bool) -> bool:
    """Whether a float mask leaves scores in half precision few fractions: it is far from 0 in all that a row may see.

    Beside a band, which hides what is near 0, it is enough that it is far anywhere.
    """
    import torch

    if mask.dtype is torch.bool:
        return False
    if torch.compiler.is_compiling():  # a graph has no branch by value
        return True
    told = mask[tuple(slice(0, 1) if step == 0 else slice(None) for step in mask.stride())]
    top = told if is_banded else told.amax(-1)
    return bool(((top.abs() >= FAR) & (top != float("-inf"))).any())


def as_bias(mask: Tensor, like: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """A float mask as kernels read it by vectors: in the dtype of `like`, (b, h, q_len, kv_len), rows at multiples of 16 bytes.

    Where they are not it becomes a slice of a padded tensor.
    """
    mask, kv_len = as_4d(mask).to(like.dtype), shape[3]
    step = 16 // mask.itemsize
    pitch = -(-kv_len // step) * step  # a row is read to the end of its last vector
    if not (
        mask.shape[3] == kv_len
        and (mask.stride(3) == 1 and mask.storage_offset() % step == 0)
        and all(st % step == 0 for st in mask.stride()[:3])
        and (kv_len == pitch or mask.stride(2) >= pitch)
    ):
        padded = mask.new_zeros((*mask.shape[:3], pitch))
        padded[..., :kv_len] = mask
        mask = padded[..., :kv_len]
    return mask.expand(shape)


def as_4d(mask: Tensor) -> Tensor:
    """(b|1, h|1, q|1, k|1) of a 2-D or 4-D mask."""
    return mask if mask.dim() == 4 else mask[None, None]


def as_bytes(x: Tensor) -> bytes:
    """What a contiguous tensor on the CPU holds. Not by numpy, which torch works without."""
    return ctypes.string_at(x.data_ptr(), x.nbytes)
