"""Packed sequences and caches as a kernel's own entry point takes them: told where they begin and end, and no mask.

A cache in pages is told by its table too; for a kernel that takes none the pages are gathered first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastattn.kernels.kernel import Arguments, Kernel, Run
from fastattn.kernels.plain_math import sdpa_math
from fastattn.planning.conversions.conversion import NO, REQUIRED, map_output
from fastattn.planning.conversions.head_dim import pads
from fastattn.problems.call_facts import CallFacts
from fastattn.problems.problem import Problem

if TYPE_CHECKING:
    from fastattn.problems.masks.unread import Sequences

INF = float("inf")
NO_DEVICE: Any = None  # limits of such an entry point ask nothing of it


def takes_own_form(kernel: Kernel, p: Problem) -> bool:
    """Whether the kernel is told the lengths, and no mask is made of them."""
    return bool(p.structure) and REQUIRED in (
        _packed(kernel, p),
        _cached(kernel, p),
        _paged(kernel, p),
        _kept(kernel, p),
    )


def has_own_form(kernel: Kernel, p: Problem) -> bool:
    """Whether it has an entry point for such problems, which may still refuse this one."""
    return {_packed(kernel, p), _cached(kernel, p), _paged(kernel, p), _kept(kernel, p)} != {NO}


def when_packed(kernel: Kernel, p: Problem, facts: CallFacts) -> str:
    return _or_dense(kernel, _packed(kernel, p)) if p.structure else NO


def when_cached(kernel: Kernel, p: Problem, facts: CallFacts) -> str:
    if not p.structure or _paged(kernel, p) == REQUIRED:
        return NO
    return _or_dense(kernel, _cached(kernel, p))


def when_paged(kernel: Kernel, p: Problem, facts: CallFacts) -> str:
    answer = _paged(kernel, p) if p.structure else NO
    is_else_gathered = kernel.load_cached is not None or kernel.masks
    return NO if answer != REQUIRED and is_else_gathered else answer


def when_gathered(kernel: Kernel, p: Problem, facts: CallFacts) -> str:
    return REQUIRED if p.page_size and _paged(kernel, p) != REQUIRED else NO


def _or_dense(kernel: Kernel, answer: str) -> str:
    """What its own entry point cannot draw it may take as a mask."""
    return NO if answer != REQUIRED and kernel.masks else answer


def _packed(kernel: Kernel, p: Problem) -> str:
    packing = p.packing if kernel.load_packed is not None else None
    if packing is None:
        return NO
    if packing.window and not kernel.window:
        return f"packed sequences with a window are not supported ({p.structure})"
    if packing.corner and kernel.corner not in (packing.corner, "any") and not packing.are_same:
        return f"packed, {packing.corner}, queries and keys of lengths of their own: it draws {kernel.corner}"
    reasons = (need.why_not(p, NO_DEVICE) for need in kernel.packed_needs)
    return next(filter(None, reasons), _of_scale(kernel, p) if packing.corner else REQUIRED)


def _cached(kernel: Kernel, p: Problem) -> str:
    return _filled(kernel, p) if kernel.load_cached is not None else NO


def _paged(kernel: Kernel, p: Problem) -> str:
    if kernel.load_paged is None or not p.page_size:
        return NO
    if any(pads(kernel, p)):
        return f"pages with head_dim {p.head_dim}, head_dim_v {p.head_dim_v}, which it would pad in all pages there are"
    reasons = (need.why_not(p, NO_DEVICE) for need in kernel.paged_needs)
    return next(filter(None, reasons), _filled(kernel, p))


def _kept(kernel: Kernel, p: Problem) -> str:
    if not p.kept:
        return NO
    from fastattn.planning.conversions.kept import when_kept  # here, as no other call needs it

    return when_kept(kernel, p)


def _filled(kernel: Kernel, p: Problem) -> str:
    """What its entry points for caches can do of one that is filled to some length."""
    filling = p.filling
    if filling is None:
        return NO
    if p.needs_grad or p.dropout:
        return (
            f"{'gradients' if p.needs_grad else 'dropout'} of a cache that is filled to some length are not supported"
        )
    if filling.left >= 0 and not kernel.window:
        return f"a cache with a window is not supported ({p.structure})"
    return _of_scale(kernel, p) if filling.has_corner else REQUIRED


def _of_scale(kernel: Kernel, p: Problem) -> str:
    if p.scale in kernel.causal_scales:
        return REQUIRED
    return f"causal with a scale that is {p.scale}, not {' or '.join(kernel.causal_scales)}"


def cached(step: Run, kernel: Kernel, p: Problem, facts: CallFacts) -> Run:
    from fastattn.problems.packing import kv_lens_of  # here, as no other call needs it

    lower, upper = _band_of(p)

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Any, a: Arguments) -> Any:
        lengths = kv_lens_of(mask, q.shape[0], k.shape[2], q.device)
        return step(q, k, v, None, a._replace(lower=lower, upper=upper, kv_lens=lengths))

    return run


def paged(step: Run, kernel: Kernel, p: Problem, facts: CallFacts) -> Run:
    from fastattn.problems.packing import in_pages  # here, as no other call needs it

    lower, upper = _band_of(p)

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Any, a: Arguments) -> Any:
        k, v, mask = in_pages(k, v, mask)
        told = a._replace(lower=lower, upper=upper, kv_lens=mask.lengths, page_table=mask.table)
        return step(q, k, v, None, told)

    return run


def gathered(step: Run, kernel: Kernel, p: Problem, facts: CallFacts) -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Any, a: Arguments) -> Any:
        keys = mask.gathered(k)
        return step(q, keys, keys if v is k else mask.gathered(v), mask, a)

    return run


def _band_of(p: Problem) -> tuple[int | None, int | None]:
    """(lower, upper) around the last filled key's diagonal."""
    filling = p.filling
    assert filling is not None
    return -filling.left if filling.left >= 0 else None, 0 if filling.has_corner else None


def packed(step: Run, kernel: Kernel, p: Problem, facts: CallFacts) -> Run:
    from fastattn.problems.packing import sequences_of  # here, as no other call needs it

    packing = p.packing
    assert packing is not None
    lower, upper = packing.lower, packing.upper

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Any, a: Arguments) -> Any:
        q_len, kv_len = q.shape[2], k.shape[2]
        sequences = sequences_of(mask, q_len, kv_len, q.device)
        if sequences is None:
            return sdpa_math(q, k, v, mask.dense(q.shape[0], q_len, kv_len, q.device), a)
        a = a._replace(lower=lower, upper=upper, packed=sequences)
        if sequences.tokens == (q_len, kv_len):
            return step(q, k, v, None, a)
        return (_cut if sequences.tokens is not None else _hidden)(step, sequences, q, k, v, a)

    return run


def _cut(step: Run, sequences: Sequences, q: Tensor, k: Tensor, v: Tensor, a: Arguments) -> Any:
    """Without the tokens behind the last sequence; their rows are zeros."""
    assert sequences.tokens is not None
    (used, used_kv), behind = sequences.tokens, q.shape[2] - sequences.tokens[0]
    q, k, v = q[:, :, :used], k[:, :, :used_kv], v[:, :, :used_kv]
    if not (used and used_kv):
        nothing = sum(x[:, :, :0].sum() for x in (q, k, v))  # 0, and its gradients are zeros
        out = q.new_zeros(*q.shape[:3], v.shape[3]) + nothing
        found: Any = (out, q.new_full(q.shape[:3], -INF, dtype=torch.float32)) if a.lse else out
    else:
        found = step(q, k, v, None, a)
    return map_output(found, lambda out: pad(out, (0, 0, 0, behind)), lambda lse: pad(lse, (0, behind), value=-INF))


def _hidden(step: Run, sequences: Sequences, q: Tensor, k: Tensor, v: Tensor, a: Arguments) -> Any:
    """Tokens may lie behind the last sequence, where a kernel writes neither output nor gradients: both are made zeros."""
    behind, behind_kv = (
        (torch.arange(x.shape[2], dtype=torch.int32, device=x.device) >= cu[-1])[:, None]
        for x, cu in ((q, sequences.cu_q), (k, sequences.cu_kv))
    )
    if a.needs_grad:
        hidden = ((q, behind), (k, behind_kv), (v, behind_kv))
        q, k, v = (_NoGradient.apply(x, where) for x, where in hidden)
    found = step(q, k, v, None, a)
    return map_output(found, lambda out: out.masked_fill(behind, 0.0), lambda lse: lse.masked_fill(behind[:, 0], -INF))


class _NoGradient(torch.autograd.Function):
    """The same tensor; where it is hidden its gradient is zero, whatever a kernel left there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, hidden: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(hidden)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (hidden,) = ctx.saved_tensors
        return grad.masked_fill(hidden, 0.0), None
