"""The triangle or window as a dense mask; a bool mask as the float mask that is added."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.environment.remembered import remembered
from fastattn.kernels.kernel import Arguments, Kernel, Run
from fastattn.planning.conversions.conversion import NO, REQUIRED
from fastattn.planning.conversions.own_forms import takes_own_form
from fastattn.problems import bands, dense_masks
from fastattn.problems.call_facts import CallFacts
from fastattn.problems.masks import Mask
from fastattn.problems.problem import Problem


def _draws(kernel: Kernel, p: Problem) -> bool:
    """Whether it draws this triangle or window itself; on a square problem both corners coincide."""
    if p.window is not None and not kernel.window:
        return False
    if p.causal is None and p.window is None:
        return True
    corner = kernel.corner in (p.causal or "top_left", "any") or bool(kernel.corner and p.q_len == p.kv_len)
    return corner and p.scale in kernel.causal_scales


def when_mask_dense(kernel: Kernel, p: Problem, facts: CallFacts) -> str:
    if takes_own_form(kernel, p):
        return NO
    if p.structure:
        return REQUIRED if kernel.masks else NO  # candidates.py says that it takes no mask
    if not p.is_banded or (_draws(kernel, p) and (p.mask is None or kernel.mask_and_causal)):
        return NO
    if kernel.masks:
        return REQUIRED
    if p.window is not None and not kernel.window:
        return f"a window is not supported ({p.window[0]}, {p.window[1]})"
    if kernel.corner is None:
        return NO  # no triangle at all: candidates.py says so
    if p.mask is not None:
        return "a mask together with causal is not supported"
    if p.scale not in kernel.causal_scales:
        return f"causal with a scale that is {p.scale}, not {' or '.join(kernel.causal_scales)}"
    return f"causal {p.causal} with q_len {p.q_len} != kv_len {p.kv_len}, it draws {kernel.corner}"


def mask_dense(step: Run, kernel: Kernel, p: Problem, facts: CallFacts) -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Any, a: Arguments) -> Any:
        if isinstance(mask, Mask):
            mask = _dense(mask, q.shape[0], q.shape[2], k.shape[2], q.device)
            mask = mask if mask.dtype is torch.bool else mask.to(getattr(torch, p.mask or ""))
        if a.lower is None and a.upper is None:
            return step(q, k, v, mask, a)
        seen = bands.visible(q, q.shape[2], k.shape[2], a.lower, a.upper)
        return step(q, k, v, dense_masks.intersect(mask, seen), a._replace(lower=None, upper=None))

    return run


def _dense(mask: Mask, *problem: Any) -> Tensor:
    """The mask as a tensor, which is read only: small ones are kept for the next layer."""
    batch, q_len, kv_len, _ = problem
    size = (batch if mask.is_per_batch() else 1) * max(1, 8 * mask.heads()) * q_len * kv_len
    return _kept(mask, *problem) if size <= KEPT_BYTES else mask.dense(*problem)


KEPT_BYTES = 16 * 2**20  # of one dense mask that is kept


@remembered(2)
def _kept(mask: Mask, *problem: Any) -> Tensor:
    with torch.inference_mode(False):
        return mask.dense(*problem).contiguous()


def _is_bool_mask(kernel: Kernel, p: Problem, facts: CallFacts) -> bool:
    return p.mask == "bool" or (p.mask is None and when_mask_dense(kernel, p, facts) == REQUIRED)


def when_mask_additive(kernel: Kernel, p: Problem, facts: CallFacts) -> str:
    if takes_own_form(kernel, p):
        return NO
    return REQUIRED if _is_bool_mask(kernel, p, facts) and "bool" not in kernel.masks and kernel.masks else NO


def mask_additive(step: Run, kernel: Kernel, p: Problem, facts: CallFacts) -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        if mask is not None and mask.dtype is torch.bool:  # a tile's may be one that is added already
            mask = dense_masks.additive(mask, q)
        return step(q, k, v, mask, a)

    return run
