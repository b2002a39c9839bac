"""sageattn() and sageattn_varlen() of SageAttention, computed exactly: nothing is quantised unless a kernel is named."""

from __future__ import annotations

from typing import Any

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
    """Attention in layout "HND" [batch, heads, length, head_dim] or "NHD". Raises ValueError, TypeError for other arguments."""
    if tensor_layout not in LAYOUTS:
        raise ValueError(f"sageattn: tensor_layout must be 'HND' or 'NHD', got {tensor_layout!r}")
    _check_options("sageattn", options)
    return attention(q, k, v, None, LAYOUTS[tensor_layout], is_causal=is_causal, scale=sm_scale, return_lse=return_lse)


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


def _check_options(function: str, options: dict[str, Any]) -> None:
    for name, value in options.items():
        if name not in _OF_QUANTISING and value is not None:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
