"""Copies: q, k and v in dense memory, in the kernel's own layout where it reads nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.kernels.kernel import Kernel, Run
from fastattn.planning.conversions.conversion import NO, OPTIONAL, REQUIRED
from fastattn.planning.conversions.head_dim import pads_all, when_pad
from fastattn.planning.conversions.heads import when_gqa_expand
from fastattn.problems.call_facts import CallFacts
from fastattn.problems.layouts import DENSE_CLASS, from_bhsd, to_bhsd
from fastattn.problems.problem import Problem


def when_contiguous(kernel: Kernel, p: Problem, facts: CallFacts) -> str:
    if kernel.dense:
        return NO  # once, when all else is done
    if (kernel.dense_last_dim and "other" in p.strides) or (kernel.no_broadcast and "expanded" in p.strides):
        return REQUIRED
    if kernel.aligned and not (facts.aligned and facts.aligned_rows) and not pads_all(kernel, p):
        return REQUIRED
    # A copy pays only if keys and values are read more than a few times.
    worth = kernel.contiguous and p.q_len >= 64 and set(p.strides) != {"contiguous"}
    return OPTIONAL if worth else NO


def contiguous(step: Run, kernel: Kernel, p: Problem, facts: CallFacts) -> Run:
    def dense(x: Tensor) -> Tensor:  # dense memory may still start where it should not
        return x.contiguous() if facts.aligned else x.clone(memory_format=torch.contiguous_format)

    return lambda q, k, v, mask, a: step(dense(q), dense(k), dense(v), mask, a)


def when_dense(kernel: Kernel, p: Problem, facts: CallFacts) -> str:
    if not kernel.dense:
        return NO
    lies_so = set(p.strides) == {DENSE_CLASS[kernel.layout]} and (facts.aligned or not kernel.aligned)
    is_made_anew = REQUIRED in (when_pad(kernel, p, facts), when_gqa_expand(kernel, p, facts))
    return NO if lies_so and not is_made_anew else REQUIRED


def dense(step: Run, kernel: Kernel, p: Problem, facts: CallFacts) -> Run:
    layout = kernel.layout

    def dense(x: Tensor) -> Tensor:
        x = from_bhsd(x, layout)
        return to_bhsd(x.contiguous() if facts.aligned else x.clone(memory_format=torch.contiguous_format), layout)

    return lambda q, k, v, mask, a: step(dense(q), dense(k), dense(v), mask, a)
