"""torch's CUDA kernels that F.sdpa chooses from, by aten/src/ATen/native/transformers/cuda/sdp_utils.cpp.

The raw operators check less than the dispatcher does.
"""

from __future__ import annotations

from typing import Any

from fastattn.kernels import (
    BFLOAT16,
    FLASH_2_BACKWARD,
    GRID,
    NOT_EMPTY,
    PLANNED,
    Arguments,
    Device,
    Kernel,
    OneOf,
    Range,
    RefuseWhen,
    Run,
    Tensor,
    as_bias,
    require_private,
    sees_nothing,
)


def load_flash() -> Run:
    flash = require_private("cuda_flash")

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        out, lse, *_ = flash(
            query=q, key=k, value=v, dropout_p=a.dropout_p, is_causal=a.upper is not None, scale=a.scale
        )
        if not a.lse:
            return out
        lse = lse.detach()
        return out, lse.masked_fill(lse == -NEVER, NEVER)  # it says +inf for a row that sees nothing

    return run


def load_efficient() -> Run:
    efficient = require_private("cuda_efficient")

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        b, h, s, kv_len = *q.shape[:3], k.shape[2]
        out, lse, *_ = efficient(
            query=q,
            key=k,
            value=v,
            attn_bias=None if mask is None else as_bias(mask, q, (b, h, s, kv_len)),
            compute_log_sumexp=a.needs_grad or a.lse,
            dropout_p=a.dropout_p,
            is_causal=a.upper is not None,
            scale=a.scale,
        )
        if not a.lse:
            return out
        lse = lse[..., :s].detach()  # padded to a multiple of 32; 0 for a row that sees nothing, as a real row may have
        return out, lse if mask is None else lse.masked_fill(sees_nothing(mask, s, kv_len, upper=a.upper), NEVER)

    return run


def load_cudnn() -> Run:
    cudnn = require_private("cuda_cudnn")

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        out, lse, *_ = cudnn(
            query=q,
            key=k,
            value=v,
            attn_bias=None if mask is None else mask.to(q.dtype),  # any other is read as garbage (pytorch#191612)
            compute_log_sumexp=a.needs_grad or a.lse,
            dropout_p=0.0,
            is_causal=a.upper is not None,
            scale=a.scale,
        )
        if not a.lse:
            return out
        lse = lse.detach().reshape(q.shape[:3])  # (b, h, q_len, 1) since torch 2.9
        if mask is not None:  # what it says for a row that sees nothing depends on its version
            lse = lse.masked_fill(sees_nothing(mask, q.shape[2], k.shape[2], upper=a.upper), NEVER)
        return out, lse

    return run


NEVER = float("-inf")
HALF = ("float16", "bfloat16")
WIDE_SINCE = (2, 14)  # the torch that is built with cuDNN frontend 1.24, without which there is no more than 128


def wide_cudnn(head_dim: int, head_dim_v: int, needs_grad: bool, device: Device) -> bool:
    """Whether cuDNN takes head dims over 128: can_use_cudnn_attention's rule."""
    if device.capability != 90 and not 100 <= device.capability < 110:
        return False
    if (head_dim, head_dim_v) == (192, 128):
        return device.cudnn >= 91100
    if device.torch_version < WIDE_SINCE:
        return False
    enough = 92500 if device.capability == 107 else 92200
    return device.cudnn > enough and (not needs_grad or (head_dim, head_dim_v) == (256, 256))


KERNELS = (
    Kernel(
        name="torch_flash",
        summary="torch's copy of FlashAttention 2 (or the implementation that was activated)",
        load=load_flash,
        devices=("cuda",),
        dtypes=HALF,
        corner="bottom_right",  # the raw op; the dispatcher refuses q_len != kv_len instead
        causal_scales=("positive",),
        dropout=True,
        lse=True,
        equal_head_dims=True,
        head_dim_multiple=8,
        dense_last_dim=True,
        aligned=True,
        switch="flash",
        needs=(
            Range("capability", min=80, max=121),
            Range("head_dim", min=1, max=256),
            Range("head_dim_v", max=256),
            *NOT_EMPTY,
            *GRID,
            OneOf("scale", ("positive",)),
            FLASH_2_BACKWARD,
            RefuseWhen(
                "dropout with the {p.flash_impl} implementation of torch's flash kernel",
                lambda p, _: bool(p.dropout and p.flash_impl),
            ),
        ),
    ),
    Kernel(
        name="torch_efficient",
        summary="torch's memory-efficient kernel (cutlass)",
        load=load_efficient,
        devices=("cuda",),
        dtypes=(*HALF, "float32"),
        masks=("additive",),
        mask_and_causal=True,
        dropout=True,
        lse=True,
        gqa="2.14",  # pytorch#191085, forward and backward, a mask beside them too
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
        ),
    ),
    Kernel(
        name="torch_cudnn",
        summary="cuDNN's fused kernel through torch",
        load=load_cudnn,
        devices=("cuda",),
        dtypes=HALF,
        masks=("additive",),
        lse=True,
        head_dim_multiple=8,
        dense_last_dim=True,
        aligned=True,
        deterministic=False,
        switch="cudnn",
        # No dropout: it takes only sixteenths, and a Problem does not say how much is dropped.
        needs=(
            Range("capability", min=80, max=121),
            Range("head_dim", min=1, max=256),
            Range("head_dim_v", min=1, max=256),
            RefuseWhen(
                "head dims {p.head_dim} and {p.head_dim_v} > 128 with cuDNN {device.cudnn} on sm{device.capability} (sm90 and"
                " sm100 to 110 take 192 and 128 from 91100 on, up to 256 above 92200 with torch 2.14, backward 256 and 256)",
                lambda p, device: (
                    max(p.head_dim, p.head_dim_v) > 128 and not wide_cudnn(p.head_dim, p.head_dim_v, p.needs_grad, device)
                ),
            ),
            RefuseWhen(
                PLANNED.text,
                lambda p, device: p.lengths != "exact" and not device.prefers_cudnn,  # which is what F.sdpa runs
            ),
            Range("kv_len", min=2),
            Range("q_len", min=1),
            *GRID,
            OneOf("scale", ("positive",)),
        ),
    ),
)  # fmt: skip
