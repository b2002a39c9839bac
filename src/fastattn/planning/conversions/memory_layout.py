"""Copies: q, k and v in dense memory, in the kernel's own layout where it reads nothing else."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastattn.kernels.kernel import Kernel, Run
from fastattn.planning.conversions.conversion import NO, OPTIONAL, REQUIRED
from fastattn.planning.conversions.head_dim import pads, when_head_dim_pad
from fastattn.planning.conversions.heads import when_gqa_expand
from fastattn.problems.call_facts import CallFacts, Each, each
from fastattn.problems.layouts import DENSE_CLASS, from_bhsd, to_bhsd
from fastattn.problems.problem import Problem


def _to_copy(kernel: Kernel, p: Problem, facts: CallFacts) -> Each:
    """Which of q, k and v the kernel cannot read as they lie."""
    bad = ({"other"} if kernel.dense_last_dim else set()) | ({"expanded"} if kernel.no_broadcast else set())
    well = zip(p.strides, facts.aligned, facts.aligned_rows, pads(kernel, p), strict=True)
    return each(
        cls in bad or (kernel.aligned and not (starts and steps) and not padded) for cls, starts, steps, padded in well
    )


def _pays(kernel: Kernel, p: Problem) -> bool:
    """Whether dense copies are worth trying: only if keys and values are read more than a few times."""
    return kernel.contiguous and p.q_len >= 64 and set(p.strides) != {"contiguous"}


def when_contiguous(kernel: Kernel, p: Problem, facts: CallFacts) -> str:
    if kernel.dense:
        return NO  # once, when all else is done
    if any(_to_copy(kernel, p, facts)):
        return REQUIRED
    return OPTIONAL if _pays(kernel, p) else NO


def contiguous(step: Run, kernel: Kernel, p: Problem, facts: CallFacts) -> Run:
    """Copies of those that need one; of all where that pays."""
    copied = (True, True, True) if _pays(kernel, p) else _to_copy(kernel, p, facts)
    of_q, of_k, of_v = map(_copy, copied, facts.aligned)
    return lambda q, k, v, mask, a: step(of_q(q), of_k(k), of_v(v), mask, a)


def _copy(is_copied: bool, is_aligned: bool) -> Callable[[Tensor], Tensor]:
    """What makes a tensor dense."""
    if not is_copied:
        return _as_it_is
    return Tensor.contiguous if is_aligned else _moved


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _moved(x: Tensor) -> Tensor:
    """Dense memory may still start where it should not."""
    return x.clone(memory_format=torch.contiguous_format)


def when_dense(kernel: Kernel, p: Problem, facts: CallFacts) -> str:
    if not kernel.dense:
        return NO
    lies_so = set(p.strides) == {DENSE_CLASS[kernel.layout]} and (all(facts.aligned) or not kernel.aligned)
    is_made_anew = REQUIRED in (when_head_dim_pad(kernel, p, facts), when_gqa_expand(kernel, p, facts))
    return NO if lies_so and not is_made_anew else REQUIRED


def dense(step: Run, kernel: Kernel, p: Problem, facts: CallFacts) -> Run:
    layout = kernel.layout
    of_q, of_k, of_v = (_copy(True, is_aligned) for is_aligned in facts.aligned)

    def made(copy: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return to_bhsd(copy(from_bhsd(x, layout)), layout)

    return lambda q, k, v, mask, a: step(made(of_q, q), made(of_k, k), made(of_v, v), mask, a)
