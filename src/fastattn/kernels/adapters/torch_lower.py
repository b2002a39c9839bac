"""torch's flash and efficient kernels below their SDPA wrappers: windows and both corners, without any library.

Read in torch 2.13, and in 2.14.1 that the efficient op takes fewer kv heads. It keeps no window for its backward (its
gradients would be those of no window), and its bottom-right corner is computed in unsigned numbers: with more queries than
keys it hides nothing. Its window counts the query's own key. Where no key is visible flash says a log-sum-exp of +inf, the
efficient kernel 0.
"""

from __future__ import annotations

from typing import Any

from fastattn.kernels import (
    BFLOAT16,
    FLASH_2_BACKWARD,
    GRID,
    NOT_EMPTY,
    OWN_MASK,
    Arguments,
    Kernel,
    OneOf,
    Range,
    RefuseWhen,
    Run,
    Tensor,
    as_bias,
    require_keywords,
    require_private,
    sees_nothing,
)

INF = float("inf")


def load_flash() -> Run:
    flash = require_keywords(
        require_private("cuda_flash_forward"), "query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p",
        "is_causal", "return_debug_mask", "scale", "window_size_left", "window_size_right",
    )  # fmt: skip

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        q_len, kv_len = q.shape[1], k.shape[1]
        left, right = (-1 if n is None else n for n in a.window_sides(q_len, kv_len))
        out, lse, *_ = flash(
            query=q, key=k, value=v, cum_seq_q=None, cum_seq_k=None, max_q=q_len, max_k=kv_len, dropout_p=a.dropout_p,
            is_causal=right == 0, return_debug_mask=False, scale=a.scale, window_size_left=left, window_size_right=right,
        )  # fmt: skip
        return (out, natural(lse)) if a.lse else out

    return run


def natural(lse: Tensor) -> Tensor:
    lse = lse.detach()
    return lse.masked_fill(lse == INF, -INF)


def load_efficient() -> Run:
    efficient = require_keywords(
        require_private("cuda_efficient_forward"), "query", "key", "value", "bias", "cu_seqlens_q", "cu_seqlens_k",
        "max_seqlen_q", "max_seqlen_k", "dropout_p", "custom_mask_type", "compute_log_sumexp", "scale", "window_size",
    )  # fmt: skip

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        b, s, h, kv_len = *q.shape[:3], k.shape[1]
        out, lse, *_ = efficient(
            query=q, key=k, value=v, bias=None if mask is None else as_bias(mask, q, (b, h, s, kv_len)),
            cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, dropout_p=a.dropout_p,
            custom_mask_type=0 if a.upper is None else 1 if a.upper == 0 else 2,  # none, top-left, bottom-right
            window_size=None if a.lower is None or a.upper is None else a.upper - a.lower + 1,
            scale=a.scale, compute_log_sumexp=a.needs_grad or a.lse,
        )  # fmt: skip
        if not a.lse:
            return out
        lse = lse[..., :s].detach()  # padded to a multiple of 32
        return out, lse if mask is None else lse.masked_fill(sees_nothing(mask, s, kv_len, a.lower, a.upper), -INF)

    return run


HALF = ("float16", "bfloat16")
FLASH_NEEDS = (
    Range("capability", min=80, max=121),
    Range("head_dim", min=1, max=256),
    Range("head_dim_v", max=256),
    *NOT_EMPTY,
    *GRID,
    OneOf("scale", ("positive",)),
    FLASH_2_BACKWARD,
)
DROPOUT = RefuseWhen(
    "dropout with the {p.flash_impl} implementation of torch's flash kernel",
    lambda p, _: bool(p.dropout and p.flash_impl),
)

FLASH = Kernel(
    name="aten_flash",
    summary="torch's copy of FlashAttention 2 below SDPA: with windows",
    load=load_flash,
    devices=("cuda",),
    dtypes=HALF,
    layout="bshd",
    corner="bottom_right",
    causal_scales=("positive",),
    window=True,
    dropout=True,
    lse=True,
    equal_head_dims=True,
    head_dim_multiple=8,
    dense_last_dim=True,
    aligned=True,
    switch="flash",
    needs=(*FLASH_NEEDS, DROPOUT),
)

KERNELS = (
    FLASH,
    Kernel(
        name="aten_efficient",
        summary="torch's memory-efficient kernel (cutlass) below SDPA: with the other corner and causal windows",
        load=load_efficient,
        devices=("cuda",),
        dtypes=(*HALF, "float32"),
        layout="bshd",
        corner="any",
        masks=("additive",),
        mask_and_causal=True,
        window=True,
        dropout=True,
        lse=True,
        gqa="2.14",
        gqa_fold=True,
        mask_grad=True,
        head_dim_bytes=16,
        dense_last_dim=True,
        aligned=True,
        switch="efficient",
        needs=(
            Range("capability", min=50, max=121),
            Range("head_dim", min=1),
            *NOT_EMPTY,
            *GRID,
            BFLOAT16,
            OWN_MASK,
            RefuseWhen(
                "causal bottom_right with q_len {p.q_len} > kv_len {p.kv_len}: it hides nothing then",
                lambda p, _: p.causal == "bottom_right" and p.q_len > p.kv_len,
            ),
            RefuseWhen(
                "a window {p.window} that no triangle ends, it has causal ones",
                lambda p, _: bool(p.window and p.causal is None and p.window[1] != 0),
            ),
            RefuseWhen(
                "a window {p.window} with q_len {p.q_len} > kv_len {p.kv_len}: some rows are not written then",
                lambda p, _: bool(p.window and p.q_len > p.kv_len),
            ),
            RefuseWhen(
                "training with a window {p.window}: its backward is not told of it",
                lambda p, _: bool(p.window and p.needs_grad),
            ),
        ),
    ),
)
