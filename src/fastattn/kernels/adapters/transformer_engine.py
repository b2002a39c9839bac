"""Transformer Engine: its three backends as three rows, each pinned by calling it in place of DotProductAttention.

DotProductAttention chooses one for every call, and nothing but NVTE_* variables pins it. So the classes it chooses between are
called (backends.py, 2.12 and newer), and TE is asked first whether it would consider that one: what the user switched off by
NVTE_*, or TE knows to be wrong, raises with that reason. What DotProductAttention does around them is done here:
- cuDNN gets dense memory: its strides follow from the layout's name (DotProductAttention misreads a transposed view);
- heads come back joined; a window that ends on one side alone gets an end on the other, which reaches every key;
- bool masks are True where they hide, and only the unfused one takes them, writing -10000 over what is hidden: a row that
  sees nothing is the mean of the values, and in cuDNN a row of -inf may be NaN. Such rows are zeroed here;
- FlashAttention is 2, 3 or 4, by what is installed; 4 takes None for no limit, and (-1, 0) for a window without keys;
- packed sequences are told their longest ones, or they would be read from the GPU. cuDNN, from 9.6 on, does not plan for each
  set of lengths, but for buckets of how many sequences and tokens there are; for the very number of sequences on sm120, and
  in the forward of TE from 2.18 on with cuDNN from 9.24 on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

from fastattn.kernels import (
    GRID,
    NOT_EMPTY,
    OWN_MASK,
    PLANNED,
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
HIDDEN = -32768.0  # as good as -inf in a float mask, and finite in every dtype and unit
LAYOUT, PACKED_LAYOUT = "bshd_bshd_bshd", "thd_thd_thd"
FLASH, FUSED, UNFUSED = range(3)  # in the order of TE's answers
CLASSES = ("FlashAttention", "FusedAttention", "UnfusedDotProductAttention")
TAKEN = ("query_layer", "key_layer", "value_layer", "qkv_layout", "attn_mask_type", "window_size")
BIAS = ("core_attention_bias_type", "core_attention_bias", "bottom_right_diagonal")
TAKES = (
    (*TAKEN, "flash_attention_backend"),
    (*TAKEN, *BIAS, "fused_attention_backend", "cu_seqlens_q", "cu_seqlens_kv"),
    (*TAKEN, *BIAS, "attention_mask", "_alibi_cache"),
)
ASKED = (
    "qkv_dtype", "qkv_layout", "batch_size", "num_heads", "num_gqa_groups", "max_seqlen_q", "max_seqlen_kv", "head_dim_qk",
    "head_dim_v", "attn_mask_type", "window_size", "bottom_right_diagonal", "core_attention_bias_type",
    "core_attention_bias_shape", "core_attention_bias_requires_grad", "attention_dropout", "deterministic", "is_training",
    "cuda_graph",
)  # fmt: skip


def load(which: int) -> Run:
    attend, lengths = _backend(which)

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        (b, q_len), kv_len = q.shape[:2], k.shape[1]
        hidden, bias = _parts(mask)
        kind, window, bottom_right = _band(a, q_len, kv_len)
        kind = "arbitrary" if which == UNFUSED and hidden is not None and bias is None else kind
        out = attend(
            q, k, v, (b, q_len, kv_len), LAYOUT, (kind, window, bottom_right), bias, a,
            attention_mask=hidden if kind == "arbitrary" else None,
            cu_seqlens_q=lengths(batch_size=b, max_seqlen=q_len, device=q.device),
            cu_seqlens_kv=lengths(batch_size=b, max_seqlen=kv_len, device=q.device),
        )  # fmt: skip
        return out if hidden is None else out.masked_fill(hidden.all(-1).transpose(1, 2)[..., None], 0.0)

    return run


def load_packed(which: int) -> Run:
    """The same for packed sequences. It writes no row that is in no sequence.

    With a longest query of 1, and groups, FlashAttention takes token i for sequence i (flash-attention#1537): it is told 2.
    """
    attend, _ = _backend(which, "cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv")

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        assert a.packed is not None
        sequences, max_q, max_kv = a.packed, max(2, a.packed.max_q), max(2, a.packed.max_kv)
        sizes, band = (len(sequences.cu_q) - 1, max_q, max_kv), _band_of_sequences(a, max_q + max_kv)
        out = attend(
            q[0], k[0], v[0], sizes, PACKED_LAYOUT, band, None, a,
            cu_seqlens_q=sequences.cu_q, cu_seqlens_kv=sequences.cu_kv, max_seqlen_q=max_q, max_seqlen_kv=max_kv,
        )  # fmt: skip
        return out[None]

    return run


def _backend(which: int, *more: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """(what asks TE and then calls that backend, TE's own cu_seqlens). more: what it must take beside TAKES."""
    import torch
    from transformer_engine.pytorch.attention import dot_product_attention as te  # pyright: ignore[reportMissingImports]

    made = ("softmax_scale", "attention_dropout", *(("deterministic",) if which != UNFUSED else ()))
    build: Any = require_keywords(getattr(te.backends, CLASSES[which]), *made)
    takes = tuple(dict.fromkeys((*TAKES[which], *more)))
    require_keywords(getattr(build, "_forward", build.forward), *takes)
    describe = require_keywords(te.utils.AttentionParams, *ASKED)
    ask = require_keywords(te.utils.get_attention_backend, "attention_params")
    lengths = require_keywords(te.utils.get_full_cu_seqlens, "batch_size", "max_seqlen", "device")
    parameters = inspect.signature(describe).parameters
    says_letters = parameters["core_attention_bias_shape"].default is not None  # "bhss", up to 2.19; then sizes
    asks_scale = "softmax_scale" in parameters
    asks_tokens = "num_tokens_q" in parameters
    is_capturing = torch.cuda.is_current_stream_capturing

    @lru_cache(64)
    def module(scale: float, dropout_p: float, deterministic: bool, training: bool) -> Any:
        options = {"softmax_scale": scale, "attention_dropout": dropout_p, "deterministic": deterministic}
        return build(**{name: options[name] for name in made}).train(training)

    @lru_cache(1024)
    def backend(scale: float, tokens: tuple[int, int], *asked: Any) -> Any:
        also: dict[str, Any] = {"softmax_scale": scale} if asks_scale else {}
        also |= dict(zip(("num_tokens_q", "num_tokens_kv"), tokens, strict=True)) if asks_tokens else {}
        _, version, _, cudnn, _, able = ask(attention_params=describe(**dict(zip(ASKED, asked, strict=True)), **also))
        if able[which]:
            return (version, cudnn, None)[which]
        others = " or ".join(name for name, can in zip(CLASSES, able, strict=True) if can) or "nothing"
        raise RuntimeError(f"Transformer Engine would run {others} here, not {CLASSES[which]} (NVTE_DEBUG=1 says why)")

    def attend(
        q: Tensor, k: Tensor, v: Tensor, sizes: tuple[int, int, int], layout: str, band: tuple[str, tuple[int, int], bool],
        bias: Tensor | None, a: Arguments, **more: Any,
    ) -> Tensor:  # fmt: skip
        (b, q_len, kv_len), (kind, window, bottom_right), (heads, head_dim) = sizes, band, q.shape[-2:]
        bias_type, shape = "no_bias", None
        if bias is not None:
            bias_type = "post_scale_bias"
            letters = f"{'b' if bias.shape[0] == b else '1'}{'h' if bias.shape[1] == heads else '1'}ss"
            shape = letters if says_letters else tuple(bias.shape)
        training = a.needs_grad or a.dropout_p > 0
        tokens = (len(q), len(k)) if layout == PACKED_LAYOUT else (0, 0)  # 0 is what it is where nobody says it
        chosen = backend(
            a.scale, tokens, q.dtype, layout, b, heads, k.shape[-2], q_len, kv_len, head_dim, v.shape[-1], kind, window,
            bottom_right, bias_type, shape, bias is not None and bias.requires_grad, a.dropout_p, a.deterministic, training,
            q.is_cuda and is_capturing(),
        )  # fmt: skip
        told = {
            "query_layer": q, "key_layer": k, "value_layer": v, "qkv_layout": layout, "attn_mask_type": kind,
            "window_size": tuple(None if n < 0 and which == FLASH and chosen.major == 4 else n for n in window),
            "bottom_right_diagonal": bottom_right, "core_attention_bias_type": bias_type, "core_attention_bias": bias,
            "flash_attention_backend": chosen, "fused_attention_backend": chosen, "_alibi_cache": {}, **more,
        }  # fmt: skip
        found = module(a.scale, a.dropout_p, a.deterministic, training)(**{name: told[name] for name in takes})
        return found.unflatten(-1, (heads, -1))

    return attend, lengths


def _band(a: Arguments, q_len: int, kv_len: int) -> tuple[str, tuple[int, int], bool]:
    """(attn_mask_type, window_size, bottom_right_diagonal)."""
    if a.lower is None and a.upper is None:
        return "no_mask", (-1, -1), True
    left, right = a.window_sides(q_len, kv_len)
    bottom_right = right == 0 or not (a.lower or 0) <= 0 <= (a.upper or 0)
    if not bottom_right:
        left, right = None if a.lower is None else -a.lower, a.upper
    if right == 0:
        return "causal_bottom_right" if bottom_right else "causal", (-1 if left is None else left, 0), bottom_right
    far = q_len + kv_len
    return "no_mask", (far if left is None else left, far if right is None else right), bottom_right


def _band_of_sequences(a: Arguments, far: int) -> tuple[str, tuple[int, int], bool]:
    """The same within each packed sequence. far: further than any key."""
    assert a.packed is not None
    left, right = a.window_sides(0, 0)
    if left is None and right is None:
        return "padding", (-1, -1), True
    if right == 0:
        are_same = a.packed.cu_q is a.packed.cu_kv  # then both corners coincide
        kind = "padding_causal" if are_same else "padding_causal_bottom_right"
        return kind, (-1 if left is None else left, 0), not are_same
    return "padding", (far if left is None else left, far if right is None else right), True


def _parts(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(what is hidden, what is added, which is finite)."""
    if mask is None:
        return None, None
    mask = as_4d(mask)
    if not mask.dtype.is_floating_point:
        return mask.logical_not(), None
    hidden = mask == -INF
    largest = mask.detach().amax(-1, keepdim=True)
    up = largest.masked_fill(
        (largest > HIDDEN / 4) | (largest == -INF), 0.0
    )  # HIDDEN would be no lower than such a row
    return hidden, (mask - up).masked_fill(hidden, HIDDEN).contiguous()


HALF = ("float16", "bfloat16")
OWN_LENGTHS = RefuseWhen(
    "packed sequences with lengths of their own ({p.structure}): of those with queries and no keys cuDNN says nothing",
    lambda p, _: not p.is_self_packed,
)


def _row(which: int, name: str, *needs: Any, dropout: bool = True, **fields: Any) -> Kernel:
    return Kernel(
        name=name, summary=f"Transformer Engine's {CLASSES[which]}", load=partial(load, which), library="transformer-engine",
        versions=("2.12", ""), devices=("cuda",), layout="bshd", dropout=dropout,
        needs=(*NOT_EMPTY, *needs), **fields,
    )  # fmt: skip


KERNELS = (
    _row(
        FUSED, "te_fused",
        Range("capability", min=80),
        OneOf("scale", ("positive",)),
        RefuseWhen("q_len {p.q_len} > kv_len {p.kv_len} with a window or the bottom-right corner",
                   lambda p, _: p.q_len > p.kv_len and (p.causal == "bottom_right" or p.window is not None)),
        *GRID,
        OWN_MASK,
        PLANNED,
        RefuseWhen("a mask {p.mask_shape}, broadcast over queries or keys: it takes whole (q, k) alone",
                   lambda p, _: p.mask is not None and not {"q", "k"} <= set(p.mask_shape)),
        RefuseWhen("packed sequences ({p.structure}) on sm{device.capability}: cuDNN takes them from sm90 on",
                   lambda p, device: p.is_self_packed and device.capability < 90),
        dtypes=HALF, corner="any", masks=("additive",), window=True, mask_grad=True, head_dim_multiple=8,
        causal_scales=("positive",), dense=True, aligned=True,
        load_packed=partial(load_packed, FUSED), packed_needs=(OWN_LENGTHS,),
        dropout=False,  # some of cuDNN's kernels round the rate to sixteenths (pytorch#174245)
    ),
    _row(
        FLASH, "te_flash",
        Range("capability", min=80), OneOf("scale", ("positive",)),
        *GRID,
        Range("head_dim", min=1, max=256), Range("head_dim_v", max=256),
        dtypes=HALF, corner="bottom_right", window=True, equal_head_dims=True, head_dim_multiple=8,
        causal_scales=("positive",), dense_last_dim=True, aligned=True, load_packed=partial(load_packed, FLASH),
    ),
    _row(
        UNFUSED, "te_unfused",
        Range("batch", min=1), Range("q_heads", min=1), Range("head_dim", min=1),
        dtypes=(*HALF, "float32"), corner=None, masks=("bool", "additive"), mask_grad=True, unfused=True, dense_last_dim=True,
    ),
)  # fmt: skip
