"""softmax(q k^T) v by torch's own products, accumulated in float32: what can do every problem, and can be differentiated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.kernels.kernel import Arguments

NEVER = float("-inf")  # the score of a hidden key


def fold(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(n, group * q_len, d), (n, kv_len, d), (n, kv_len, dv) of n = batch * kv_heads; views where strides allow."""
    b, kv_heads, kv_len, d = k.shape
    n = b * kv_heads
    rows = q.shape[1] // max(1, kv_heads) * q.shape[2]
    return q.reshape(n, rows, d), k.reshape(n, kv_len, d), v.reshape(n, kv_len, v.shape[3])


def unfold(out: Tensor, shape: Sequence[int]) -> Tensor:
    """A kernel's fresh output in another shape: no view of it where there is no graph, as stock torch's are none.

    A view that was made without gradients may not be changed in place with them.
    """
    if torch.compiler.is_compiling() or out.requires_grad or not out.is_contiguous():
        return out.reshape(shape)
    return out.resize_(shape)


def outside(scores: Tensor, a: Arguments) -> Iterator[Tensor]:
    """(q_len, kv_len) bool: the keys above the band, then those below."""
    if a.upper is not None:
        yield torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).triu_(a.upper + 1)
    if a.lower is not None:
        yield torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril_(a.lower - 1)


def all_rows_see(q_len: int, kv_len: int, mask: Tensor | None, a: Arguments) -> bool:
    """Whether no row can be left without a key."""
    sees_below = a.upper is None or a.upper >= 0
    return mask is None and kv_len > 0 and sees_below and (a.lower is None or q_len - 1 + a.lower < kv_len)


def sdpa_math(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
    """Attention of (b, h, s, d) tensors as the contract of a kernel asks; a row that sees nothing becomes zeros."""
    scores, nothing = visible_scores(q, k, mask, a), None
    if not all_rows_see(q.shape[2], k.shape[2], mask, a):
        nothing = (scores.detach() == NEVER).all(-1, keepdim=True)
        scores = scores.masked_fill(nothing, 0.0)
    weights = torch.softmax(scores, -1)
    weights = weights if nothing is None else weights.masked_fill(nothing, 0.0)
    if a.dropout_p:
        weights = torch.dropout(weights, a.dropout_p, True)
    q3, _, v3 = fold(q, k, v)
    out = torch.bmm(weights.view(*q3.shape[:2], k.shape[2]), v3.to(scores.dtype))
    out = out.view(*q.shape[:3], v.shape[3]).to(q.dtype)
    if not a.lse:
        return out
    lse = torch.logsumexp(scores, -1).float()
    return out, lse if nothing is None else lse.masked_fill(nothing[..., 0], NEVER)


def visible_scores(q: Tensor, k: Tensor, mask: Tensor | None, a: Arguments) -> Tensor:
    """(b, h, q_len, kv_len) scores in float32 or float64: capped, biased, NEVER where a key is hidden."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q3, k3 = (x.to(dtype) for x in fold(q, k, k)[:2])
    scores = (torch.bmm(q3, k3.mT) * a.scale).view(*q.shape[:3], k.shape[2])
    if a.softcap:
        scores = torch.tanh(scores / a.softcap) * a.softcap
    if mask is not None and mask.dtype is not torch.bool:
        scores = scores + mask
    hidden = mask.logical_not() if mask is not None and mask.dtype is torch.bool else None
    for beyond in outside(scores, a):
        hidden = beyond if hidden is None else hidden | beyond
    return scores if hidden is None else scores.masked_fill(hidden, NEVER)
