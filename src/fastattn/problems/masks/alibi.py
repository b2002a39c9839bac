"""ALiBi: a mask that hides nothing and adds to the scores."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

from fastattn.problems.masks import runs
from fastattn.problems.masks.mask import Mask
from fastattn.problems.masks.runs import Runs
from fastattn.problems.masks.values import whole_numbers

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, repr=False)
class ALiBi(Mask):
    """All keys are seen; slope x (j - p) is added to the scores, a slope for each head (arXiv 2108.12409). Goes with &.

    slopes: numbers, or how many heads there are: 2^(-8 (h + 1) / heads) each, as for a power of two there. Raises TypeError
    or ValueError for anything else.
    """

    slopes: int | tuple[float, ...]

    def __init__(self, slopes: Any) -> None:
        if isinstance(slopes, int):
            whole_numbers("slopes", slopes, 1)
        else:
            slopes = tuple(float(slope) for slope in (slopes.tolist() if hasattr(slopes, "tolist") else slopes))
            if not slopes or not all(isfinite(slope) for slope in slopes):
                raise ValueError(f"slopes must be finite numbers, one or more, got {slopes}")
        object.__setattr__(self, "slopes", slopes)

    def sees(self, b: Tensor, p: Tensor, j: Tensor, kv_len: int) -> Tensor:
        return j >= 0

    def bias(self, p: Tensor, j: Tensor) -> Tensor:
        import torch

        return p.new_tensor(self._each(), dtype=torch.float64)[:, None, None] * (j - p[:, None])

    def _each(self) -> tuple[float, ...]:
        n = self.slopes
        return tuple(2.0 ** (-8 * (h + 1) / n) for h in range(n)) if isinstance(n, int) else n

    def for_heads(self, count: int) -> Mask:
        return ALiBi((self._each() * -(-count // self.heads()))[:count])

    def check(self, batch: int, heads: int, q_len: int, kv_len: int) -> None:
        if self.heads() != heads:
            raise ValueError(f"{self!r} is for {self.heads()} query heads, got {heads}")

    def heads(self) -> int:
        return self.slopes if isinstance(self.slopes, int) else len(self.slopes)

    def runs(self, b: int, rows: range, kv_len: int) -> tuple[Runs, Runs]:
        all_keys = runs.run(0, kv_len, kv_len)
        return all_keys, all_keys

    def shifts(self) -> bool:
        return True

    def like(self, kv_len: int) -> Mask:
        return ALiBi(self.heads())
