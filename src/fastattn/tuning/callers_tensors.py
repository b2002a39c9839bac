"""The winner of a tuning is checked once more, on a slice of the tensors of the call that tuned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastattn.planning import binding
from fastattn.planning.decision import Accepted
from fastattn.problems import masks
from fastattn.problems.call_facts import CallFacts
from fastattn.problems.call_key import CallKey
from fastattn.problems.layouts import TO_BHSD, from_bhsd, to_bhsd
from fastattn.problems.problem import Problem, default_scale
from fastattn.tuning.accuracy.budgets import Errors
from fastattn.tuning.accuracy.judge import Judge
from fastattn.tuning.accuracy.judge_call import judge_of_call


class CallersTensors:
    """A slice of them with its reference, made when it is first asked for."""

    def __init__(self, problem: Problem, facts: CallFacts, key: CallKey, given: tuple[Any, ...]) -> None:
        """problem: the call's own, at its exact lengths."""
        given = (*given[:3], given[3].of) if key.is_kept else given
        self._problem = problem
        self._make = lambda: _as_vectors_can_be_read(problem, facts, _visible_part(facts, key, _gathered(key, given)))
        self._is_dense = isinstance(given[3], Tensor) and not isinstance(key.mask, masks.Causal)
        self._scale = key.options.scale if key.options.scale is not None else default_scale(key.q.shape[3])
        self._also = facts.also
        self._judge: Judge | None = None
        self._is_made = False

    def check(self, candidate: Accepted) -> Errors:
        """The candidate's errors on the slice."""
        if not self._is_made:
            q, k, v, mask = self._make()
            if self._problem.structure and self._also is not None:
                mask = mask & self._also
            has_mask = self._is_dense or self._problem.structure
            self._judge = judge_of_call(self._problem, q, k, v, mask if has_mask else None, self._scale)
            self._is_made = True
        if self._judge is None:
            return Errors(0.0)
        return self._judge.errors(binding.bind(candidate, self._judge.sample.problem, self._scale))


def _as_vectors_can_be_read(problem: Problem, facts: CallFacts, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same numbers where they start at multiples of 16 bytes: on CUDA a kernel that reads vectors would break the context.

    The Verdict is of all calls of the problem, in which they mostly do.
    """
    *tensors, mask = given
    if problem.device != "cuda":
        return given
    lie_well = zip(tensors, facts.aligned, facts.aligned_rows, strict=True)
    return *(
        x if starts and steps else x.clone(memory_format=torch.contiguous_format) for x, starts, steps in lie_well
    ), mask


def _gathered(key: CallKey, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same of a cache that is in no pages, of which the first entry is all that is looked at."""
    q, k, v, mask = given
    if not isinstance(key.mask, masks.Mask) or key.mask.page_table is None:
        return given
    first = replace(mask, table=mask.table[:1], lengths=mask.lengths[:1])
    k, v = (from_bhsd(first.gathered(to_bhsd(x, key.layout)), key.layout) for x in (k, v))
    return q, k, v, replace(mask, table=None)


def _visible_part(facts: CallFacts, key: CallKey, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The caller's tensors, keys and values as far as the problem's one query sees them."""
    if facts.decode is None:
        return given
    q, k, v, _ = given
    dim = TO_BHSD[key.layout][2]
    first, last = facts.decode.keys(k.shape[dim])
    return q, k.narrow(dim, first, last - first), v.narrow(dim, first, last - first), None
