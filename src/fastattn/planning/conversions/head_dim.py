"""Head dims padded with zeros."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from fastattn.kernels.kernel import Arguments, Kernel, Run
from fastattn.planning.conversions.conversion import NO, REQUIRED, map_output
from fastattn.problems.call_facts import CallFacts, Each
from fastattn.problems.problem import Problem


def _width(kernel: Kernel, head_dim: int, itemsize: int) -> int:
    if kernel.head_dims:
        return next((width for width in kernel.head_dims if width >= head_dim), head_dim)
    step = max(kernel.head_dim_multiple, kernel.head_dim_bytes // itemsize)
    return -(-head_dim // step) * step


def _widths(kernel: Kernel, p: Problem) -> tuple[int, int]:
    width, width_v = (_width(kernel, d, p.torch_dtype.itemsize) for d in (p.head_dim, p.head_dim_v))
    widest = max(width, width_v)
    return (widest, widest) if kernel.equal_head_dims else (width, width_v)


def pads(kernel: Kernel, p: Problem) -> Each:
    """Which of q, k and v are made anew, with zeros behind them."""
    width, width_v = _widths(kernel, p)
    return width > p.head_dim, width > p.head_dim, width_v > p.head_dim_v


def when_head_dim_pad(kernel: Kernel, p: Problem, facts: CallFacts) -> str:
    return NO if _widths(kernel, p) == (p.head_dim, p.head_dim_v) else REQUIRED


def head_dim_pad(step: Run, kernel: Kernel, p: Problem, facts: CallFacts) -> Run:
    width, width_v = _widths(kernel, p)
    more, more_v, head_dim_v = width - p.head_dim, width_v - p.head_dim_v, p.head_dim_v

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        if more:  # zeros add nothing to q k^T; the scale was taken from the caller's head_dim
            q, k = pad(q, (0, more)), pad(k, (0, more))
        if more_v:
            found = step(q, k, pad(v, (0, more_v)), mask, a)
            return map_output(found, lambda out: out[..., :head_dim_v].clone())  # dense, and in a storage of its own
        return step(q, k, v, mask, a)

    return run
