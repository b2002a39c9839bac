"""torch's flash and efficient kernels below their SDPA wrappers: windows and both corners, without any library.

Read in torch 2.13. The efficient op keeps no window for its backward (its gradients would be those of no window), and its
bottom-right corner is computed in unsigned numbers: with more queries than keys it hides nothing. Its window counts the
query's own key. Where no key is visible flash says a log-sum-exp of +inf, the efficient kernel 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from inspect import signature
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


def import_varlen() -> Any:
    """A second to import: for whoever runs it."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    return varlen_attn, AuxRequest


def varlen_entry() -> Callable[[], tuple[Any, Any, bool]]:
    """What gives (varlen_attn, AuxRequest, whether it is told of groups of heads). Raises ImportError where there is none."""
    if find_spec("torch.nn.attention.varlen") is None:
        raise ImportError("this torch has no torch.nn.attention.varlen")

    @cache
    def entry() -> tuple[Any, Any, bool]:
        attend, aux_request = import_varlen()
        told = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "return_aux", "scale", "window_size")
        return require_keywords(attend, *told), aux_request, "enable_gqa" in signature(attend).parameters

    return entry


def load_packed_varlen() -> Run:
    """Of packed sequences. enable_gqa keeps torch 2.14 from cuDNN, of which nobody says that it draws the same corner."""
    entry = varlen_entry()

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        assert a.packed is not None
        left, right = (-1 if n is None else n for n in a.window_sides(0, 0))
        attend, aux_request, can_group = entry()
        found = attend(
            query=q[0], key=k[0], value=v[0], cu_seq_q=a.packed.cu_q, cu_seq_k=a.packed.cu_kv,
            max_q=max(2, a.packed.max_q),  # with one, and groups, it takes token i for sequence i, which some may lack
            max_k=a.packed.max_kv,
            window_size=(left, right),  # a tuple: its triangle is meant where this equals (-1, 0)
            scale=a.scale, return_aux=aux_request(lse=a.lse), **({"enable_gqa": True} if can_group else {}),
        )  # fmt: skip
        return (found[0][None], natural(found[1])[None]) if a.lse else found[None]

    return run


def load_varlen() -> Run:
    from torch import arange, int32

    entry = varlen_entry()

    def starts(batch: int, length: int, device: Any) -> Tensor:
        return arange(0, (batch + 1) * length, length, dtype=int32, device=device)

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        batch, q_len, kv_len = q.shape[0], q.shape[1], k.shape[1]
        left, right = (-1 if n is None else n for n in a.window_sides(q_len, kv_len))
        attend, aux_request, _ = entry()
        # where heads are equal it keeps torch from cuDNN, and torch 2.11 has no such parameter
        grouped = {"enable_gqa": True} if q.shape[2] != k.shape[2] else {}
        found = attend(
            query=q.flatten(0, 1), key=k.flatten(0, 1), value=v.flatten(0, 1),
            cu_seq_q=starts(batch, q_len, q.device), max_q=q_len,
            cu_seq_k=starts(batch, kv_len, q.device), max_k=kv_len,
            window_size=(left, right),  # a tuple: its triangle is meant where this equals (-1, 0)
            scale=a.scale, return_aux=aux_request(lse=a.lse), **grouped,
        )  # fmt: skip
        if not a.lse:
            return found.unflatten(0, (batch, q_len))
        out, lse = found
        return out.unflatten(0, (batch, q_len)), natural(lse).unflatten(1, (batch, q_len)).transpose(0, 1)

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
        gqa=False,
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
    replace(
        FLASH,
        name="torch_varlen",
        summary="torch.nn.attention.varlen: packed sequences, or every sequence of one length",
        load=load_varlen,
        load_packed=load_packed_varlen,
        prepare=import_varlen,
        dropout=False,
        needs=(
            *FLASH_NEEDS,
            RefuseWhen(
                "{p.q_heads} heads and {p.kv_heads} kv heads with torch {device.torch} < 2.12",
                lambda p, device: p.group > 1 and device.torch_version < (2, 12),
            ),
        ),
    ),
)
