"""Triangles and windows as a band of the score matrix: between which diagonals a query sees keys.

Torch's triangle, the corner "top_left", lets query i see key j when j <= i. With "bottom_right" it sees key j when
j <= i + kv_len - q_len, so the last query sees every key: what decoding with a KV cache wants.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

CORNERS = ("top_left", "bottom_right")
Sides = tuple[int, int]  # (left, right) keys that a query sees beside its own; -1 is no limit


def band(corner: str | None, window: Sides | None, q_len: int, kv_len: int) -> tuple[int | None, int | None]:
    """(lower, upper): key j is visible to query i when i + lower <= j <= i + upper; None is no limit.

    A window lies around the diagonal of the causal corner, around the top-left one where nothing is causal.
    """
    at = kv_len - q_len if corner == "bottom_right" else 0
    left, right = window or (-1, -1)
    upper = at if corner is not None else at + right if right >= 0 else None
    return (at - left if left >= 0 else None), upper


def simplest_band(
    corner: str | None, is_causal: bool, window: Sides | None, q_len: int, kv_len: int
) -> tuple[str | None, Sides | None]:
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
