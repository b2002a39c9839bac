"""The functions of flash-attn (2.8), with its semantics: layout bshd, triangles and windows at the lower right corner.

What they cannot do raises NotImplementedError with the option's name. Shapes are flash-attn's own; docs/compat.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.dispatch.attention import attention
from fastattn.problems import bands, masks

Sides = tuple[int, int]
NO_WINDOW = (-1, -1)


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: Sides = NO_WINDOW, softcap: float = 0.0, alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:  # fmt: skip
    """Attention of [batch, q_len, heads, head_dim] tensors; with return_attn_probs (out, softmax_lse, None)."""
    _check_deterministic(q, deterministic)
    mask, window = _mask(q, k, causal, window_size, alibi_slopes)
    found = attention(
        q, k, v, mask, "bshd", window=window, scale=softmax_scale, softcap=softcap,
        dropout_p=_rate(dropout_p, return_attn_probs), return_lse=return_attn_probs,
    )  # fmt: skip
    return (*found, None) if return_attn_probs else found


def flash_attn_qkvpacked_func(qkv: Tensor, *args: Any, **options: Any) -> Any:
    """flash_attn_func of [batch, length, 3, heads, head_dim]."""
    q, k, v = qkv.unbind(2)
    return flash_attn_func(q, k, v, *args, **options)


def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, *args: Any, **options: Any) -> Any:
    """flash_attn_func of q and [batch, length, 2, heads, head_dim]."""
    k, v = kv.unbind(2)
    return flash_attn_func(q, k, v, *args, **options)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False, window_size: Sides = NO_WINDOW,
    softcap: float = 0.0, alibi_slopes: Tensor | None = None, deterministic: bool = False, return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:  # fmt: skip
    """Attention of packed sequences, [tokens, heads, head_dim]; with return_attn_probs (out, softmax_lse, None).

    max_seqlen_q, max_seqlen_k: numbers, or tensors without dimensions.
    """
    _check_deterministic(q, deterministic)
    longest_q, longest_k = (int(n) if isinstance(n, Tensor) else n for n in (max_seqlen_q, max_seqlen_k))
    _refuse("flash_attn_varlen_func", alibi_slopes=alibi_slopes, block_table=block_table)
    window = _sides(window_size)
    if window is not None and not causal and not _are_same(cu_seqlens_q, cu_seqlens_k):
        raise NotImplementedError(
            "flash_attn_varlen_func: window_size without causal needs cu_seqlens_k to be cu_seqlens_q"
        )
    found = attention(
        q, k, v, masks.Causal("bottom_right") if causal else None, "thd", cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_kv=cu_seqlens_k, max_q_len=longest_q, max_kv_len=longest_k, window=window, scale=softmax_scale,
        softcap=softcap, dropout_p=_rate(dropout_p, return_attn_probs), return_lse=return_attn_probs,
    )  # fmt: skip
    return (*found, None) if return_attn_probs else found


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *args: Any, **options: Any
) -> Any:
    """flash_attn_varlen_func of [tokens, 3, heads, head_dim]."""
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *args, **options)


def flash_attn_varlen_kvpacked_func(q: Tensor, kv: Tensor, *args: Any, **options: Any) -> Any:
    """flash_attn_varlen_func of q and [tokens, 2, heads, head_dim]."""
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(q, k, v, *args, **options)


def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
    rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None, cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None, cache_leftpad: Tensor | None = None, block_table: Tensor | None = None,
    softmax_scale: float | None = None, causal: bool = False, window_size: Sides = NO_WINDOW, softcap: float = 0.0,
    rotary_interleaved: bool = True, alibi_slopes: Tensor | None = None, num_splits: int = 0, return_softmax_lse: bool = False,
) -> Any:  # fmt: skip
    """Attention of [batch, q_len, heads, head_dim] over a cache, after k and v were written into it at cache_seqlens.

    k_cache, v_cache: [batch, length, kv_heads, head_dim], or pages [pages, page size, kv_heads, head_dim] with block_table.
    """
    _refuse(
        "flash_attn_with_kvcache", rotary_cos=rotary_cos, rotary_sin=rotary_sin, cache_leftpad=cache_leftpad,
        alibi_slopes=alibi_slopes,
    )  # fmt: skip
    window = _sides(window_size)
    if window is not None and not causal:
        raise NotImplementedError("flash_attn_with_kvcache: window_size needs causal=True")
    batch = q.shape[0]
    whole = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    lengths = whole if cache_seqlens is None else cache_seqlens
    filled = torch.as_tensor(lengths, dtype=torch.int64, device=q.device).expand(batch)
    if (k is None) != (v is None) or (k is not None and cache_seqlens is None):
        raise ValueError("flash_attn_with_kvcache: k, v and cache_seqlens, where they are written to, go together")
    if k is not None and v is not None:
        if filled.device.type == "cpu" and batch and int(filled.max()) + k.shape[1] > whole:
            raise ValueError(
                f"flash_attn_with_kvcache: the cache has room for {whole} tokens, cache_seqlens {filled.tolist()}"
            )
        _append(k_cache, v_cache, k, v, filled, cache_batch_idx, block_table)
        filled = filled + k.shape[1]
    if cache_batch_idx is not None:
        k_cache, v_cache = k_cache[cache_batch_idx], v_cache[cache_batch_idx]
    mask = masks.Causal("bottom_right") if causal else None
    return attention(
        q, k_cache, v_cache, mask, "bshd", kv_lens=filled, page_table=block_table, window=window, scale=softmax_scale,
        softcap=softcap, return_lse=return_softmax_lse,
    )  # fmt: skip


def _append(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, filled: Tensor, entries: Tensor | None, pages: Tensor | None
) -> None:
    """Write new keys and values behind what is filled, in place."""
    batch, new = k.shape[:2]
    rows = torch.arange(batch, dtype=torch.int64, device=k.device) if entries is None else entries.long()
    rows, at = rows[:, None], filled[:, None] + torch.arange(new, dtype=torch.int64, device=k.device)
    if pages is not None:
        size = k_cache.shape[1]
        rows, at = torch.take_along_dim(pages.long(), at // size, 1), at % size
    k_cache[rows, at], v_cache[rows, at] = k, v


def _mask(
    q: Tensor, k: Tensor, causal: bool, window_size: Sides, slopes: Tensor | None
) -> tuple[masks.Mask | Tensor | None, Sides | None]:
    """(mask, window) of attention() that say the same; flash-attn's window lies around the lower right corner."""
    window, (q_len, kv_len) = _sides(window_size), (q.shape[1], k.shape[1])
    if slopes is None and (causal or window is None or q_len == kv_len):
        return (masks.Causal("bottom_right") if causal else None), window
    lower, upper = bands.band("bottom_right" if causal else None, window, q_len, kv_len)
    if not causal and window is not None:
        lower, upper = (None if edge is None else edge + kv_len - q_len for edge in (lower, upper))
    seen = bands.visible(q, q_len, kv_len, lower, upper)
    if slopes is None:
        return seen, None
    i, j = (torch.arange(n, dtype=torch.int64, device=q.device) for n in (q_len, kv_len))
    distance = (i[:, None] + kv_len - q_len - j).abs()
    bias = -slopes.float().view(-1, slopes.shape[-1], 1, 1) * distance
    return bias.masked_fill(seen.logical_not(), float("-inf")).to(torch.promote_types(q.dtype, torch.float32)), None


def _sides(window_size: Any) -> Sides | None:
    left, right = (-1 if side is None or side < 0 else int(side) for side in window_size)
    return None if (left, right) == NO_WINDOW else (left, right)


def _are_same(of_q: Tensor, of_k: Tensor) -> bool:
    """Whether queries and keys have the same lengths, as far as that is known without waiting for a GPU."""
    return of_q is of_k or (of_q.device.type == of_k.device.type == "cpu" and torch.equal(of_q, of_k))


def _rate(dropout_p: float, return_attn_probs: bool) -> float:
    if dropout_p and return_attn_probs:
        raise NotImplementedError("flash_attn: return_attn_probs with dropout_p: the dropped weights are not returned")
    return dropout_p


def _check_deterministic(q: Tensor, deterministic: bool) -> None:
    if deterministic and q.is_cuda and not torch.are_deterministic_algorithms_enabled():
        raise NotImplementedError(
            "flash_attn: deterministic=True on CUDA: call torch.use_deterministic_algorithms(True)"
        )


def _refuse(function: str, **options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise NotImplementedError(f"{function}: {name} is not implemented in fastattn.compat")
