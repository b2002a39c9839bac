"""fastattn.tuning.accuracy.budgets"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattn.problems.problem import Problem
from fastattn.tuning.accuracy import reference

ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53}


@dataclass(frozen=True, slots=True)
class Errors:
    """The largest errors found, in budgets; backward is None where no gradient is wanted."""

    forward: float
    backward: float | None = None

    @property
    def passed(self) -> bool:
        return self.forward <= 1.0 and (self.backward is None or self.backward <= 1.0)

    def worst(self, other: Errors | None) -> Errors:
        """The larger of both, part by part."""
        if other is None:
            return self
        backward = [e for e in (self.backward, other.backward) if e is not None]
        return Errors(max(self.forward, other.forward), max(backward) if backward else None)


def row_budget(exact: reference.Result, e_rows: Tensor, p: Problem, shrink: float = 1.0) -> Tensor:
    """(g, r): what each row's error may be; e_rows is that of the rounded computation."""
    dtype, u = p.torch_dtype, ROUNDOFF[p.torch_dtype]
    if p.accuracy == "dtype":
        return 2 * (e_rows.amax() + u * exact.spread)
    if isinstance(p.accuracy, float):
        return p.accuracy * exact.spread
    c = 4 if dtype in (torch.float32, torch.float64) else 2
    return c * (e_rows + (u + 2.0**-23 * shrink * exact.noise) * exact.spread)


def rounded_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).double()


def largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def score_size(result: reference.Result) -> float:
    """max(|lse|, S): the size of the scores whose float32 rounding reaches the weights."""
    finite = result.lse[result.lse.isfinite()]
    return max(largest(finite), largest(result.noise))


def in_budgets(error: Tensor, budget: Tensor) -> float:
    """The largest error / budget; a NaN, or an error where none is allowed, is infinite."""
    if not error.numel():
        return 0.0
    ratio = torch.where(error == 0, torch.zeros_like(error), error / budget)
    return float(ratio.nan_to_num(nan=float("inf")).max())
