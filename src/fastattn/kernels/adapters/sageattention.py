"""SageAttention 1 and 2 (package sageattention) and 3 (package sageattn3): int8 or fp4 scores, forward only.

All of them quantise: they need an accuracy from the caller. First they take the mean of the keys off k, which moves all scores
of a row by one number and keeps channels with an offset accurate (tests/kernels/test_sage_triton.py). They differ in the rest:
  1.0.6  takes that mean off the caller's own k. Not causal, it gives the tail of the last 64 keys a score of 0, not none.
         **kwargs swallows a mask, a dropout and a scale.
  2.x    leaves k alone. The mask is for the Triton function, and only from August 2025 on, though what was built before
         says 2.2.0 too (and has the tail of 1.0.6). It is added to scores in units of log 2; -inf over the first 64 keys of
         a row gives NaN; a row that sees nothing gets a mean of some keys, or zeros. The CUDA functions take a row's maximum
         before they scale. Built before December 2025 it raises where a log-sum-exp meets fewer kv heads.
  3      takes the mean off the caller's k, has no scale, and ignores a mask. It pads q and k to multiples of 128 before it
         looks for the causal corner: right on squares alone.
Causal is documented for q_len == kv_len alone. v is cast to float16 or less: beyond 65504 it is infinite. 2.x makes the
device of v the current one; here it is the current one only while a function runs.
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
    as_4d,
    require_keywords,
)

INF = float("inf")
LOG2E = 1.4426950408889634
HIDDEN = -60000.0  # float16 has it, and it is above the -1e6 that keys past the last one get


def load_1() -> Run:
    from sageattention import sageattn  # type: ignore[attr-defined]

    attend = require_keywords(sageattn, "q", "k", "v", "tensor_layout", "is_causal", "sm_scale", "smooth_k")

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        keys = {"k": k - k.mean(dim=1, keepdim=True), "smooth_k": False}  # smooth_k=True does it to the caller's k
        return attend(q=q, v=v, **keys, tensor_layout="NHD", is_causal=a.upper == 0, sm_scale=a.scale)

    return on_its_device(run)


def load_2(name: str, built: str = "", **more: Any) -> Run:
    """built: the name in sageattention.core that says whether its extension could be loaded."""
    try:
        from sageattention import core  # type: ignore[attr-defined]
    except ImportError as error:
        if "_fused" not in str(error):
            raise
        raise ImportError("its extension sageattention._fused was not built, and nothing of it works without") from None
    return of_2(core, name, built, **more)


def of_2(core: Any, name: str, built: str = "", **more: Any) -> Run:
    """A function of sageattention.core, wherever that comes from."""
    import torch

    if built and not getattr(core, built, True):
        raise ImportError(f"{name} was not built for this GPU: sageattention.core.{built} is False")
    function = getattr(core, name)
    attend = require_keywords(function, "q", "k", "v", "tensor_layout", "is_causal", "sm_scale", "return_lse", *more)

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        given = {**more, "is_causal": a.upper == 0, "sm_scale": a.scale, "return_lse": a.lse}
        if mask is None:
            return attend(q=q, k=k, v=v, tensor_layout="NHD", **given)
        mask = as_4d(mask)
        is_bool = mask.dtype is torch.bool
        given["attn_mask"] = mask if is_bool else (mask.float() * LOG2E).clamp_min(HIDDEN).to(q.dtype)
        found = attend(q=q, k=k, v=v, tensor_layout="NHD", **given)
        empty = (mask if is_bool else mask > -INF).any(-1).logical_not()  # (b|1, h|1, q|1)
        out, lse = found if a.lse else (found, None)
        out = out.masked_fill(empty.transpose(1, 2)[..., None], 0.0)
        return out if lse is None else (out, lse.masked_fill(empty, -INF))

    return on_its_device(run)


def load_3() -> Run:
    from sageattn3 import sageattn3_blackwell  # type: ignore[import-not-found]

    attend = require_keywords(sageattn3_blackwell, "q", "k", "v", "is_causal")

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        more = a.scale * q.shape[3] ** 0.5  # beside its own, which is that of the padded head_dim
        q = q if abs(more - 1) < 1e-6 else q * more
        return attend(q=q, k=k.clone(), v=v, is_causal=a.upper == 0)

    return on_its_device(run)


def on_its_device(run: Run) -> Run:
    """Triton launches on the current device, and 2.x changes it."""
    from torch.cuda import device_of

    def guarded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        with device_of(q):
            return run(q, k, v, mask, a)

    return guarded


NEEDS = (  # batch and heads are grid dimensions, offsets have 32 bits
    *GRID, *NOT_EMPTY,
    Range("head_dim_v", max=128), Range("extent", max=2**31 - 1),
)  # fmt: skip
ANY_SIGN = OneOf("scale", ("positive", "negative"))  # their quantisers divide by the largest of scale * q
TRITON = Range("capability", min=80, max=103)  # "not usable on sm120" (sageattention/core.py)
TAIL = RefuseWhen(
    "kv_len {p.kv_len} is no multiple of 64, and not causal: the tail of its last block of keys is not masked",
    lambda p, _: p.causal is None and p.kv_len % 64 != 0,
)
row = partial(
    Kernel, library="sageattention", devices=("cuda",), dtypes=("float16", "bfloat16"), layout="bshd", corner="square",
    equal_head_dims=True, dense_last_dim=True, grad=False, approximate=True, compiles="once",
)  # fmt: skip
row_2 = partial(row, versions=("2.0.1", ""), lse=True)
FROM_2 = (*NEEDS, Range("head_dim", min=1, max=128))  # it pads to 64 or 128 itself
CUDA_2 = (*FROM_2, OneOf("scale", ("positive",)))
PER_THREAD = {"qk_quant_gran": "per_thread"}
SUMS_IN_FP16 = {
    **PER_THREAD,
    "pv_accum_dtype": "fp16",
}  # the faster ones where fp32 sums cost tensor cores half their speed
SUMS_MIXED = {**PER_THREAD, "pv_accum_dtype": "fp16+fp32"}
CUDA_FUNCTIONS = (
    # name, the values' dtype, function, what says that it was built, options, GPUs ("per_thread" quantises by Triton)
    ("sage_2_fp16", "fp16", "sageattn_qk_int8_pv_fp16_cuda", "SM80_ENABLED", PER_THREAD, (80, 86, 89, 90)),
    ("sage_2_fp16_in_fp16", "fp16", "sageattn_qk_int8_pv_fp16_cuda", "SM80_ENABLED", SUMS_IN_FP16, (80, 86)),
    ("sage_2_fp16_mixed", "fp16", "sageattn_qk_int8_pv_fp16_cuda", "SM80_ENABLED", SUMS_MIXED, (80, 86)),
    ("sage_2_fp8", "fp8", "sageattn_qk_int8_pv_fp8_cuda", "SM89_ENABLED", PER_THREAD, (89,)),
    (
        "sage_2_fp8_sm120",
        "fp8",
        "sageattn_qk_int8_pv_fp8_cuda",
        "SM89_ENABLED",
        {"qk_quant_gran": "per_warp"},
        (120, 121),
    ),
    ("sage_2_fp8_sm90", "fp8", "sageattn_qk_int8_pv_fp8_cuda_sm90", "SM90_ENABLED", PER_THREAD, (90,)),
)


def _sums(options: dict[str, str]) -> str:
    return f", summed in {options['pv_accum_dtype']}" if "pv_accum_dtype" in options else ""


KERNELS = (
    row(
        name="sage_1",
        summary="SageAttention 1: int8 scores, fp16 values (Triton)",
        load=load_1,
        dtypes=("float16", "bfloat16", "float32"),
        versions=("1.0.6", "2.0"),
        head_dim_multiple=32,  # to 64, 96 or 128
        needs=(*NEEDS, Range("head_dim", min=33, max=128), ANY_SIGN, TRITON, TAIL),
    ),
    *(
        row_2(
            name=name,
            summary=f"SageAttention 2: int8 scores, {values} values{_sums(options)} (CUDA)",
            load=partial(load_2, function, built, **options),
            aligned=True,
            needs=(*CUDA_2, OneOf("capability", gpus)),
        )
        for name, values, function, built, options, gpus in CUDA_FUNCTIONS
    ),
    row_2(
        name="sage_2_triton",
        summary="SageAttention 2: int8 scores, fp16 values (Triton), the one with masks",
        load=partial(load_2, "sageattn_qk_int8_pv_fp16_triton", attn_mask=None),
        masks=("bool", "additive"),
        needs=(*FROM_2, ANY_SIGN, TRITON),
    ),
    row(
        name="sage_3",
        summary="SageAttention 3: fp4 (CUDA, sm120)",
        load=load_3,
        library="sageattn3",
        layout="bhsd",
        gqa=False,
        aligned=True,
        head_dim_multiple=64,  # to 64 or 128
        needs=(*NEEDS, Range("head_dim", min=1, max=128), ANY_SIGN, OneOf("capability", (120, 121))),
    ),
)
