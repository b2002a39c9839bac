"""What writes the scores down is ruled out where there is no memory for them: to find out may end the process."""

from __future__ import annotations

import torch

from fastattn.planning.decision import Accepted
from fastattn.problems.problem import Problem
from fastattn.tuning import memory_use
from fastattn.verdicts.verdict import Outcome

FREE_SHARE = 0.5  # of the free memory that scores may take while trying a kernel


def why_too_large(
    p: Problem, candidate: Accepted, default_runs: str, device: torch.device, incumbent: bool
) -> tuple[Outcome, str] | None:
    """Why a candidate is not tried, None where it may be. The incumbent may take more than the memory limit."""
    kernel = candidate.kernel
    in_blocks = {"chunks", "recompute"} & set(candidate.conversions)
    is_unfused = kernel.unfused or (kernel.chunks and not in_blocks)
    if candidate.is_in_tiles or not (is_unfused or (kernel.name == "default" and default_runs == "torch_math")):
        return None
    if p.unfused_bytes > p.memory_limit and not incumbent:
        return Outcome.TOO_MUCH_MEMORY, f"memory: {p.unfused_bytes} temporary bytes > {p.memory_limit}"
    if p.unfused_bytes > (left := FREE_SHARE * memory_use.free_bytes(device)):
        needed = f"{p.unfused_bytes} temporary bytes > {left:.0f}"
        return Outcome.NO_MEMORY_FREE, f"not tried: too little memory is free: {needed}"
    return None
