"""GQA: the query group folded into rows, or keys and values repeated for each query head."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastattn.kernels.kernel import Arguments, Kernel, Run
from fastattn.kernels.libraries import availability
from fastattn.kernels.plain_math import unfold
from fastattn.planning.conversions.conversion import NO, OPTIONAL, REQUIRED, map_output
from fastattn.planning.conversions.own_forms import takes_own_form
from fastattn.problems.call_facts import CallFacts
from fastattn.problems.problem import Problem


def _can_fold(p: Problem) -> bool:
    """Rows of one kv head's queries may be stacked where no row needs to know its own index."""
    return p.group > 1 and not p.is_banded and (p.q_len == 1 or p.mask is None)


def when_gqa_fold(kernel: Kernel, p: Problem, facts: CallFacts) -> str:
    return OPTIONAL if kernel.gqa_fold and _can_fold(p) and not takes_own_form(kernel, p) else NO


def gqa_fold(step: Run, kernel: Kernel, p: Problem, facts: CallFacts) -> Run:
    group = p.group

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        b, h, s, d = q.shape
        folded = q.reshape(b, h // group, group * s, d)
        if mask is not None and mask.dim() == 4 and mask.shape[1] > 1:
            mask = mask.reshape(mask.shape[0], h // group, group, mask.shape[3])
        found = step(folded, k, v, mask, a)
        return map_output(found, lambda out: unfold(out, (b, h, s, v.shape[3])), lambda lse: lse.reshape(b, h, s))

    return run


def when_gqa_expand(kernel: Kernel, p: Problem, facts: CallFacts) -> str:
    return REQUIRED if p.group > 1 and not _takes_groups(kernel) else NO


def _takes_groups(kernel: Kernel) -> bool:
    """Whether it takes fewer kv heads as they are, in the version of its library that is installed."""
    if isinstance(kernel.gqa, str):
        return not availability.is_before(kernel.library, kernel.gqa)
    return kernel.gqa


def gqa_expand(step: Run, kernel: Kernel, p: Problem, facts: CallFacts) -> Run:
    group = p.group

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        return step(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), mask, a)

    return run
