"""Conversions: what must be done to the caller's tensors for a kernel. Each lives here once, as a row.

A row says when it applies to a kernel and a problem, and wraps a step (q, k, v, mask, arguments) -> out in another one
that converts on the way in and, where needed, on the way out. Rows stand in the order in which they are applied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastattn import masks
from fastattn.kernel import Arguments, Kernel, Run
from fastattn.layouts import empty_in_order, memory_order
from fastattn.problem import Problem

# Answers of Conversion.when; any other string is the reason why the kernel cannot do the problem.
NO, OPTIONAL, REQUIRED = "no", "optional", "required"


@dataclass(frozen=True, slots=True)
class Conversion:
    """`when(kernel, problem)` answers NO, OPTIONAL, REQUIRED or a reason; `wrap(step, kernel, problem)` makes the step."""

    name: str
    summary: str
    when: Callable[[Kernel, Problem], str]
    wrap: Callable[[Run, Kernel, Problem], Run]


# --- mask forms


def _draws(kernel: Kernel, p: Problem) -> bool:
    """Whether it draws this triangle itself; on a square one both corners coincide."""
    if p.causal is None:
        return True
    corner = kernel.corner in (p.causal, "any") or bool(kernel.corner and p.q_len == p.kv_len)
    return corner and p.scale in kernel.causal_scales


def _when_mask_dense(kernel: Kernel, p: Problem) -> str:
    if p.causal is None or (_draws(kernel, p) and (p.mask is None or kernel.mask_and_causal)):
        return NO
    if kernel.masks:
        return REQUIRED
    if kernel.corner is None:
        return NO  # no triangle at all: candidates.py says so
    if p.mask is not None:
        return "a mask together with causal is not supported"
    if p.scale not in kernel.causal_scales:
        return f"causal with a scale that is {p.scale}, not {' or '.join(kernel.causal_scales)}"
    return f"causal {p.causal} with q_len {p.q_len} != kv_len {p.kv_len}, it draws {kernel.corner}"


def _mask_dense(step: Run, kernel: Kernel, p: Problem) -> Run:
    corner = p.causal or "top_left"

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Tensor:
        q_len, kv_len = q.shape[2], k.shape[2]
        mask = masks.intersect(mask, q, q_len, kv_len, masks.diagonal(corner, q_len, kv_len))
        return step(q, k, v, mask, a._replace(diagonal=None))

    return run


def _is_bool_mask(kernel: Kernel, p: Problem) -> bool:
    return p.mask == "bool" or (p.mask is None and _when_mask_dense(kernel, p) == REQUIRED)


def _when_mask_additive(kernel: Kernel, p: Problem) -> str:
    return REQUIRED if _is_bool_mask(kernel, p) and "bool" not in kernel.masks and kernel.masks else NO


def _mask_additive(step: Run, kernel: Kernel, p: Problem) -> Run:
    return lambda q, k, v, mask, a: step(q, k, v, masks.additive(mask, q) if mask is not None else None, a)


# --- heads


def _can_fold(p: Problem) -> bool:
    """Rows of one kv head's queries may be stacked where no row needs to know its own index."""
    return p.group > 1 and p.causal is None and (p.q_len == 1 or p.mask is None)


def _when_gqa_fold(kernel: Kernel, p: Problem) -> str:
    return OPTIONAL if kernel.gqa_fold and _can_fold(p) else NO


def _gqa_fold(step: Run, kernel: Kernel, p: Problem) -> Run:
    group = p.group

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Tensor:
        b, h, s, d = q.shape
        folded = q.reshape(b, h // group, group * s, d)
        if mask is not None and mask.dim() == 4 and mask.shape[1] > 1:
            mask = mask.reshape(mask.shape[0], h // group, group, mask.shape[3])
        return step(folded, k, v, mask, a).reshape(b, h, s, v.shape[3])

    return run


def _when_gqa_expand(kernel: Kernel, p: Problem) -> str:
    return REQUIRED if p.group > 1 and not kernel.gqa else NO


def _gqa_expand(step: Run, kernel: Kernel, p: Problem) -> Run:
    group = p.group

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Tensor:
        return step(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), mask, a)

    return run


# --- memory


def _when_contiguous(kernel: Kernel, p: Problem) -> str:
    if kernel.dense_last_dim and "other" in p.strides:
        return REQUIRED
    # A copy pays only if keys and values are read more than a few times.
    worth = kernel.contiguous and p.q_len >= 64 and set(p.strides) != {"contiguous"}
    return OPTIONAL if worth else NO


def _contiguous(step: Run, kernel: Kernel, p: Problem) -> Run:
    return lambda q, k, v, mask, a: step(q.contiguous(), k.contiguous(), v.contiguous(), mask, a)


# --- dtypes


def _when_fp32(kernel: Kernel, p: Problem) -> str:
    if p.dtype in ("float16", "bfloat16") and kernel.fp32:
        return OPTIONAL if p.dtype in kernel.dtypes else REQUIRED
    return NO


def _fp32(step: Run, kernel: Kernel, p: Problem) -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Tensor:
        if mask is not None and mask.dtype is not torch.bool:
            mask = mask.float()
        return step(q.float(), k.float(), v.float(), mask, a).to(q.dtype)

    return run


# --- head dims


def _widths(kernel: Kernel, p: Problem) -> tuple[int, int]:
    multiple = kernel.head_dim_multiple
    width, width_v = (-(-d // multiple) * multiple for d in (p.head_dim, p.head_dim_v))
    widest = max(width, width_v)
    return (widest, widest) if kernel.equal_head_dims else (width, width_v)


def _when_pad(kernel: Kernel, p: Problem) -> str:
    return NO if _widths(kernel, p) == (p.head_dim, p.head_dim_v) else REQUIRED


def _pad(step: Run, kernel: Kernel, p: Problem) -> Run:
    width, width_v = _widths(kernel, p)
    more, more_v, head_dim_v = width - p.head_dim, width_v - p.head_dim_v, p.head_dim_v

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Tensor:
        if more:  # zeros add nothing to q k^T; the scale was taken from the caller's head_dim
            q, k = pad(q, (0, more)), pad(k, (0, more))
        if more_v:
            return step(q, k, pad(v, (0, more_v)), mask, a)[..., :head_dim_v]
        return step(q, k, v, mask, a)

    return run


# --- blocks

CHUNK_BYTES = 4 * 2**20  # of float32 scores at once: they stay in a core's second-level cache


def _when_chunks(kernel: Kernel, p: Problem) -> str:
    if not kernel.chunks or p.scores * 4 <= CHUNK_BYTES:
        return NO
    return REQUIRED if p.unfused_bytes > p.memory_limit else OPTIONAL


def _chunks(step: Run, kernel: Kernel, p: Problem) -> Run:
    """Batch and kv heads are cut first, then query rows; with causal, keys that no row of a block sees are left out."""
    group, order = p.group, memory_order(p.strides[0])

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Tensor:
        out: Tensor | None = None if a.needs_grad else empty_in_order(q, (*q.shape[:3], v.shape[3]), order)
        parts: list[list[list[Tensor]]] = []
        batch, _, q_len, _ = q.shape
        kv_heads, kv_len = k.shape[1:3]
        nb, nh, rows = block_sizes(batch, kv_heads, group, q_len, kv_len, a.diagonal is not None)
        for b in range(0, batch, nb):
            for h in range(0, kv_heads, nh):
                kc, vc = k[b : b + nb, h : h + nh], v[b : b + nb, h : h + nh]
                heads = slice(h * group, (h + nh) * group)
                mh = _cut(_cut(mask, 0, b, nb), 1, h * group, nh * group)
                for r in range(0, q_len, rows):
                    qc = q[b : b + nb, heads, r : r + rows]
                    mr = _cut(mh, 2, r, rows)
                    if a.diagonal is None:
                        args, seen = a, kv_len
                    else:
                        diagonal = r + a.diagonal
                        args = a._replace(diagonal=diagonal)
                        seen = min(kv_len, max(1, r + qc.shape[2] + a.diagonal))
                    if seen < kv_len:
                        mr = _cut(mr, 3, 0, seen)
                        block = (qc, kc[:, :, :seen], vc[:, :, :seen], mr, args)
                    else:
                        block = (qc, kc, vc, mr, args)
                    if out is not None:
                        out[b : b + nb, heads, r : r + rows] = step(*block)
                    else:
                        if h == 0 and r == 0:
                            parts.append([])
                        if r == 0:
                            parts[-1].append([])
                        parts[-1][-1].append(_recomputed(step, block))
        if out is not None:
            return out
        return torch.cat([torch.cat([torch.cat(rs, 2) for rs in hs], 1) for hs in parts], 0)

    return run


def _recomputed(step: Run, block: tuple[Tensor, Tensor, Tensor, Tensor | None, Arguments]) -> Tensor:
    """Keep a block's inputs for the backward, not its scores."""
    from torch.utils.checkpoint import checkpoint

    return checkpoint(step, *block, use_reentrant=False, preserve_rng_state=False)


def block_sizes(
    batch: int, kv_heads: int, group: int, q_len: int, kv_len: int, causal: bool, target: int = CHUNK_BYTES
) -> tuple[int, int, int]:
    """(batch entries, kv heads, query rows) of one block whose float32 scores take about `target` bytes."""
    row = group * kv_len * 4
    rows = min(q_len, max(128, -(-q_len // 8))) if causal else q_len
    blocks = max(1, target // (rows * row))
    if blocks == 1:
        # two heads at a time where it can be: one for each of two threads
        blocks = min(2, batch * kv_heads)
        rows = min(rows, max(16, target // (blocks * row)))
        rows = -(-q_len // -(-q_len // rows))  # equal shares
    nb = max(1, min(batch, blocks // kv_heads))
    nh = kv_heads if nb > 1 else min(kv_heads, blocks)
    return -(-batch // -(-batch // nb)), -(-kv_heads // -(-kv_heads // nh)), rows


def _cut(mask: Tensor | None, dim: int, start: int, size: int) -> Tensor | None:
    """The part of a (b|1, h|1, q|1, k|1) mask that belongs to a block."""
    if mask is None or mask.shape[dim] == 1:
        return mask
    return mask.narrow(dim, start, min(size, mask.shape[dim] - start))


CONVERSIONS: tuple[Conversion, ...] = (
    Conversion("mask_dense", "the causal triangle as a dense mask", _when_mask_dense, _mask_dense),
    Conversion("mask_additive", "a bool mask as the float mask that is added", _when_mask_additive, _mask_additive),
    Conversion("gqa_fold", "the query group folded into rows", _when_gqa_fold, _gqa_fold),
    Conversion("gqa_expand", "keys and values repeated for each query head", _when_gqa_expand, _gqa_expand),
    Conversion("contiguous", "q, k, v copied to dense memory", _when_contiguous, _contiguous),
    Conversion("fp32", "cast to float32, the output back", _when_fp32, _fp32),
    Conversion("head_dim_pad", "head dims padded with zeros", _when_pad, _pad),
    Conversion("chunks", "cut into blocks of heads and query rows", _when_chunks, _chunks),
)
BY_NAME = {c.name: c for c in CONVERSIONS}
