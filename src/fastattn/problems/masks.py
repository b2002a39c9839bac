"""Masks with a structure: they stay values until a kernel needs them dense.

`is_causal=True` is torch's triangle, `Causal("top_left")`: query i sees key j when j <= i. With `Causal("bottom_right")`
it sees key j when j <= i + kv_len - q_len, so the last query sees every key: what decoding with a KV cache wants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

CORNERS = ("top_left", "bottom_right")


@dataclass(frozen=True, slots=True)
class Causal:
    """A triangle anchored at a corner of the (q_len, kv_len) score matrix.

    Raises ValueError if `corner` is neither "top_left" nor "bottom_right".
    """

    corner: str = "top_left"

    def __post_init__(self) -> None:
        if self.corner not in CORNERS:
            raise ValueError(f"corner must be one of {', '.join(map(repr, CORNERS))}, got {self.corner!r}")


Window = tuple[int, int]  # (left, right) keys that a query sees beside its own; -1 is no limit


def band(corner: str | None, window: Window | None, q_len: int, kv_len: int) -> tuple[int | None, int | None]:
    """(lower, upper): key j is visible to query i when i + lower <= j <= i + upper; None is no limit.

    A window lies around the diagonal of the causal corner, around the top-left one where nothing is causal.
    """
    at = kv_len - q_len if corner == "bottom_right" else 0
    left, right = window or (-1, -1)
    upper = at if corner is not None else at + right if right >= 0 else None
    return (at - left if left >= 0 else None), upper


def simplest_band(
    corner: str | None, is_causal: bool, window: Window | None, q_len: int, kv_len: int
) -> tuple[str | None, Window | None]:
    """(corner, window) that hide the same keys as these together with torch's triangle (is_causal), in their simplest form."""
    if is_causal:  # the intersection of two triangles is the smaller one
        corner = "bottom_right" if corner == "bottom_right" and kv_len < q_len else "top_left"
    if corner == "bottom_right" and q_len == kv_len:
        corner = "top_left"
    if window and corner:
        window = None if window[0] < 0 else (window[0], -1)  # to the right the triangle ends it
    if corner == "bottom_right" and q_len == 1 and window is None:
        corner = None  # one query at the bottom right sees every key
    return corner, window


def visible(like: Tensor, q_len: int, kv_len: int, lower: int | None, upper: int | None) -> Tensor:
    """(q_len, kv_len) bool, True where the query attends."""
    import torch

    seen = torch.ones(q_len, kv_len, dtype=torch.bool, device=like.device)
    if upper is not None:
        seen.tril_(upper)
    return seen if lower is None else seen.triu_(lower)


def additive(mask: Tensor, like: Tensor) -> Tensor:
    """A bool mask as the float mask that is added to the scores: 0 where it attends, -inf elsewhere."""
    return like.new_zeros(mask.shape).masked_fill_(mask.logical_not(), float("-inf"))


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
