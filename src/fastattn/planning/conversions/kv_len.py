"""Keys padded to a length that the kernel's products like: on CPUs with AMX torch's fused kernel is slow beside it.

What is padded is zero, and hidden by a row that is added, or by the triangle where that ends before it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastattn.environment.device import Device
from fastattn.kernels.kernel import Arguments, Kernel, Run
from fastattn.planning.conversions.conversion import NO, OPTIONAL
from fastattn.problems.call_facts import CallFacts
from fastattn.problems.problem import Problem

MULTIPLE = 32  # keys: the rows of a tile of AMX, in pairs of bfloat16
FEWEST = 16  # rows of queries: with fewer the copy of the keys costs what it saves


def when_pad_lengths(kernel: Kernel, p: Problem, facts: CallFacts) -> str:
    is_plain = p.mask is None and p.window is None and not p.score_mod and p.device == "cpu" and p.dtype == "bfloat16"
    if not (kernel.pad_lengths and is_plain and p.q_len >= FEWEST and p.kv_len % MULTIPLE):
        return NO
    is_drawn = p.causal is None or p.q_len == p.kv_len  # elsewhere the triangle would move, or be a mask
    return OPTIONAL if is_drawn and "amx_bf16" in Device.of(torch.device("cpu")).name else NO


def pad_lengths(step: Run, kernel: Kernel, p: Problem, facts: CallFacts) -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        kv_len = k.shape[2]
        more = -kv_len % MULTIPLE
        if not more:
            return step(q, k, v, mask, a)
        if a.upper is None:
            mask = q.new_zeros(1, 1, 1, kv_len + more)
            mask[..., kv_len:] = float("-inf")
        return step(q, pad(k, (0, 0, 0, more)), pad(v, (0, 0, 0, more)), mask, a)

    return run
