"""FlashAttention 2, package flash-attn: half dtypes, sm80 and newer, no masks.

Needs 2.6: causal turned from the top-left to the bottom-right corner in 2.1, windows came in 2.3, `deterministic` in 2.4,
softcap in 2.6. Where no key is visible it gives a zero row and a log-sum-exp of +inf. It takes a side of a window that is as
long as the keys for none, and an unlimited right side beside a limited left one for kv_len keys: both right on the bands of
its own corner, which are all it gets.
"""

from __future__ import annotations

from collections.abc import Callable
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
    is_before,
    require_keywords,
)

INF = float("inf")


def load() -> Run:
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

    return of(flash_attn_func)


def of(function: Callable[..., Any]) -> Run:
    """Its flash_attn_func, wherever it comes from."""
    attend = require_keywords(
        function, "q", "k", "v", "dropout_p", "softmax_scale", "causal", "window_size", "softcap", "deterministic",
        "return_attn_probs",
    )  # fmt: skip

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        left, right = a.window_sides(q.shape[1], k.shape[1])
        found = attend(
            q=q,
            k=k,
            v=v,
            dropout_p=a.dropout_p,
            softmax_scale=a.scale,
            causal=right == 0,
            window_size=(-1 if left is None else left, right or -1),  # causal makes the right side 0
            softcap=a.softcap,
            deterministic=a.deterministic,
            return_attn_probs=a.lse,
        )
        if not a.lse:
            return found
        out, lse, _ = found
        lse = lse.detach()
        return out, lse.masked_fill(lse == INF, -INF)

    return run


def load_packed() -> Run:
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    return of_packed(flash_attn_varlen_func)


def of_packed(function: Callable[..., Any]) -> Run:
    """Its flash_attn_varlen_func. It writes no row that is in no sequence, and zeros where a sequence has no keys.

    With a longest query of 1, and groups, it takes token i for sequence i (flash-attention#1537): it is told 2.
    """
    attend = require_keywords(
        function, "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "dropout_p", "softmax_scale",
        "causal", "window_size", "softcap", "deterministic", "return_attn_probs",
    )  # fmt: skip

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        assert a.packed is not None
        left, right = a.window_sides(0, 0)
        found = attend(
            q=q[0], k=k[0], v=v[0],
            cu_seqlens_q=a.packed.cu_q, cu_seqlens_k=a.packed.cu_kv,
            max_seqlen_q=max(2, a.packed.max_q),
            max_seqlen_k=a.packed.max_kv,
            dropout_p=a.dropout_p, softmax_scale=a.scale, causal=right == 0,
            window_size=(-1 if left is None else left, -1 if right is None else right),
            softcap=a.softcap, deterministic=a.deterministic, return_attn_probs=a.lse,
        )  # fmt: skip
        if not a.lse:
            return found[None]
        out, lse, _ = found
        lse = lse.detach()
        return out[None], lse.masked_fill(lse == INF, -INF)[None]

    return run


def load_cached() -> Run:
    from flash_attn import flash_attn_with_kvcache  # pyright: ignore[reportMissingImports]

    return of_cached(flash_attn_with_kvcache)


def of_cached(function: Callable[..., Any]) -> Run:
    """Its flash_attn_with_kvcache, which reads no key behind cache_seqlens, and splits the keys where queries are few.

    Of a cache in pages it reads of a row of the table what cache_seqlens reaches.
    """
    attend = require_keywords(
        function, "q", "k_cache", "v_cache", "cache_seqlens", "softmax_scale", "causal", "window_size", "softcap", "num_splits",
        "return_softmax_lse",
    )  # fmt: skip

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        left, right = a.window_sides(0, 0)
        found = attend(
            q=q, k_cache=k, v_cache=v, cache_seqlens=a.kv_lens,
            softmax_scale=a.scale, causal=right == 0, window_size=(-1 if left is None else left, -1),
            softcap=a.softcap, num_splits=0, return_softmax_lse=a.lse,
            **({} if a.page_table is None else {"block_table": a.page_table}),
        )  # fmt: skip
        if not a.lse:
            return found
        out, lse = found[:2]
        return out, lse.masked_fill(lse == INF, -INF)

    return run


def load_paged() -> Run:
    from flash_attn import flash_attn_with_kvcache  # pyright: ignore[reportMissingImports]

    return of_paged(flash_attn_with_kvcache)


def of_paged(function: Callable[..., Any]) -> Run:
    """The same function, which must know pages."""
    return of_cached(require_keywords(function, "block_table"))


LIBRARY = "flash-attn"
READS_LENGTHS = RefuseWhen(  # mha_fwd_kvcache checks them against the table's columns (flash-attention#2711)
    "pages of {p.page_size} tokens with flash-attn 2.8.4 or newer: it reads the longest length from the GPU in each layer",
    lambda p, _: bool(p.page_size) and not is_before(LIBRARY, "2.8.4"),
)
KERNELS = (
    Kernel(
        name="flash_attn_2",
        summary="FlashAttention 2 (package flash-attn)",
        load=load,
        load_packed=load_packed,
        load_cached=load_cached,
        load_paged=load_paged,
        paged_needs=(Range("page_size", multiple_of=256), READS_LENGTHS),
        library=LIBRARY,
        versions=("2.6", "3"),
        devices=("cuda",),
        dtypes=("float16", "bfloat16"),
        layout="bshd",
        corner="bottom_right",
        window=True,
        softcap=True,
        dropout=True,
        lse=True,
        equal_head_dims=True,
        head_dim_multiple=8,
        dense_last_dim=True,
        aligned=True,
        needs=(
            Range("capability", min=80, max=121),
            Range("head_dim", min=1, max=256),
            Range("head_dim_v", max=256),
            # batch and heads are grid dimensions
            *GRID,
            *NOT_EMPTY,
            OneOf("scale", ("positive",)),
            RefuseWhen("softcap {p.softcap:g} together with dropout", lambda p, _: bool(p.softcap and p.dropout)),
            RefuseWhen("return_lse together with dropout: it would write all weights out", lambda p, _: p.lse and p.dropout),
            RefuseWhen(
                "training with dropout and head_dim {p.head_dim} > 192 on sm{device.capability} (86, 89, 120, 121 cannot)",
                lambda p, device: (
                    p.needs_grad and p.dropout and max(p.head_dim, p.head_dim_v) > 192
                    and device.capability in (86, 89, 120, 121)
                ),
            ),
        ),
    ),
)  # fmt: skip
