"""The gradient of the log-sum-exp, which no kernel's backward has: by torch's own operations, some rows at a time.

It is asked for where attention over parts of the keys is put together (fastattn.merge) in training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.kernels.kernel import Arguments, Run
from fastattn.kernels.plain_math import NEVER, visible_scores
from fastattn.problems.dense_masks import as_4d
from fastattn.problems.masks import Mask

BLOCK = 2**22  # of scores that are made at a time


def with_lse_gradient(step: Run) -> Run:
    """A step that returns (out, lse), its lse with a gradient."""

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Mask | None, a: Arguments) -> Any:
        out, lse = step(q, k, v, mask, a)  # type: ignore[arg-type]
        return out, _Lse.apply(lse.detach(), a, mask if isinstance(mask, Mask) else None, q, k, mask)

    return run


class _Lse(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, lse: Tensor, a: Arguments, told: Mask | None, q: Tensor, k: Tensor, mask: Any
    ) -> Tensor:
        ctx.save_for_backward(q, k, None if told is not None else mask)
        ctx.a, ctx.told = a, told
        return lse.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        q, k, mask = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        asked = [x for x, is_wanted in zip((q, k, mask), wanted, strict=True) if is_wanted]
        sums: list[Any] = [None] * len(asked)
        rows = max(1, BLOCK // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
        follows = torch.is_grad_enabled()
        with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
            for first in range(0, q.shape[2], rows):
                part = slice(first, min(first + rows, q.shape[2]))
                lse = _lse_of(q, k, ctx.told if ctx.told is not None else mask, ctx.a, part)
                found: Any = torch.autograd.grad(lse, asked, grad[:, :, part], create_graph=follows, allow_unused=True)
                sums = [b if a is None else a if b is None else a + b for a, b in zip(sums, found, strict=True)]
        each = iter(sums)
        return None, None, None, *(next(each) if is_wanted else None for is_wanted in wanted)


def _lse_of(q: Tensor, k: Tensor, mask: Tensor | Mask | None, a: Arguments, rows: slice) -> Tensor:
    """The log-sum-exp of some rows, float32, as autograd follows it."""
    if isinstance(mask, Mask):
        at = torch.arange(rows.start, rows.stop, dtype=torch.int64, device=q.device)
        mask = mask.dense(q.shape[0], q.shape[2], k.shape[2], q.device, rows=at)
    elif mask is not None and as_4d(mask).shape[2] > 1:
        mask = as_4d(mask)[:, :, rows]
    shift = rows.start
    lower, upper = (None if edge is None else edge + shift for edge in (a.lower, a.upper))
    scores = visible_scores(q[:, :, rows], k, mask, a._replace(lower=lower, upper=upper))
    nothing = (scores.detach() == NEVER).all(-1)
    return torch.logsumexp(scores.masked_fill(nothing[..., None], 0.0), -1).masked_fill(nothing, NEVER).float()
