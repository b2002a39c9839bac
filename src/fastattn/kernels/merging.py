"""Attention over parts of the keys, put together by their log-sum-exps (FlashDecoding, ring attention)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.kernels.plain_math import NEVER
from fastattn.problems.layouts import LSE_IN_OUTPUT


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor], layout: str = "bhsd") -> tuple[Tensor, Tensor]:
    """(out, lse) of attention over all keys, from attention(..., return_lse=True) over parts of them.

    outs: of one shape, in `layout`; lses: float32 [batch, q_heads, q_len], or [q_heads, tokens] in "thd". A key must lie in one
    part only; a row that sees nothing in any part gives zeros. Sums are made in float32, or in float64 where the outs are.
    Gradients go through both, so that parts may be computed anywhere. Raises ValueError where shapes or counts do not fit.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(f"merge(): outs and lses must be as many, at least one each, got {len(outs)} and {len(lses)}")
    if layout not in LSE_IN_OUTPUT:
        raise ValueError(f"merge(): layout must be one of {', '.join(map(repr, LSE_IN_OUTPUT))}, got {layout!r}")
    order = LSE_IN_OUTPUT[layout]
    for out, lse in zip(outs, lses, strict=True):
        fits = lse.dim() == len(order) and out.shape[:-1] == tuple(lse.shape[i] for i in order)
        if not fits or out.shape != outs[0].shape:
            raise ValueError(
                f"merge(): outs are of one shape in layout {layout!r}, each lse of its heads and rows; got"
                f" {[tuple(x.shape) for x in outs]} and {[tuple(x.shape) for x in lses]}"
            )
    parts = torch.stack(list(lses))
    nothing = (parts.detach() == NEVER).all(0)
    total = torch.logsumexp(parts.masked_fill(nothing, 0.0), 0)
    weights = (parts - total).exp()  # 0 where a part sees nothing
    wide = torch.promote_types(outs[0].dtype, torch.float32)
    scaled = [out.to(wide) * weight.permute(order)[..., None] for out, weight in zip(outs, weights, strict=True)]
    return torch.stack(scaled).sum(0).to(outs[0].dtype), total.masked_fill(nothing, NEVER)
