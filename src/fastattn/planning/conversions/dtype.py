"""Half inputs cast to float32, the output back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.kernels.kernel import Arguments, Kernel, Run
from fastattn.planning.conversions.conversion import NO, OPTIONAL, REQUIRED, map_output
from fastattn.problems.call_facts import CallFacts
from fastattn.problems.problem import Problem


def when_fp32(kernel: Kernel, p: Problem, facts: CallFacts) -> str:
    if p.dtype in ("float16", "bfloat16") and kernel.fp32:
        return OPTIONAL if p.dtype in kernel.dtypes else REQUIRED
    return NO


def fp32(step: Run, kernel: Kernel, p: Problem, facts: CallFacts) -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Any, a: Arguments) -> Any:
        if isinstance(mask, Tensor) and mask.dtype is not torch.bool:
            mask = mask.float()
        return map_output(step(q.float(), k.float(), v.float(), mask, a), lambda out: out.to(q.dtype))

    return run
