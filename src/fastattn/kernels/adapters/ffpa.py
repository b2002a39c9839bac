"""FFPA (package ffpa-attn), for head dims over 256, which FlashAttention does not take: its Triton kernels, and those in CuTe.

ffpa_attn_func calls F.sdpa itself for what it leaves to it: up to 256, and in Triton 8 to 511 queries, or fewer than 512 keys.
A triangle of its own is drawn at the lower right and theirs at the upper left, so none of that may reach it. Further:
  - A row of Triton's is NaN where its first block of keys is hidden by a mask.
  - Triton adds gradients up in memory by atomics, in the inputs' dtype unless told otherwise.
  - Dropout compiles the kernel anew for each seed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from fastattn.kernels import (
    GRID,
    NOT_EMPTY,
    Arguments,
    Kernel,
    OneOf,
    Range,
    RefuseWhen,
    Run,
    Tensor,
    require_keywords,
)

FEWEST = 512  # keys and rows of queries that Triton's kernels are used for; up to DECODE rows are split by keys
DECODE = 7


def load(backend: str) -> Run:
    import ffpa_attn  # pyright: ignore[reportMissingImports]
    import torch

    attend = require_keywords(ffpa_attn.ffpa_attn_func, "query", "key", "value", "is_causal", "scale", "enable_gqa")
    if backend == "triton":
        forward = require_keywords(ffpa_attn.TritonBackend, "forward")(forward=True)
        storage = {"grad_kv_storage_dtype": torch.float32, "grad_q_storage_dtype": torch.float32}
        backward = require_keywords(ffpa_attn.TritonBackend, "backward", *storage)(backward=True, **storage)
    else:
        forward = require_keywords(ffpa_attn.CuTeDSLBackend, "forward")(forward=True)
        backward = require_keywords(ffpa_attn.CuTeDSLBackend, "backward")(backward=True)

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        return attend(
            query=q, key=k, value=v, is_causal=a.upper is not None, scale=a.scale, enable_gqa=q.shape[1] != k.shape[1],
            forward_backend=forward, backward_backend=backward,
        )  # fmt: skip

    return run


def _row(backend: str, summary: str, *needs: Any, **fields: Any) -> Kernel:
    shared = (
        Range("capability", min=80, max=121),
        Range("head_dim", min=257, max=1024),
        Range("extent", max=2**31 - 1),  # 32-bit offsets
        OneOf("scale", ("positive",)),
        RefuseWhen(
            "causal with q_len {p.q_len} > kv_len {p.kv_len}: it raises",
            lambda p, _: p.causal is not None and p.q_len > p.kv_len,
        ),
    )
    return Kernel(
        name=f"ffpa_{backend}", summary=summary, load=partial(load, backend), library="ffpa-attn", versions=("0.2", ""),
        devices=("cuda",), dtypes=("float16", "bfloat16"), corner="bottom_right", causal_scales=("positive",),
        equal_head_dims=True, dense_last_dim=True, compiles="once", needs=(*needs, *shared), **fields,
    )  # fmt: skip


KERNELS = (
    _row(
        "cute", "FFPA's kernels in CuTe, for wide heads",
        *GRID,
        *NOT_EMPTY,
        RefuseWhen(  # its backward for other silicon says another corner than its forward
            "training with a triangle and q_len {p.q_len} != kv_len {p.kv_len}",
            lambda p, _: p.needs_grad and p.causal is not None and p.q_len != p.kv_len,
        ),
        head_dim_multiple=64, aligned=True, output_lies="contiguous",
    ),
    _row(
        "triton", "FFPA's Triton kernels, for wide heads",
        Range("q_len", min=1),
        Range("kv_len", min=FEWEST),
        RefuseWhen(
            f"q_len {{p.q_len}} between {DECODE + 1} and {FEWEST - 1}: it leaves that to F.sdpa",
            lambda p, _: DECODE < p.q_len < FEWEST,
        ),
        Range("batch", min=1),
        Range("q_heads", min=1),
        RefuseWhen(
            "batch {p.batch} times {p.q_heads} heads > 65535, a grid dimension",
            lambda p, _: p.batch * p.q_heads > 65535,
        ),
        head_dim_multiple=8, deterministic=False, output_lies="as_query",
    ),
)  # fmt: skip
