"""A forward without a graph, in blocks, and a backward of our own that makes each block's scores again.

FlashAttention, arXiv 2205.14135, algorithm 4, with torch's own products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.kernels.kernel import Arguments, Backward, Kernel, Run
from fastattn.planning.conversions.blocks import blocks_of, forward
from fastattn.planning.conversions.conversion import NO, REQUIRED
from fastattn.planning.conversions.double_backward import followed_gradients, must_be_followed
from fastattn.planning.default_output import is_fused, output_order
from fastattn.problems.call_facts import CallFacts
from fastattn.problems.problem import Problem


def when_recompute(kernel: Kernel, p: Problem, facts: CallFacts) -> str:
    return REQUIRED if p.needs_grad and kernel.load_backward is not None else NO


def recompute(step: Run, kernel: Kernel, p: Problem, facts: CallFacts) -> Run:
    assert kernel.load_backward is not None
    backward, order = kernel.load_backward(), output_order(p, facts)
    keeps_output = is_fused(p, facts)  # F.sdpa's math does not, and lets its caller change it

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        return _Recomputed.apply(step, backward, order, keeps_output, a, q, k, v, mask)

    return run


class _Recomputed(torch.autograd.Function):
    """Saves q, k, v, mask and, where it is not the caller's to change, the output; no scores."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        step: Run,
        backward: Backward,
        order: Any,
        keeps_output: bool,
        a: Arguments,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
    ) -> Any:
        found = forward(step, order, blocks_of(q, k, a), q, k, v, mask, a)
        out, lse = found if a.lse else (found, None)
        ctx.save_for_backward(q, k, v, mask, out if keeps_output else None)
        ctx.step_back, ctx.a = backward, a._replace(lse=False)
        if lse is None:
            return out
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:  # type: ignore[override]
        q, k, v, mask, out = ctx.saved_tensors
        if must_be_followed(grad):
            wanted = ctx.needs_input_grad[5:]
            return None, None, None, None, None, *followed_gradients(q, k, v, mask, ctx.a, grad, wanted)
        # several blocks add to the same keys: their sum is rounded once
        wide = torch.promote_types(q.dtype, torch.float32)
        dq = torch.empty_like(q)
        dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        dmask = torch.zeros(mask.shape, dtype=wide, device=q.device) if ctx.needs_input_grad[8] else None
        with torch.autocast(q.device.type, enabled=False):  # the caller's may be on while its backward runs
            for block in blocks_of(q, k, ctx.a):
                given = block.inputs(q, k, v, mask, ctx.a)
                part = None if out is None else out[block.query]
                found = ctx.step_back(*given[:4], part, grad[block.query], given[4])
                kv = (block.batch, block.kv_heads, block.keys)
                dq[block.query] = found[0]
                dk[kv] += found[1]
                dv[kv] += found[2]
                if dmask is not None:
                    part = block.of_mask(dmask)
                    assert part is not None
                    part += found[3].sum_to_size(part.shape)
                del found  # the next block works in its memory
        of_mask = dmask.to(mask.dtype) if dmask is not None else None
        return None, None, None, None, None, dq, dk.to(k.dtype), dv.to(v.dtype), of_mask
