"""Unfused attention in blocks of heads and query rows: scores stay in a cache, and memory within its limit.

Batch entries and kv heads are cut first, then query rows; keys that no row of a block sees are left out. Two conversions
stand on it: `chunks` cuts the forward, `recompute` cuts the forward and a backward that makes each block's scores again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.device import functorch_level, is_batched
from fastattn.kernel import Arguments, Backward, Kernel, Run
from fastattn.kernels.matmul import load_math
from fastattn.layouts import empty_in_order, memory_order
from fastattn.problem import Problem

# Answers of Conversion.when; any other string is the reason why the kernel cannot do the problem.
NO, OPTIONAL, REQUIRED = "no", "optional", "required"

CHUNK_BYTES = 4 * 2**20  # of float32 scores at once: they stay in a core's second-level cache


class Block(NamedTuple):
    """Where a block lies: batch entries, query heads, kv heads, query rows, keys."""

    batch: slice
    heads: slice
    kv_heads: slice
    rows: slice
    keys: slice

    def inputs(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Arguments]:
        """The block's part of a step's arguments; its rows and keys count from 0."""
        shift = self.rows.start - self.keys.start
        a = a._replace(
            lower=None if a.lower is None else a.lower + shift, upper=None if a.upper is None else a.upper + shift
        )
        kv = (self.batch, self.kv_heads, self.keys)
        return q[self.query], k[kv], v[kv], self.of_mask(mask), a

    @property
    def query(self) -> tuple[slice, slice, slice]:
        """Its place in q and in the output."""
        return self.batch, self.heads, self.rows

    def of_mask(self, mask: Tensor | None) -> Tensor | None:
        """Its part of a (b|1, h|1, q|1, k|1) mask."""
        if mask is None:
            return None
        parts = (self.batch, self.heads, self.rows, self.keys)
        return mask[tuple(part if n > 1 else slice(None) for n, part in zip(mask.shape, parts, strict=True))]


def blocks_of(q: Tensor, k: Tensor, a: Arguments) -> Iterator[Block]:
    """The blocks of a problem, in memory order."""
    batch, q_heads, q_len, _ = q.shape
    kv_heads, kv_len = k.shape[1:3]
    group = q_heads // kv_heads
    nb, nh, rows = block_sizes(batch, kv_heads, group, q_len, kv_len, a.upper is not None or a.lower is not None)
    for b in range(0, batch, nb):
        for h in range(0, kv_heads, nh):
            for r in range(0, q_len, rows):
                end = min(q_len, r + rows)
                last = kv_len if a.upper is None else min(kv_len, max(1, end + a.upper))
                first = 0 if a.lower is None else min(max(0, r + a.lower), last - 1)
                yield Block(
                    slice(b, b + nb), slice(h * group, (h + nh) * group), slice(h, h + nh), slice(r, end), slice(first, last)
                )


def block_sizes(
    batch: int, kv_heads: int, group: int, q_len: int, kv_len: int, banded: bool, target: int | None = None
) -> tuple[int, int, int]:
    """(batch entries, kv heads, query rows) of one block whose float32 scores take about `target` bytes."""
    target = CHUNK_BYTES if target is None else target
    row = group * kv_len * 4
    rows = min(q_len, max(128, -(-q_len // 8))) if banded else q_len
    count = max(1, target // (rows * row))
    if count == 1:
        # two heads at a time where it can be: one for each of two threads
        count = min(2, batch * kv_heads)
        rows = min(rows, max(16, target // (count * row)))
        rows = -(-q_len // -(-q_len // rows))  # equal shares
    nb = max(1, min(batch, count // kv_heads))
    nh = kv_heads if nb > 1 else min(kv_heads, count)
    return -(-batch // -(-batch // nb)), -(-kv_heads // -(-kv_heads // nh)), rows


# --- chunks: the forward, or what autograd can follow


def when_chunks(kernel: Kernel, p: Problem) -> str:
    if not kernel.chunks or p.scores * 4 <= CHUNK_BYTES or when_recompute(kernel, p) == REQUIRED:
        return NO
    return REQUIRED if p.unfused_bytes > p.memory_limit else OPTIONAL


def chunks(step: Run, kernel: Kernel, p: Problem) -> Run:
    order = memory_order(p.strides[0])

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        return _followed(step, q, k, v, mask, a) if a.needs_grad else forward(step, order, q, k, v, mask, a)

    return run


def forward(step: Run, order: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
    """The step, block by block, into one output that lies densely in `order`."""
    out = empty_in_order(q, (*q.shape[:3], v.shape[3]), order)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if a.lse else None
    for block in blocks_of(q, k, a):
        found = step(*block.inputs(q, k, v, mask, a))
        if lse is not None:
            found, lse[block.query] = found
        out[block.query] = found
    return out if lse is None else (out, lse)


def _followed(step: Run, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
    """The same for autograd: each block keeps its inputs, not its scores, and the parts are joined."""
    from torch.utils.checkpoint import checkpoint

    def one(block: Block) -> Any:
        given = block.inputs(q, k, v, mask, a)
        return checkpoint(step, *given, use_reentrant=False, preserve_rng_state=a.dropout_p > 0)

    found = [(block, one(block)) for block in blocks_of(q, k, a)]
    if not a.lse:
        return _joined([(block, out) for block, out in found])
    return _joined([(block, out) for block, (out, _) in found]), _joined([(block, lse) for block, (_, lse) in found])


def _joined(parts: list[tuple[Block, Tensor]]) -> Tensor:
    """Parts in memory order as one tensor: rows first, then heads, then batch entries."""
    for dim in (2, 1, 0):
        together: dict[tuple[int, ...], list[tuple[Block, Tensor]]] = {}
        for block, part in parts:
            together.setdefault(tuple(s.start for s in block.query[:dim]), []).append((block, part))
        parts = [(group[0][0], torch.cat([part for _, part in group], dim)) for group in together.values()]
    return parts[0][1]


# --- recompute: forward without a graph, and a backward of our own


def when_recompute(kernel: Kernel, p: Problem) -> str:
    return REQUIRED if p.needs_grad and kernel.load_backward is not None else NO


def recompute(step: Run, kernel: Kernel, p: Problem) -> Run:
    assert kernel.load_backward is not None
    backward, order = kernel.load_backward(), memory_order(p.strides[0])

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        return _Recomputed.apply(step, backward, order, a, q, k, v, mask)

    return run


def _followed_gradients(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments, grad: Tensor, wanted: Sequence[bool]
) -> Iterator[Tensor | None]:
    """The gradients by operations that autograd follows, for what is wanted of q, k, v and the mask."""
    inputs = (q, k, v, mask)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
        out = load_math()(q, k, v, mask, a)
        asked = [x for x, is_wanted in zip(inputs, wanted, strict=True) if is_wanted and x is not None]
        found = iter(torch.autograd.grad(out, asked, grad, create_graph=create_graph))
    return (next(found) if is_wanted else None for is_wanted in wanted)


class _Recomputed(torch.autograd.Function):
    """Saves q, k, v, mask and the output; no scores."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, step: Run, backward: Backward, order: Any, a: Arguments, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Any:
        found = forward(step, order, q, k, v, mask, a)
        out, lse = found if a.lse else (found, None)
        ctx.save_for_backward(q, k, v, mask, out)
        ctx.step_back, ctx.a = backward, a._replace(lse=False)
        if lse is None:
            return out
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:  # type: ignore[override]
        q, k, v, mask, out = ctx.saved_tensors
        # to be differentiated again, or many gradients at once
        if torch.is_grad_enabled() or is_batched(grad) or functorch_level() is not None:
            wanted = ctx.needs_input_grad[4:]
            return None, None, None, None, *_followed_gradients(q, k, v, mask, ctx.a, grad, wanted)
        # several blocks add to the same keys: their sum is rounded once
        wide = torch.promote_types(q.dtype, torch.float32)
        dq = torch.empty_like(q)
        dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        dmask = torch.zeros(mask.shape, dtype=wide, device=q.device) if ctx.needs_input_grad[7] else None
        with torch.autocast(q.device.type, enabled=False):  # the caller's may be on while its backward runs
            for block in blocks_of(q, k, ctx.a):
                given = block.inputs(q, k, v, mask, ctx.a)
                found = ctx.step_back(*given[:4], out[block.query], grad[block.query], given[4])
                kv = (block.batch, block.kv_heads, block.keys)
                dq[block.query] = found[0]
                dk[kv] += found[1]
                dv[kv] += found[2]
                if dmask is not None:
                    part = block.of_mask(dmask)
                    assert part is not None
                    part += found[3].sum_to_size(part.shape)
        of_mask = dmask.to(mask.dtype) if dmask is not None else None
        return None, None, None, None, dq, dk.to(k.dtype), dv.to(v.dtype), of_mask
