"""Second derivatives: F.sdpa's math has them, and most kernels' backwards cannot be differentiated.

Gradients that are to be differentiated again are made by torch's own operations, all others by the kernel's backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.environment.torch_private import functorch_level, is_batched
from fastattn.kernels.kernel import Arguments, Run
from fastattn.kernels.plain_math import sdpa_math
from fastattn.planning.conversions.conversion import map_output
from fastattn.problems.masks import Mask


def must_be_followed(grad: Tensor) -> bool:
    """In a backward: whether its gradients are to be differentiated again, or are many at once."""
    return torch.is_grad_enabled() or is_batched(grad) or functorch_level() is not None


def followed_gradients(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Mask | None, a: Arguments, grad: Tensor, wanted: Sequence[bool]
) -> Iterator[Tensor | None]:
    """The gradients by operations that autograd follows, for what is wanted of q, k, v and the mask."""
    if isinstance(mask, Mask):
        mask = mask.dense(q.shape[0], q.shape[2], k.shape[2], q.device)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
        # views: where one input was made of another, its gradient must not be counted on the way to that one as well
        inputs = [x if x is None else x.view_as(x) for x in (q, k, v, mask)]
        out = sdpa_math(*inputs[:4], a)  # type: ignore[arg-type]
        asked = [x for x, is_wanted in zip(inputs, wanted, strict=True) if is_wanted and x is not None]
        found = iter(torch.autograd.grad(out, asked, grad, create_graph=create_graph))
    return (next(found) if is_wanted else None for is_wanted in wanted)


def twice_differentiable(step: Run) -> Run:
    """The step, with a backward that can be differentiated; its output is one that the step's own backward does not read."""

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        found = step(q, k, v, mask, a)
        if torch.compiler.is_compiling():  # a graph of torch.compile has no second derivatives
            return found
        return map_output(found, lambda out: _Followed.apply(a._replace(lse=False), out, q, k, v, mask))

    return run


class _Followed(torch.autograd.Function):
    """A gradient goes back through the output to the kernel's backward, or past it to the inputs."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, a: Arguments, out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Mask | None
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, mask if isinstance(mask, Tensor) else None)
        ctx.a, ctx.told = a, mask if isinstance(mask, Mask) else None
        return out.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        if not must_be_followed(grad):
            return None, grad, None, None, None, None
        q, k, v, mask = ctx.saved_tensors
        return None, None, *followed_gradients(q, k, v, ctx.told or mask, ctx.a, grad, ctx.needs_input_grad[2:])
