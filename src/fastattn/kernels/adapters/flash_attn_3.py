"""FlashAttention 3: package flash-attn-3, built from source, and fa3-fwd, a forward for bfloat16 alone.

Half dtypes, sm90 (sm80 to sm89 where built for them), no masks, no dropout. Its functions changed under one version, 3.0.0:
they returned (out, lse) until July 2025, out alone until August, and since then as return_attn_probs says. Where no key is
visible it gives a zero row and a log-sum-exp of -inf, +inf on the few ways around the kernel. What a build left out stands in
its flash_attn_config, since November 2025; the library repacked from xFormers has none, and lacks softcap.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import Any

from fastattn.kernels import (
    GRID,
    NOT_EMPTY,
    Arguments,
    Device,
    Kernel,
    OneOf,
    Range,
    RefuseWhen,
    Run,
    Tensor,
    require_keywords,
)

INF = float("inf")


def load(module: str) -> Run:
    return of(import_module(module).flash_attn_func)


def of(function: Callable[..., Any]) -> Run:
    """Its flash_attn_func, wherever it comes from."""
    import torch

    attend = require_keywords(
        function, "q", "k", "v", "softmax_scale", "causal", "window_size", "softcap", "num_splits", "deterministic",
    )  # fmt: skip
    asks_lse = "return_attn_probs" in inspect.signature(function).parameters
    is_compiling = torch.compiler.is_compiling

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        left, right = a.window_sides(q.shape[1], k.shape[1])
        return natural(attend(
            q=q, k=k, v=v,
            softmax_scale=a.scale,
            causal=right == 0,
            window_size=(-1 if left is None else left, right or -1),  # causal makes the right side 0
            softcap=a.softcap,
            num_splits=1 if a.needs_grad or is_compiling() else 0,  # 0 lets it split the keys where queries are few
            deterministic=a.deterministic,
            **({"return_attn_probs": a.lse} if asks_lse else {}),
        ), a)  # fmt: skip

    return run


def load_packed(module: str) -> Run:
    return of_packed(import_module(module).flash_attn_varlen_func)


def of_packed(function: Callable[..., Any]) -> Run:
    """Its flash_attn_varlen_func. It writes no row that is in no sequence."""
    attend = require_keywords(
        function, "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "causal",
        "window_size", "softcap", "num_splits", "deterministic",
    )  # fmt: skip
    asks_lse = "return_attn_probs" in inspect.signature(function).parameters

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        assert a.packed is not None
        left, right = a.window_sides(0, 0)
        return natural(attend(
            q=q[0], k=k[0], v=v[0],
            cu_seqlens_q=a.packed.cu_q, cu_seqlens_k=a.packed.cu_kv,
            max_seqlen_q=a.packed.max_q, max_seqlen_k=a.packed.max_kv,
            softmax_scale=a.scale, causal=right == 0,
            window_size=(-1 if left is None else left, -1 if right is None else right),
            softcap=a.softcap,
            num_splits=1,  # sequences are many, and what it splits it must put together
            deterministic=a.deterministic,
            **({"return_attn_probs": a.lse} if asks_lse else {}),
        ), a, lambda x: x[None])  # fmt: skip

    return run


def load_cached(module: str) -> Run:
    return of_cached(import_module(module).flash_attn_with_kvcache)


def of_cached(function: Callable[..., Any]) -> Run:
    """Its flash_attn_with_kvcache. What lies behind cache_seqlens it multiplies by zero. Pages may be of any size."""
    attend = require_keywords(
        function, "q", "k_cache", "v_cache", "cache_seqlens", "softmax_scale", "causal", "window_size", "softcap", "num_splits",
        "return_softmax_lse",
    )  # fmt: skip

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        left, right = a.window_sides(0, 0)
        return natural(attend(
            q=q, k_cache=k, v_cache=v, cache_seqlens=a.kv_lens,
            softmax_scale=a.scale, causal=right == 0, window_size=(-1 if left is None else left, -1),
            softcap=a.softcap, num_splits=0, return_softmax_lse=a.lse,
            **({} if a.page_table is None else {"page_table": a.page_table}),
        ), a)  # fmt: skip

    return run


def load_paged(module: str) -> Run:
    return of_paged(import_module(module).flash_attn_with_kvcache)


def of_paged(function: Callable[..., Any]) -> Run:
    """The same function, which must know pages."""
    return of_cached(require_keywords(function, "page_table"))


def natural(found: Any, a: Arguments, shaped: Callable[[Tensor], Tensor] = lambda x: x) -> Any:
    """What it returns, (out, lse) or out alone, as it is asked for."""
    out, lse = found[:2] if isinstance(found, tuple) else (found, None)
    if not a.lse:
        return shaped(out)
    if lse is None:
        raise NotImplementedError("this FlashAttention 3, of July or August 2025, returns no log-sum-exp")
    lse = lse.detach()
    return shaped(out), shaped(lse.masked_fill(lse == INF, -INF))


@cache
def flags() -> dict[str, bool] | None:
    """What the build says that it left out, None where it does not tell. Plain Python: nothing of CUDA is loaded."""
    try:
        return import_module("flash_attn_config").CONFIG["build_flags"]
    except Exception:
        return None


UNCERTAIN = ("SOFTCAP", "SM8x")  # refused where the build does not tell


def unless_built(flag: str, what: str, asked: Callable[[Any, Device], bool]) -> RefuseWhen:
    """Refuses what the build left out: FLASHATTENTION_DISABLE_<flag>, or FLASH_ATTENTION_DISABLE_<flag>."""

    def lacks() -> bool:
        told = flags()
        if told is None:
            return flag in UNCERTAIN
        return any(told[name] for name in told if name.endswith(f"_DISABLE_{flag}"))

    text = f"{what}: this build lacks it" + (", or has no flash_attn_config to tell" if flag in UNCERTAIN else "")
    return RefuseWhen(text, lambda p, device: bool(asked(p, device)) and lacks())


def _is_pair(p: Any, device: Device) -> bool:
    """Whether it has a kernel for this pair of head dims, both padded to a multiple of 8."""
    d, dv = (-(-head_dim // 8) * 8 for head_dim in (p.head_dim, p.head_dim_v))
    return d == dv or (device.capability == 90 and ((128 < d <= 192 and 96 < dv <= 128) or d <= 64))


PAIR = "head_dim {p.head_dim} with head_dim_v {p.head_dim_v}"
UNREAD = RefuseWhen(  # its loads of a tile end where the cache does, and a weight of 0 times NaN is NaN
    "{p.structure}: it multiplies what lies behind the filled part by zero, and that may be anything",
    lambda p, _: p.has_unread_keys,
)
NEEDS = (
    Range("capability", min=80, max=90),
    Range("head_dim", min=1, max=256),
    Range("head_dim_v", min=1, max=512),
    *GRID, *NOT_EMPTY,
    OneOf("scale", ("positive",)),
    UNREAD,
    RefuseWhen(
        PAIR + " on sm{device.capability}: unequal ones are 129-192 with 97-128, or 1-64 with 1-512, on sm90",
        lambda p, device: not _is_pair(p, device),
    ),
)  # fmt: skip


def kernel(name: str, summary: str, module: str, **row: Any) -> Kernel:
    """What the two packages have in common."""
    return Kernel(
        name=name, summary=summary, load=partial(load, module), load_packed=partial(load_packed, module),
        load_cached=partial(load_cached, module), devices=("cuda",), layout="bshd", corner="bottom_right",
        softcap=True, lse=True, head_dim_multiple=8, dense_last_dim=True, aligned=True, **row,
    )  # fmt: skip


PAGED = unless_built("PAGEDKV", "pages of {p.page_size} tokens", lambda p, _: p.page_size)
OPTIONAL = (
    ("BACKWARD", "training", lambda p, _: p.needs_grad),
    ("FP16", "dtype float16", lambda p, _: p.dtype == "float16"),
    ("LOCAL", "a window ({p.any_window[0]}, {p.any_window[1]})", lambda p, _: p.any_window is not None),
    ("SOFTCAP", "softcap {p.softcap:g}", lambda p, _: p.softcap),
    ("SM8x", "sm{device.capability}", lambda _, device: device.capability < 90),
    ("HDIM256", "head_dim {p.head_dim} > 192", lambda p, _: p.head_dim > 192),
    ("HDIMDIFF64", PAIR, lambda p, _: p.head_dim <= 64 < p.head_dim_v),
    ("HDIMDIFF192", PAIR, lambda p, _: p.head_dim_v <= 128 < p.head_dim),
    ("VARLEN", "lengths ({p.structure})", lambda p, _: p.is_packed or p.filling is not None),
)
KERNELS = (
    kernel(
        name="flash_attn_3",
        summary="FlashAttention 3 (package flash-attn-3)",
        module="flash_attn_interface",
        library="flash-attn-3",
        versions=("3", "4"),
        dtypes=("float16", "bfloat16"),
        window=True,
        load_paged=partial(load_paged, "flash_attn_interface"),
        paged_needs=(PAGED,),
        needs=(
            *NEEDS,
            RefuseWhen("training: head_dim_v {p.head_dim_v} > 256", lambda p, _: p.needs_grad and p.head_dim_v > 256),
            RefuseWhen(
                "a deterministic backward with " + PAIR + ": it ends at 192",
                lambda p, _: p.deterministic and p.needs_grad and max(p.head_dim, p.head_dim_v) > 192,
            ),
            *(unless_built(*row) for row in OPTIONAL),
        ),
    ),
    kernel(
        name="fa3_fwd",
        summary="FlashAttention 3's forward (package fa3-fwd), bfloat16",
        module="fa3_fwd_interface",
        library="fa3-fwd",
        versions=("0.0.3", "0.1"),
        dtypes=("bfloat16",),  # it was built without float16, windows, pages and the backward
        grad=False,
        needs=NEEDS,
    ),
)
