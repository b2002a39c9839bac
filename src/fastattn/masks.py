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


def diagonal(corner: str, q_len: int, kv_len: int) -> int:
    """Key j is visible to query i when j <= i + diagonal."""
    return 0 if corner == "top_left" else kv_len - q_len


def triangle(like: Tensor, q_len: int, kv_len: int, diagonal: int) -> Tensor:
    """(q_len, kv_len) bool, True where the query attends."""
    import torch

    return torch.ones(q_len, kv_len, dtype=torch.bool, device=like.device).tril_(diagonal)


def additive(mask: Tensor, like: Tensor) -> Tensor:
    """A bool mask as the float mask that is added to the scores: 0 where it attends, -inf elsewhere."""
    return like.new_zeros(mask.shape).masked_fill_(mask.logical_not(), float("-inf"))


def intersect(mask: Tensor | None, like: Tensor, q_len: int, kv_len: int, diagonal: int) -> Tensor:
    """`mask` and the triangle at once, in the form of `mask` (bool if there is none)."""
    visible = triangle(like, q_len, kv_len, diagonal)
    if mask is None:
        return visible
    if mask.dtype is visible.dtype:
        return mask & visible
    return mask.masked_fill(visible.logical_not(), float("-inf"))
