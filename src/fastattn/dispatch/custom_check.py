"""A caller's own function cannot be checked ahead: the kernel's first output is, on the caller's tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.environment.blame import raise_callers
from fastattn.environment.log import log
from fastattn.planning.binding import Call
from fastattn.problems import bands
from fastattn.problems.call_key import CallKey, is_block_mask
from fastattn.problems.problem import Problem, default_scale
from fastattn.tuning.accuracy.judge_call import errors_of_custom


def check_first_output(call: Call, candidate: str, problem: Problem, key: CallKey, given: tuple[Any, ...]) -> None:
    """Compare the call's output with float64, one kv head of the first batch entry, and warn where it is off."""
    heads, keys = (torch.arange(n, dtype=torch.int64, device=key.q.device) for n in (problem.group, problem.kv_len))
    first = torch.zeros((), dtype=heads.dtype, device=key.q.device)
    score_mod = key.options.score_mod

    def change(scores: Tensor, rows: Tensor) -> Tensor:
        if score_mod is not None:
            scores = _for_each(score_mod, scores)(scores, first, heads, rows, keys)
        if is_block_mask(key.mask):
            seen = _for_each(key.mask.mask_mod)(first, heads, rows, keys)
            scores = scores.masked_fill(seen.logical_not(), float("-inf"))
        lower, upper = bands.band(problem.causal, problem.window, problem.q_len, problem.kv_len)
        if problem.is_banded:
            seen = bands.visible(scores, problem.q_len, problem.kv_len, lower, upper)[rows]
            scores = scores.masked_fill(seen.logical_not(), float("-inf"))
        return scores

    scale = key.options.scale if key.options.scale is not None else default_scale(key.q.shape[3])
    try:  # in the caller's grad mode: what is compiled here is what the call runs
        errors = errors_of_custom(call, problem, given, scale, change)
    except Exception as error:
        raise_callers(error)
        log.warning("kernel %s could not be checked on %s: %s: %s", candidate, problem, type(error).__name__, error)
        return
    if errors is not None and not errors.passed:
        why = "nothing else can do it" if key.options.kernel is None else "it was ordered"
        log.warning("kernel %s is off by %.3g budgets on %s; %s", candidate, errors.forward, problem, why)


def _for_each(function: Callable[..., Tensor], *scores: Tensor) -> Callable[..., Tensor]:
    """A function of (score,) b, h, i, j, which are scalars, over all heads, rows and keys."""
    for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None)):
        function = torch.vmap(function, in_dims=(*(0 for _ in scores), *dims))
    return function
