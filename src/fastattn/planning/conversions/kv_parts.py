"""FlashDecoding: the keys of one long sequence in parts, so that all threads have work; put together by log-sum-exp.

The parts are views that stand in the place of batch entries: (1, h, s, d) becomes (parts, h, s / parts, d) in one call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.kernels.kernel import Arguments, Kernel, Run
from fastattn.planning.conversions.conversion import NO, OPTIONAL
from fastattn.problems.call_facts import CallFacts
from fastattn.problems.length_buckets import DECODE_Q_LEN
from fastattn.problems.problem import Problem

FEWEST = 256  # keys of a part: with fewer the parts cost what they save


def when_split_kv(kernel: Kernel, p: Problem, facts: CallFacts) -> str:
    is_decode = p.batch == 1 and p.q_len <= DECODE_Q_LEN and p.kv_len >= 2 * FEWEST
    is_plain = not (p.is_masked or p.needs_grad or p.dropout or p.score_mod)
    return OPTIONAL if kernel.split_kv and is_decode and is_plain and p.kv_heads < p.threads else NO


def split_kv(step: Run, kernel: Kernel, p: Problem, facts: CallFacts) -> Run:
    threads = p.threads

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        kv_len = k.shape[2]
        parts = min(-(-threads // k.shape[1]), kv_len // FEWEST)
        if parts < 2:
            return step(q, k, v, mask, a)
        even = kv_len // parts * parts
        with_lse = a._replace(lse=True)
        out, lse = step(q.expand(parts, -1, -1, -1), _parts(k, parts, even), _parts(v, parts, even), mask, with_lse)
        if even < kv_len:
            rest = step(q, k[:, :, even:], v[:, :, even:], mask, with_lse)
            out, lse = (torch.cat(both) for both in zip((out, lse), rest, strict=True))
        total = torch.logsumexp(lse, 0, keepdim=True)
        merged = (out * (lse - total).exp_()[..., None]).sum(0, keepdim=True).to(q.dtype)
        return (merged, total) if a.lse else merged

    return run


def _parts(x: Tensor, parts: int, even: int) -> Tensor:
    """(parts, h, even / parts, d) view of (1, h, s, d)."""
    return x[0, :, :even].unflatten(1, (parts, -1)).transpose(0, 1)
