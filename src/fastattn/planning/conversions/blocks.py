"""Attention in blocks of heads and query rows: scores and copies stay in a cache, and memory within its limit.

Batch entries and kv heads are cut first, then query rows; keys that no row of a block sees are left out. Three conversions
stand on it: `chunks` cuts an unfused forward, `by_heads` has a few heads at a time cast, recompute (recompute.py) cuts a
backward too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.kernels.kernel import Arguments, Kernel, Run
from fastattn.planning.conversions.conversion import NO, OPTIONAL, REQUIRED
from fastattn.planning.conversions.dtype import when_fp32
from fastattn.planning.default_output import output_order
from fastattn.problems import length_buckets
from fastattn.problems.call_facts import CallFacts
from fastattn.problems.layouts import empty_in_order
from fastattn.problems.problem import Problem

CHUNK_BYTES = 4 * 2**20  # of float32 scores at once on a CPU: they stay in a core's second-level cache
SHARE_ON_CUDA = (
    4  # of the memory limit there, as each block is several launches, and its scores are held up to three times
)
FEW_ROWS = 64  # of queries to a kv head: with more of them the products are most of the work
CAST_BYTES = (
    4 * 2**20
)  # of float32 copies at once: much larger ones leave the caches, and malloc maps them anew in each call


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
        """Its part of a (b|1, h|1, q|1, k|1) or (q, k) mask."""
        if mask is None:
            return None
        parts = (self.batch, self.heads, self.rows, self.keys)[-mask.dim() :]
        return mask[tuple(part if n > 1 else slice(None) for n, part in zip(mask.shape, parts, strict=True))]


def chunk_bytes(p: Problem) -> int:
    """Of float32 scores at once."""
    return p.memory_limit // SHARE_ON_CUDA if p.device == "cuda" else CHUNK_BYTES


def blocks_of(
    q: Tensor, k: Tensor, a: Arguments, sizes: tuple[int, int, int] | None = None, target: int | None = None
) -> Iterator[Block]:
    """The blocks of a problem, in memory order. sizes: (batch entries, kv heads, query rows) of one; else by `target` bytes."""
    batch, q_heads, q_len, _ = q.shape
    kv_heads, kv_len = k.shape[1:3]
    group = q_heads // kv_heads
    banded = a.upper is not None or a.lower is not None
    nb, nh, rows = sizes or block_sizes(batch, kv_heads, group, q_len, kv_len, banded, target)
    for b in range(0, batch, nb):
        for h in range(0, kv_heads, nh):
            for r in range(0, q_len, rows):
                end = min(q_len, r + rows)
                last = kv_len if a.upper is None else min(kv_len, max(1, end + a.upper))
                first = 0 if a.lower is None else min(max(0, r + a.lower), last - 1)
                yield Block(
                    slice(b, b + nb),
                    slice(h * group, (h + nh) * group),
                    slice(h, h + nh),
                    slice(r, end),
                    slice(first, last),
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
    return *_heads_at_once(batch, kv_heads, count), rows


def _heads_at_once(batch: int, kv_heads: int, count: int) -> tuple[int, int]:
    """(batch entries, kv heads) of about `count` heads, in equal shares."""
    nb = max(1, min(batch, count // kv_heads))
    nh = kv_heads if nb > 1 else min(kv_heads, count)
    return -(-batch // -(-batch // nb)), -(-kv_heads // -(-kv_heads // nh))


# --- chunks: the forward, or what autograd can follow


def when_chunks(kernel: Kernel, p: Problem, facts: CallFacts) -> str:
    if not kernel.chunks or p.scores * 4 <= chunk_bytes(p) or (p.needs_grad and kernel.load_backward is not None):
        return NO  # `recompute` cuts as well
    return REQUIRED if p.unfused_bytes > p.memory_limit else OPTIONAL


def chunks(step: Run, kernel: Kernel, p: Problem, facts: CallFacts) -> Run:
    order, target = output_order(p, facts), chunk_bytes(p)

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        blocks = blocks_of(q, k, a, target=target)
        if a.needs_grad:
            return _followed(step, blocks, q, k, v, mask, a)
        return forward(step, order, blocks, q, k, v, mask, a)

    return run


def forward(
    step: Run, order: Any, blocks: Iterable[Block], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments
) -> Any:
    """The step, block by block, into one output that lies densely in `order`."""
    out = empty_in_order(q, (*q.shape[:3], v.shape[3]), order)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if a.lse else None
    for block in blocks:
        found = step(*block.inputs(q, k, v, mask, a))
        if lse is not None:
            found, lse[block.query] = found
        out[block.query] = found
    return out if lse is None else (out, lse)


def _followed(
    step: Run, blocks: Iterable[Block], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments
) -> Any:
    """The same for autograd: each block keeps its inputs, not its scores, and the parts are joined."""
    from torch.utils.checkpoint import checkpoint

    def one(block: Block) -> Any:
        given = block.inputs(q, k, v, mask, a)
        return checkpoint(step, *given, use_reentrant=False, preserve_rng_state=a.dropout_p > 0)

    found = [(block, one(block)) for block in blocks]
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


# --- by_heads: whole heads, so that copies stay small


def when_by_heads(kernel: Kernel, p: Problem, facts: CallFacts) -> str:
    return OPTIONAL if when_fp32(kernel, p, facts) != NO and are_copies_all(p) else NO


def are_copies_all(p: Problem) -> bool:
    """Whether copies of the keys and values, in float32, are most of the work, and too large to be made at once: decoding."""
    few = p.group * p.q_len <= FEW_ROWS and p.device == "cpu" and not p.needs_grad
    heads = length_buckets.canonical_batch(p.batch) * p.kv_heads  # all of a bucket is decided alike
    return few and heads * _copied(length_buckets.canonical_length(p.kv_len), p.head_dim, p.head_dim_v) > 2 * CAST_BYTES


def _copied(kv_len: int, head_dim: int, head_dim_v: int) -> int:
    """Bytes of a head's keys and values in float32."""
    return 4 * kv_len * (head_dim + head_dim_v)


def by_heads(step: Run, kernel: Kernel, p: Problem, facts: CallFacts) -> Run:
    order, threads = output_order(p, facts), p.threads

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        (batch, kv_heads, kv_len, head_dim), q_len = k.shape, q.shape[2]
        count = max(
            threads, CAST_BYTES // max(1, _copied(kv_len, head_dim, v.shape[3]))
        )  # one at least for each thread
        sizes = (*_heads_at_once(batch, kv_heads, count), q_len)
        return forward(step, order, blocks_of(q, k, a, sizes), q, k, v, mask, a)

    return run
