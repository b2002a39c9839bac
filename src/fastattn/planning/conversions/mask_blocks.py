"""A mask with a meaning as the squares that a kernel like flex_attention skips, or asks about pair by pair."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastattn.kernels.kernel import Arguments, Kernel, Run
from fastattn.planning.conversions.conversion import NO, REQUIRED
from fastattn.problems.call_facts import CallFacts
from fastattn.problems.problem import Problem
from fastattn.problems.tilings.mask_blocks import blocks_of_mask


def when_mask_blocks(kernel: Kernel, p: Problem, facts: CallFacts) -> str:
    if not (p.structure and kernel.mask_blocks):
        return NO
    if p.mask != "bool":
        return "a mask that adds to the scores is not supported"
    if p.has_unread_keys:
        return "keys that are not filled must not be read, and it reads whole blocks"
    if p.is_unread:
        return "lengths that lie on a GPU are not read, and squares are made of them"
    return REQUIRED


def mask_blocks(step: Run, kernel: Kernel, p: Problem, facts: CallFacts) -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Any, a: Arguments) -> Any:
        blocks = blocks_of_mask(mask, q.shape[0], q.shape[2], k.shape[2], q.device)
        return step(q, k, v, blocks, a)  # type: ignore[arg-type]

    return run
