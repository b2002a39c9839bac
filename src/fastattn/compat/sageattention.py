"""sageattn(), its siblings that name a kernel, and sageattn_varlen() of SageAttention 2: all exact: nothing is quantised.

The siblings have the package's signatures, and its arguments about quantising have no say.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.dispatch.attention import attention
from fastattn.problems import masks

LAYOUTS = {"HND": "bhsd", "NHD": "bshd"}
# How the package quantises; attention that is exact needs none of it.
_OF_QUANTISING = ("smooth_k", "smooth_v", "qk_quant_gran", "pv_accum_dtype", "quantization_backend", "sm_scale_v")


def sageattn(
    q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", is_causal: bool = False, sm_scale: float | None = None,
    return_lse: bool = False, **options: Any,
) -> Any:  # fmt: skip
    """Attention in layout "HND" [batch, heads, length, head_dim] or "NHD". Raises ValueError, TypeError for other arguments.

    The arguments of F.scaled_dot_product_attention are served too, as its callers have sageattn put in its place: attn_mask,
    dropout_p, scale, enable_gqa. (The package takes these and drops them.)
    """
    mask, dropout_p = options.pop("attn_mask", None), options.pop("dropout_p", 0.0)
    scale = options.pop("scale", None)
    options.pop("enable_gqa", None)  # follows from the shapes
    if scale is not None and sm_scale is not None:
        raise TypeError(f"sageattn: scale is F.sdpa's name of sm_scale, give one of them; got {scale} and {sm_scale}")
    sm_scale = scale if sm_scale is None else sm_scale
    return _attend("sageattn", q, k, v, mask, tensor_layout, is_causal, sm_scale, return_lse, options, dropout_p)


def sageattn_qk_int8_pv_fp16_cuda(
    q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", is_causal: bool = False, qk_quant_gran: str = "per_thread",
    sm_scale: float | None = None, pv_accum_dtype: str = "fp32", smooth_k: bool = True, smooth_v: bool = False,
    return_lse: bool = False, **options: Any,
) -> Any:  # fmt: skip
    """As sageattn()."""
    return _attend(
        "sageattn_qk_int8_pv_fp16_cuda", q, k, v, None, tensor_layout, is_causal, sm_scale, return_lse, options
    )


def sageattn_qk_int8_pv_fp8_cuda(
    q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", is_causal: bool = False, qk_quant_gran: str = "per_thread",
    sm_scale: float | None = None, pv_accum_dtype: str = "fp32+fp16", smooth_k: bool = True, smooth_v: bool = False,
    return_lse: bool = False, **options: Any,
) -> Any:  # fmt: skip
    """As sageattn()."""
    return _attend(
        "sageattn_qk_int8_pv_fp8_cuda", q, k, v, None, tensor_layout, is_causal, sm_scale, return_lse, options
    )


def sageattn_qk_int8_pv_fp8_cuda_sm90(
    q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", is_causal: bool = False, qk_quant_gran: str = "per_thread",
    sm_scale: float | None = None, pv_accum_dtype: str = "fp32+fp32", smooth_k: bool = True, return_lse: bool = False,
    **options: Any,
) -> Any:  # fmt: skip
    """As sageattn()."""
    return _attend(
        "sageattn_qk_int8_pv_fp8_cuda_sm90", q, k, v, None, tensor_layout, is_causal, sm_scale, return_lse, options
    )


def sageattn_qk_int8_pv_fp16_triton(
    q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", quantization_backend: str = "triton", is_causal: bool = False,
    attn_mask: Tensor | None = None, sm_scale: float | None = None, smooth_k: bool = True, return_lse: bool = False,
    **options: Any,
) -> Any:  # fmt: skip
    """As sageattn(), with a bool mask that broadcasts to [batch, heads, q_len, kv_len]: True attends.

    Raises NotImplementedError for a float mask, which the package adds in units of its own (of a logarithm to base 2).
    """
    if attn_mask is not None and attn_mask.dtype is not torch.bool:
        raise NotImplementedError(f"sageattn_qk_int8_pv_fp16_triton: attn_mask must be bool, got {attn_mask.dtype}")
    return _attend(
        "sageattn_qk_int8_pv_fp16_triton", q, k, v, attn_mask, tensor_layout, is_causal, sm_scale, return_lse, options
    )


def sageattn_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    is_causal: bool = False, sm_scale: float | None = None, smooth_k: bool = True, **options: Any,
) -> Tensor:  # fmt: skip
    """Attention of packed sequences, [tokens, heads, head_dim], the triangle at each one's top left."""
    _check_options("sageattn_varlen", options)
    return attention(
        q, k, v, masks.Causal() if is_causal else None, "thd", cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_k,
        max_q_len=max_seqlen_q, max_kv_len=max_seqlen_k, scale=sm_scale,
    )  # fmt: skip


def _attend(
    function: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tensor_layout: str, is_causal: bool,
    sm_scale: float | None, return_lse: bool, options: dict[str, Any], dropout_p: float = 0.0,
) -> Any:  # fmt: skip
    if tensor_layout not in LAYOUTS:
        raise ValueError(f"{function}: tensor_layout must be 'HND' or 'NHD', got {tensor_layout!r}")
    _check_options(function, options)
    return attention(
        q, k, v, mask, LAYOUTS[tensor_layout], is_causal=is_causal, scale=sm_scale, dropout_p=dropout_p, return_lse=return_lse
    )  # fmt: skip


def _check_options(function: str, options: dict[str, Any]) -> None:
    for name, value in options.items():
        if name not in _OF_QUANTISING and value is not None:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
