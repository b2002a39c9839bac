"""Whether a kernel's dropout is one: weights dropped at the rate asked for, the others scaled up, and so in its backward.

A value matrix of ones on a diagonal returns the weights themselves, so the factors that were used can be read off; with the
same seed the kernel draws them again, and its output and gradients are judged with those factors known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastattn.problems.layouts import from_bhsd, to_bhsd
from fastattn.problems.problem import Problem
from fastattn.tuning.accuracy.budgets import Errors
from fastattn.tuning.accuracy.judge import Judge
from fastattn.tuning.accuracy.probes import plain_sample, stand_in_scale
from fastattn.tuning.accuracy.sample import Sample

RATE = (
    0.1  # what is checked and timed, as the rate is no part of a problem; no sixteenth, to which some kernels round it
)
LENGTH = 128  # of queries and keys, at most
SIGMAS = 6.0  # a fair dropout strays further once in 10^9 checks

Call = Callable[[Tensor, Tensor, Tensor, Any], Any]


@contextmanager
def preserve_rng(device: torch.device, seed: int | None = None) -> Generator[None]:
    """torch's generators are put back afterwards: the caller's random numbers are not used up."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if seed is not None:  # torch.manual_seed would reach every GPU
            torch.random.default_generator.manual_seed(seed)
            if device.type == "cuda":
                torch.cuda.default_generators[device.index or torch.cuda.current_device()].manual_seed(seed)
        yield


def dropout_problem(p: Problem) -> Problem:
    """The small problem that is checked."""
    strides = tuple("contiguous" if cls == "expanded" else cls for cls in p.strides)
    return p.replace(
        batch=1, kv_heads=min(2, p.kv_heads), q_heads=min(2, p.kv_heads) * p.group, strides=strides,
        q_len=min(LENGTH, p.q_len), kv_len=min(LENGTH, p.kv_len),
    )  # fmt: skip


def check_dropout(call: Call, without: Call, p: Problem, device: torch.device) -> Errors:
    """The errors of a call with dropout RATE on p, made by problem_of; without: the same kernel's call with no dropout.

    Raises ValueError where it is no fair dropout.
    """
    sample = plain_sample(p, device)
    seen = _weights(without, sample, seed=1) > 0
    first, second = (_weights(call, sample, seed) > 0 for seed in (1, 2))
    _check_fair(first, second, seen)

    def again(*given: Any) -> Any:
        with preserve_rng(device, seed=1):
            return call(*given)

    drop = torch.where(seen, first.double() / (1.0 - RATE), 1.0)  # a bool over a float has the default dtype
    return Judge(sample, stand_in_scale(p), drop=drop).errors(again)


def _weights(call: Call, s: Sample, seed: int) -> Tensor:
    """(q_heads, q_len, kv_len) weights as the call uses them, head_dim_v keys a run."""
    p = s.problem
    parts: list[Tensor] = []
    for start in range(0, p.kv_len, p.head_dim_v):
        width = min(p.head_dim_v, p.kv_len - start)
        ones = torch.zeros(p.kv_len, p.head_dim_v, dtype=s.v.dtype, device=s.v.device)
        ones[start : start + width, :width] = torch.eye(width, dtype=s.v.dtype, device=s.v.device)
        v = from_bhsd(ones.repeat(1, p.kv_heads, 1, 1), p.layout)
        with preserve_rng(s.v.device, seed), torch.no_grad():
            found = call(s.q.detach(), s.k.detach(), v, s.mask.detach() if isinstance(s.mask, Tensor) else s.mask)
        out = found[0] if p.lse else found
        parts.append(to_bhsd(out, p.layout)[0, ..., :width].double())
    return torch.cat(parts, -1)


def _check_fair(first: Tensor, second: Tensor, seen: Tensor) -> None:
    count = int(seen.sum())
    share = 1 - int((first & seen).sum()) / max(1, count)
    if abs(share - RATE) > SIGMAS * math.sqrt(RATE * (1 - RATE) / max(1, count)):
        raise ValueError(f"its dropout of {RATE} drops {share:.3f} of the weights")
    if count > 64 and torch.equal(first, second):
        raise ValueError("its dropout is the same for two seeds")
    if count > 64 * seen.shape[0] > 64 and torch.equal(first[0] & seen[0] & seen[1], first[1] & seen[0] & seen[1]):
        raise ValueError("its dropout is the same for two heads")
