"""Judging a candidate on the tensors of one call: a slice of them in a tuning, or its first output where the caller's own
function is part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.problems import dense_masks
from fastattn.problems.layouts import as_dense_as, to_bhsd
from fastattn.problems.masks import Mask
from fastattn.problems.problem import Problem
from fastattn.tuning.accuracy import reference
from fastattn.tuning.accuracy.budgets import Errors, in_budgets, rounded_to, row_budget
from fastattn.tuning.accuracy.judge import Judge, row_sample
from fastattn.tuning.accuracy.sample import Sample

Call = Callable[[Tensor, Tensor, Tensor, Any], Any]


def judge_of_call(p: Problem, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float) -> Judge | None:
    """A slice of the caller's own tensors: one batch entry and one kv head, never less than the whole length."""
    dtype = p.torch_dtype  # as autocast would cast
    wholes = [to_bhsd(x.detach(), p.layout) for x in (q, k, v)]
    parts = [whole[:1, :n] for whole, n in zip(wholes, (p.group, 1, 1), strict=True)]
    views = [_ordinary(as_dense_as(whole, x).to(dtype)) for whole, x in zip(wholes, parts, strict=True)]
    if isinstance(mask, Tensor):
        mask = dense_masks.as_4d(mask.detach())[:1, : p.group]
        mask = mask if p.mask in (None, "bool") else _ordinary(mask.to(getattr(torch, p.mask)))
    elif isinstance(mask, Mask):
        mask = mask.for_heads(p.group)
    if not all(_is_finite(x) for x in views):
        return None  # garbage in a cache's tail or a warm-up tells nothing about a kernel
    one = p.replace(batch=1, q_heads=p.group, kv_heads=1, layout="bhsd", lengths="exact", cast_from=())
    grad = None
    if p.needs_grad:
        views = [x.requires_grad_() for x in views]
        mask = mask.requires_grad_() if isinstance(mask, Tensor) and p.mask_grad else mask
        grad = views[0].new_ones(1, p.group, p.q_len, p.head_dim_v, dtype=p.torch_dtype)
    return Judge(Sample(one, views[0], views[1], views[2], mask, grad), scale)


def _ordinary(x: Tensor) -> Tensor:
    """The same, and no tensor of inference mode, which could not ask for a gradient."""
    return x.clone() if x.is_inference() else x


def errors_of_custom(
    call: Call, p: Problem, given: tuple[Any, ...], scale: float, change: Callable[[Tensor, Tensor], Tensor]
) -> Errors | None:
    """The forward error of a call with the caller's own function on the caller's tensors, one kv head of the first batch entry.

    change(scores (g, r, kv_len), rows (r)): what that function makes of the scores, -inf where it hides a key. None where the
    tensors hold values that tell nothing.
    """
    q, k, v, mask = given
    out = call(q, k, v, mask)
    out = to_bhsd((out[0] if p.lse else out).detach(), p.layout)[0, : p.group]
    dtype = p.torch_dtype
    q, k, v = (to_bhsd(x.detach(), p.layout)[0, :n].to(dtype) for x, n in ((q, p.group), (k, 1), (v, 1)))
    if not all(_is_finite(x) for x in (q, k, v)):
        return None
    sampled = row_sample(p, q.device)
    rows = torch.arange(p.q_len, dtype=torch.int64, device=q.device) if sampled is None else sampled
    exact, rounded = (
        reference.attend(
            q, k[0], v[0], scale=scale, softcap=p.softcap, score_mod=lambda s: change(s, rows), rows=rows, dtype=wide
        )
        for wide in (torch.float64, torch.float32)
    )
    e_rows = (rounded_to(rounded.out, dtype) - exact.out).abs().amax(-1)
    return Errors(in_budgets((out[:, rows].double() - exact.out).abs().amax(-1), row_budget(exact, e_rows, p)))


def _is_finite(x: Tensor) -> bool:
    """Whether all of it is: its extremes tell, and take no memory."""
    return not x.numel() or all(bool(edge.isfinite()) for edge in x.detach().aminmax())
