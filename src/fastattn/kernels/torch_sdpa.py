"""torch's own kernels, entered below its dispatcher: `sdpa_kernel` sets process-wide flags and costs 8 us a call.

The CPU rows: `_scaled_dot_product_flash_attention_for_cpu` (fused) and `_scaled_dot_product_attention_math`.
The CUDA rows follow aten/src/ATen/native/transformers/cuda/sdp_utils.cpp; the raw ops check less than the dispatcher does.
"""

from __future__ import annotations

from typing import Any

from fastattn.kernel import Arguments, Kernel, OneOf, Range, RefuseWhen, Run, Tensor, require


def load_default() -> Run:
    sdpa = require("sdpa")

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Tensor:
        return sdpa(
            q, k, v, mask, a.dropout_p, a.upper is not None, scale=a.scale, enable_gqa=q.shape[1] != k.shape[1]
        )

    return run


def load_cpu_flash() -> Run:
    flash = require("cpu_flash")

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        out, lse = flash(q, k, v, 0.0, a.upper is not None, attn_mask=mask, scale=a.scale)
        if not a.lse:
            return out
        lse = lse.detach().float()
        if mask is not None:  # it says 0 for a row that sees nothing, which a real row may also have
            seen = mask != NEVER
            if a.upper is not None:
                seen = seen.expand(*seen.shape[:2], q.shape[2], k.shape[2]).tril(a.upper)
            lse = lse.masked_fill(seen.any(-1).logical_not(), NEVER)
        return out, lse

    return run


def load_math() -> Run:
    math = require("math")
    return lambda q, k, v, mask, a: math(
        q, k, v, mask, a.dropout_p, a.upper is not None, scale=a.scale, enable_gqa=q.shape[1] != k.shape[1]
    )[0]


def load_cuda_flash() -> Run:
    flash = require("cuda_flash")
    return lambda q, k, v, mask, a: flash(q, k, v, 0.0, a.upper is not None, False, scale=a.scale)[0]


def load_cuda_efficient() -> Run:
    efficient = require("cuda_efficient")

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Tensor:
        if mask is not None:
            mask = aligned(mask, q, k)
        return efficient(q, k, v, mask, a.needs_grad, 0.0, a.upper is not None, scale=a.scale)[0]

    def aligned(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
        # The kernel wants (b, h, q, k) with rows at multiples of 16 bytes: a slice of a padded tensor where they are not.
        b, h, s, kv_len = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
        mask = mask.to(q.dtype)
        if kv_len % 8 or mask.shape[-1] == 1 or mask.stride(-1) != 1:
            padded = mask.new_zeros((*mask.shape[:-1], -(-kv_len // 8) * 8))
            padded[..., :kv_len] = mask
            mask = padded[..., :kv_len]
        return mask.expand(b, h, s, kv_len)

    return run


def load_cuda_cudnn() -> Run:
    cudnn = require("cuda_cudnn")

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Tensor:
        # A float32 mask beside half inputs is read as garbage (pytorch#191612): cast it.
        mask = mask.to(q.dtype) if mask is not None else None
        return cudnn(q, k, v, mask, a.needs_grad, 0.0, a.upper is not None, False, scale=a.scale)[0]

    return run


NEVER = float("-inf")
NO_EMPTY = Range("kv_len", min=1)
HALF = ("float16", "bfloat16")

KERNELS = (
    Kernel(
        name="default",
        summary="F.scaled_dot_product_attention called whole: what the user would have had",
        load=load_default,
        devices=("cpu", "cuda"),
        causal_scales=("positive",),  # on the CPU: see torch_flash
        masks=("bool", "additive"),
        mask_grad=True,
        dropout=True,
        deterministic=True,  # it reads the deterministic switch itself
    ),
    Kernel(
        name="torch_flash",
        summary="torch's fused CPU kernel",
        load=load_cpu_flash,
        causal_scales=("positive",),  # it masks before it scales: -inf * 0 is NaN, -inf * -1 is +inf (torch 2.13)
        masks=("additive",),
        mask_and_causal=True,
        lse=True,
        gqa_fold=True,
        equal_head_dims=True,
        dense_last_dim=True,
        contiguous=True,
        fp32=True,
        switch="flash",
        needs=(Range("q_len", min=1), NO_EMPTY),
    ),
    Kernel(
        name="torch_math",
        unfused=True,
        summary="torch's unfused math",
        load=load_math,
        devices=("cpu", "cuda"),
        masks=("additive",),  # the raw op adds a bool mask as 0 and 1
        mask_grad=True,
        dropout=True,
        switch="math",
        reads=("precision",),
        needs=(NO_EMPTY,),
    ),
    Kernel(
        name="torch_flash",
        summary="torch's copy of FlashAttention 2 (or the implementation that was activated)",
        load=load_cuda_flash,
        devices=("cuda",),
        dtypes=HALF,
        corner="bottom_right",  # the raw op; the dispatcher refuses q_len != kv_len instead
        equal_head_dims=True,
        head_dim_multiple=8,
        dense_last_dim=True,
        switch="flash",
        needs=(
            Range("capability", min=80, max=121),
            Range("head_dim", max=256),
            Range("head_dim_v", max=256),
            Range("q_len", min=1),
            NO_EMPTY,
            OneOf("scale", ("positive",)),
            RefuseWhen(
                "training with head_dim {p.head_dim} > 192 on sm{device.capability} (86, 89, 120 and 121 refuse it)",
                lambda p, device: p.needs_grad and p.head_dim > 192 and device.capability in (86, 89, 120, 121),
            ),
        ),
    ),
    Kernel(
        name="torch_efficient",
        summary="torch's memory-efficient kernel (cutlass)",
        load=load_cuda_efficient,
        devices=("cuda",),
        dtypes=(*HALF, "float32"),
        masks=("additive",),
        mask_and_causal=True,
        gqa=False,
        mask_grad=True,
        head_dim_multiple=8,
        dense_last_dim=True,
        deterministic=False,
        switch="efficient",
        needs=(
            Range("capability", min=50, max=121),
            Range("q_len", min=1),
            NO_EMPTY,
            # batch and heads are grid dimensions (pytorch#142228)
            Range("batch", max=65535),
            Range("q_heads", max=65535),
            OneOf("aligned", (True,)),
            RefuseWhen(
                "wrong with a mask or causal and q_len {p.q_len} > 65536 (pytorch#162588)",
                lambda p, _: p.q_len > 65536 and bool(p.mask or p.causal),
            ),
        ),
    ),
    Kernel(
        name="torch_cudnn",
        summary="cuDNN's fused kernel through torch",
        load=load_cuda_cudnn,
        devices=("cuda",),
        dtypes=HALF,
        masks=("additive",),
        dense_last_dim=True,
        deterministic=False,
        switch="cudnn",
        needs=(
            Range("capability", min=80, max=121),
            Range("head_dim", max=128, multiple_of=8),
            Range("head_dim_v", max=128, multiple_of=8),
            Range("kv_len", min=2),
            Range("q_len", min=1),
            Range("batch", max=65535),
            Range("q_heads", max=65535),
            OneOf("scale", ("positive",)),
        ),
    ),
)
