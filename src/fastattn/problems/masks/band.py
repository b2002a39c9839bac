"""The masks that are bands along the diagonal: the triangle and the window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastattn.problems.bands import CORNERS
from fastattn.problems.masks import runs
from fastattn.problems.masks.mask import Mask
from fastattn.problems.masks.runs import Runs
from fastattn.problems.masks.values import whole_numbers

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, repr=False)
class Causal(Mask):
    """A query sees the keys up to its own: j <= p.

    corner: where position 0 lies. "top_left", torch's: p = i. "bottom_right": p = i + kv_len - q_len, so that the last query
    sees every key: what decoding with a KV cache wants. Raises ValueError for another corner.
    """

    corner: str = "top_left"

    def __post_init__(self) -> None:
        if self.corner not in CORNERS:
            raise ValueError(f"corner must be one of {', '.join(map(repr, CORNERS))}, got {self.corner!r}")

    @property
    def anchor(self) -> str:
        return self.corner

    def fixes_corner(self) -> bool:
        return True

    def sees(self, b: Tensor, p: Tensor, j: Tensor, kv_len: int) -> Tensor:
        return j <= p

    def runs(self, b: int, rows: range, kv_len: int) -> tuple[Runs, Runs]:
        return runs.run(0, rows[-1] + 1, kv_len), runs.run(0, rows[0] + 1, kv_len)

    def shifts(self) -> bool:
        return True


@dataclass(frozen=True, slots=True, repr=False)
class Window(Mask):
    """Local attention: a query sees `left` keys before its own, its own, and `right` keys behind it; -1 is no limit.

    Raises TypeError or ValueError for anything else.
    """

    left: int
    right: int

    def __post_init__(self) -> None:
        whole_numbers("left and right", (self.left, self.right), -1)

    def sees(self, b: Tensor, p: Tensor, j: Tensor, kv_len: int) -> Tensor:
        seen = j >= p - self.left if self.left >= 0 else j >= 0
        return seen & (j <= p + self.right) if self.right >= 0 else seen

    def runs(self, b: int, rows: range, kv_len: int) -> tuple[Runs, Runs]:
        def between(low: int, high: int) -> Runs:
            first = low - self.left if self.left >= 0 else 0
            return runs.run(first, high + self.right + 1 if self.right >= 0 else kv_len, kv_len)

        return between(rows[0], rows[-1]), between(rows[-1], rows[0])

    def shifts(self) -> bool:
        return True
