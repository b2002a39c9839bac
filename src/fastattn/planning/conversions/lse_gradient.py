"""The gradient of the log-sum-exp, which no kernel's backward has: by torch's own operations, some rows at a time.

It is asked for where attention over parts of the keys is put together (fastattn.merge), and with sinks, in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastattn.kernels.kernel import Arguments, Run
from fastattn.kernels.plain_math import NEVER, visible_scores
from fastattn.problems.dense_masks import as_4d
from fastattn.problems.masks import Mask

BLOCK = 2**22  # of scores that are made at a time
ROWS = 256  # of a block at most, so that it is close to what a triangle or a document leaves


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
        saved: list[Any] = ctx.saved_tensors
        follows, wanted = torch.is_grad_enabled(), ctx.needs_input_grad[3:]
        with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
            # apart from the caller's graph: where k was made of q, the gradient must not be counted on the way to q as well
            parts: list[Any] = [
                x if x is None else x.view_as(x) if follows else x.detach().requires_grad_(is_wanted)
                for x, is_wanted in zip(saved, wanted, strict=True)
            ]
            q, k, mask = parts
            inputs = [x for x, is_wanted in zip((q, k, mask), wanted, strict=True) if is_wanted]
            found = _followed(q, k, mask, ctx, grad, inputs) if follows else _summed(q, k, mask, ctx, grad, inputs)
        each = iter(found)
        return None, None, None, *(next(each) if is_wanted else None for is_wanted in wanted)


def _followed(q: Tensor, k: Tensor, mask: Any, ctx: Any, grad: Tensor, inputs: list[Any]) -> list[Any]:
    """The gradients with a graph of their own, all rows at once."""
    told = ctx.told if ctx.told is not None else mask
    lse = _lse_of(q, k, told, ctx.a, slice(0, q.shape[0]), slice(0, q.shape[2]), (0, k.shape[2]))
    return list(torch.autograd.grad(lse, inputs, grad, create_graph=True))


def _summed(q: Tensor, k: Tensor, mask: Any, ctx: Any, grad: Tensor, inputs: list[Any]) -> list[Any]:
    """The gradients block by block: each is a graph over its own rows and the keys that they see."""
    told = ctx.told if ctx.told is not None else mask
    sums = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in inputs]
    for entries, rows, keys in _blocks(q, k, told, ctx.a):
        at = entries, slice(None), rows
        seen = entries, slice(None), slice(*keys)
        parts: list[Any] = [x[at] if x is q else x[seen] if x is k else x for x in inputs]
        parts = [x.detach().requires_grad_() if x is not mask else x for x in parts]
        own = dict(zip(map(id, inputs), parts, strict=True))
        part_of_q, part_of_k = own.get(id(q), q[at]), own.get(id(k), k[seen])
        lse = _lse_of(part_of_q, part_of_k, told, ctx.a, entries, rows, keys, (q.shape[2], k.shape[2]))
        gradients: Any = torch.autograd.grad(lse, parts, grad[at], allow_unused=True)
        for x, total, gradient in zip(inputs, sums, gradients, strict=True):
            if gradient is not None:
                (total[at] if x is q else total[seen] if x is k else total).add_(gradient)
    return [total.to(x.dtype) for x, total in zip(inputs, sums, strict=True)]


def _blocks(q: Tensor, k: Tensor, told: Any, a: Arguments) -> Iterator[tuple[slice, slice, tuple[int, int]]]:
    """(batch entries, rows, (first, last + 1) key that one of them may see)."""
    (batch, heads, q_len, _), kv_len = q.shape, k.shape[2]
    apart = isinstance(told, Mask) and told.is_per_batch()
    offset = told.offset(q_len, kv_len) if isinstance(told, Mask) else 0
    count = 1 if apart else batch
    rows = min(ROWS, max(1, BLOCK // max(1, count * heads * kv_len)))
    for b in range(0, batch, max(1, count)):
        for first in range(0, q_len, rows):
            last = min(first + rows, q_len)
            low = 0 if a.lower is None else max(0, first + a.lower)
            high = kv_len if a.upper is None else min(kv_len, last + a.upper)
            if isinstance(told, Mask):
                some = told.runs(b, range(first + offset, last + offset), kv_len)[0]
                low, high = (max(low, some[0][0]), min(high, some[-1][1])) if some else (0, 0)
            if low < high:
                yield slice(b, b + count), slice(first, last), (low, high)


def _lse_of(
    q: Tensor, k: Tensor, mask: Tensor | Mask | None, a: Arguments, entries: slice, rows: slice, keys: tuple[int, int],
    lengths: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    """The log-sum-exp of some rows over some keys, as autograd follows it; lengths: (q_len, kv_len) of the whole."""
    q_len, kv_len = lengths or (q.shape[2], k.shape[2])
    if isinstance(mask, Mask):
        i, j = (torch.arange(*part, dtype=torch.int64, device=q.device) for part in ((rows.start, rows.stop), keys))
        mask = mask.part(range(entries.start, entries.stop), i + mask.offset(q_len, kv_len), j, kv_len)
    elif mask is not None:
        mask = as_4d(mask)
        mask = mask[entries] if mask.shape[0] > 1 else mask
        mask = mask[:, :, rows] if mask.shape[2] > 1 else mask
        mask = mask[..., slice(*keys)] if mask.shape[3] > 1 else mask
    shift = rows.start - keys[0]
    lower, upper = (None if edge is None else edge + shift for edge in (a.lower, a.upper))
    scores = visible_scores(q, k, mask, a._replace(lower=lower, upper=upper))
    nothing = (scores.detach() == NEVER).all(-1)
    return torch.logsumexp(scores.masked_fill(nothing[..., None], 0.0), -1).masked_fill(nothing, NEVER).float()
