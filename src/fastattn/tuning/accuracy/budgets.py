"""The budgets: how far from float64 a candidate may be, row by row, before it is timed.

Rung "exact", per output row i of a head:

    max_d |o - o64| <= c (e32_i + (u + 2^-23 S_i) (P|V|)_i)        c = 2, for float32 and float64 outputs c = 4

  e32_i       that row's error of float32 math rounded to the output dtype, under the caller's precision flags
  u           unit roundoff of the output dtype
  (P|V|)_i    max_d sum_j p_ij |v_jd|, the scale of what is summed
  S_i         sum_j p_ij sum_d |q_id k_jd scale| (and the bias): a float32 score is off by some 2^-24 of its terms, its
              weight by as much, and so is the sum it is divided by. e32_i is one draw of that error and can be zero by
              luck where few keys matter; without this term equally good float32 kernels fail. Taken as 0 for half
              dtypes, where it cannot matter

Gradients, per head:

    max |g - g64| <= 3 (e32 + (u + 2^-24 max|lse|) max|g64| + D)

  2^-24 max|lse|   what rebuilding P from a float32 log-sum-exp costs every flash backward
  D                what rounding costs where the gradient cancels, as with one visible key, or keys with a large common part
                   (reference.Gradients.cancelling): delta = sum_d o_d do_d is taken from the rounded output, P and dS are
                   rounded before their products

Rung "dtype": max_d |o - o64| <= 2 (e_plain + u (P|V|)_i), e_plain the head's largest error of plain matmul and softmax in the
input's dtype (the rule of FlashAttention's own tests), gradients likewise.
A number: max_d |o - o64| <= number x (P|V|)_i.
The log-sum-exp, float32 whatever the inputs are:

    |lse - lse64| <= 4 (e32 + 2^-24 (1 + |lse| + S_i))

An error is reported in budgets: 1.0 is the most that is allowed.
"""

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
