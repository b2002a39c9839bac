"""torch's own kernels, entered below its dispatcher: `sdpa_kernel` sets process-wide flags and costs 8 us a call.

Here F.sdpa whole, the CPU's fused kernel and torch's math; torch_cuda.py has the kernels for CUDA that F.sdpa chooses from,
torch_lower.py the operators below those.
"""

from __future__ import annotations

from typing import Any

from fastattn.kernels import NOT_EMPTY, Arguments, Kernel, Range, Run, Tensor, require_private


def load_default() -> Run:
    sdpa = require_private("sdpa")

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Tensor:
        return sdpa(q, k, v, mask, a.dropout_p, a.upper is not None, scale=a.scale, enable_gqa=q.shape[1] != k.shape[1])

    return run


def load_cpu_flash() -> Run:
    from fastattn.kernels import sees_nothing  # here, as the default is of this file too

    flash = require_private("cpu_flash")

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        out, lse = flash(q, k, v, 0.0, a.upper is not None, attn_mask=mask, scale=a.scale)
        if not a.lse:
            return out
        lse = lse.detach().float()
        if mask is not None:  # it says 0 for a row that sees nothing, which a real row may also have
            lse = lse.masked_fill(sees_nothing(mask, q.shape[2], k.shape[2], upper=a.upper), NEVER)
        return out, lse

    return run


def load_math() -> Run:
    math = require_private("math")
    return lambda q, k, v, mask, a: math(
        q, k, v, mask, a.dropout_p, a.upper is not None, scale=a.scale, enable_gqa=q.shape[1] != k.shape[1]
    )[0]


NEVER = float("-inf")

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
        tiles=True,
        split_kv=True,
        pad_lengths=True,
        equal_head_dims=True,
        output_lies="as_query",
        dense_last_dim=True,
        contiguous=True,
        fp32=True,
        switch="flash",
        needs=NOT_EMPTY,
    ),
    Kernel(
        name="torch_math",
        unfused=True,
        output_lies="contiguous",
        twice_differentiable=True,
        summary="torch's unfused math",
        load=load_math,
        devices=("cpu", "cuda"),
        masks=("additive",),  # the raw op adds a bool mask as 0 and 1
        mask_grad=True,
        dropout=True,
        switch="math",
        products=True,
        needs=(Range("kv_len", min=1),),
    ),
)
