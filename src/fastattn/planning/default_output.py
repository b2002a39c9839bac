"""What F.sdpa's output would be like: every candidate's lies in memory as it would, as callers view it by its strides."""

from __future__ import annotations

from fastattn.problems.call_facts import CallFacts
from fastattn.problems.problem import Problem

CONTIGUOUS = (0, 1, 2, 3)


def is_fused(p: Problem, facts: CallFacts) -> bool:
    """Whether F.sdpa would answer by a fused kernel, and not by its math: on a CPU as sdp_utils_cpp.cpp asks, else assumed."""
    if facts.by_math:
        return False
    if p.device != "cpu":
        return True
    asks_too_much = p.head_dim != p.head_dim_v or p.dropout or p.mask_grad or facts.mask_asks_grad
    return not asks_too_much and facts.dense_last_dims and "flash" not in facts.switched_off


def output_order(p: Problem, facts: CallFacts) -> tuple[int, ...]:
    """In which order F.sdpa's output (b, h, s, d) lies densely in memory, the outermost dimension first.

    Its fused kernels lay it out as q lies, its math contiguous.
    """
    return facts.q_order if is_fused(p, facts) else CONTIGUOUS
