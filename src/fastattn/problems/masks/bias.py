"""Bias: a tensor that is added to the scores, as a part of a mask with a meaning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastattn.environment.text import dtype_name, type_name
from fastattn.problems.masks import runs
from fastattn.problems.masks.mask import Mask
from fastattn.problems.masks.runs import Runs

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Bias(Mask):
    """All keys are seen; a tensor is added to the scores: `masks.Causal() & masks.Document(512) & masks.Bias(bias)`.

    tensor: float [q_len, kv_len] or [batch or 1, heads or 1, q_len or 1, kv_len], read in each call; it may want a gradient.
    Row i is of query i, whatever the corner. Goes with &, and equals itself alone. Raises TypeError for what is no float
    tensor, ValueError for other dimensions.
    """

    tensor: Tensor

    def __post_init__(self) -> None:
        import torch

        if not isinstance(self.tensor, torch.Tensor) or not self.tensor.is_floating_point():
            dtype = f" of {dtype_name(self.tensor.dtype)}" if isinstance(self.tensor, torch.Tensor) else ""
            raise TypeError(f"a bias is a float Tensor, got {type_name(self.tensor)}{dtype}")
        if self.tensor.dim() not in (2, 4):
            raise ValueError(
                "a bias is [q_len, kv_len] or [batch or 1, heads or 1, q_len or 1, kv_len],"
                f" got shape {tuple(self.tensor.shape)}"
            )

    def sees(self, b: Tensor, p: Tensor, j: Tensor, kv_len: int) -> Tensor:
        return j >= 0

    def runs(self, b: int, rows: range, kv_len: int) -> tuple[Runs, Runs]:
        all_keys = runs.run(0, kv_len, kv_len)
        return all_keys, all_keys

    def added(self) -> tuple[Tensor, ...]:
        return (self.tensor,)

    def check(self, batch: int, heads: int, q_len: int, kv_len: int) -> None:
        whole = (batch, heads, q_len, kv_len)
        shape = (1, 1, *self.tensor.shape)[-4:]
        if any(n not in (1, most) for n, most in zip(shape, whole, strict=True)):
            raise ValueError(f"{self!r} does not fit [batch, heads, q_len, kv_len] {whole}")

    def __repr__(self) -> str:
        return f"Bias({'x'.join(map(str, self.tensor.shape))} {dtype_name(self.tensor.dtype)})"
