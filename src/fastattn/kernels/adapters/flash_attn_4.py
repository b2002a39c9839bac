"""FlashAttention 4, package flash-attn-4 (CuTe DSL): half dtypes, sm80 and newer, its backward from sm90 on.

It compiles for each kind of call, for seconds, and for the silicon of the first device it meets. A side of its window without
a limit is None: -1 beside a number hides every key. It returns (out, lse) always, and its score_mod is a CuTe function, not
one of torch. Before August 2026 it did not look at alignment. Where no key is visible it gives a zero row and a log-sum-exp
of -inf.
"""

from __future__ import annotations

from collections.abc import Callable
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
    check_silicon,
    is_before,
    require_keywords,
)


def load() -> Run:
    from flash_attn.cute import flash_attn_func  # pyright: ignore[reportMissingImports]

    return of(flash_attn_func)


def load_packed() -> Run:
    from flash_attn.cute import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    return of_packed(flash_attn_varlen_func)


def of_packed(function: Callable[..., Any]) -> Run:
    """Its flash_attn_varlen_func. It writes no row that is in no sequence."""
    check_silicon()
    attend = require_keywords(
        function, "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "causal",
        "window_size", "softcap", "num_splits", "deterministic", "return_lse",
    )  # fmt: skip

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        assert a.packed is not None
        left, right = a.window_sides(0, 0)
        out, lse = attend(
            q=q[0], k=k[0], v=v[0],
            cu_seqlens_q=a.packed.cu_q, cu_seqlens_k=a.packed.cu_kv,
            max_seqlen_q=a.packed.max_q, max_seqlen_k=a.packed.max_kv,
            softmax_scale=a.scale, causal=right == 0, window_size=(left, right or None),
            softcap=a.softcap, num_splits=1, deterministic=a.deterministic, return_lse=a.lse,
        )  # fmt: skip
        return (out[None], lse.detach()[None]) if a.lse else out[None]

    return run


def load_paged() -> Run:
    from flash_attn.cute import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    return of_paged(flash_attn_varlen_func)


def of_paged(function: Callable[..., Any]) -> Run:
    """Its flash_attn_varlen_func for a cache in pages. Tiles of a page it multiplies by zero where they are not filled."""
    check_silicon()
    attend = require_keywords(
        function, "q", "k", "v", "seqused_k", "page_table", "softmax_scale", "causal", "window_size", "softcap", "num_splits",
        "return_lse",
    )  # fmt: skip

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        left, right = a.window_sides(0, 0)
        out, lse = attend(
            q=q, k=k, v=v, seqused_k=a.kv_lens, page_table=a.page_table,
            softmax_scale=a.scale, causal=right == 0, window_size=(left, right or None),
            softcap=a.softcap, num_splits=1, return_lse=a.lse,
        )  # fmt: skip
        return (out, lse) if a.lse else out

    return run


def of(function: Callable[..., Any]) -> Run:
    """Its flash_attn_func, wherever it comes from."""
    here = check_silicon()
    attend = require_keywords(
        function, "q", "k", "v", "softmax_scale", "causal", "window_size", "softcap", "num_splits", "deterministic",
        "return_lse",
    )  # fmt: skip
    can_split = {(10, 0), (10, 3), (11, 0)}.issuperset(here) and bool(here)  # the others assert that there is one

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        left, right = a.window_sides(q.shape[1], k.shape[1])
        out, lse = attend(
            q=q,
            k=k,
            v=v,
            softmax_scale=a.scale,
            causal=right == 0,
            window_size=(left, right or None),  # causal makes the right side 0
            softcap=a.softcap,
            num_splits=0 if can_split and is_decode(q, k, a) else 1,  # as many as fill the device; 1 never splits
            deterministic=a.deterministic,
            return_lse=a.lse,
        )
        return (out, lse.detach()) if a.lse else out

    return run


def is_decode(q: Tensor, k: Tensor, a: Arguments) -> bool:
    """Whether the queries of a kv head fill one tile at most, so that keys must be split to use the device."""
    return not a.needs_grad and q.shape[1] * (q.shape[2] // k.shape[2]) <= 128


def _is_sm100(device: Device) -> bool:
    return 100 <= device.capability < 120


def _fits_sm100(p: Any) -> bool:
    """The pairs of head dims, padded to multiples of 8, of its kernels for sm100 and sm110."""
    dims = tuple(-(-d // 8) * 8 for d in (p.head_dim, p.head_dim_v))
    return max(dims) <= 128 or dims in ((192, 128), (256, 256))


def _widest(p: Any) -> int:
    return max(p.head_dim, p.head_dim_v)


DIMS = "head_dim {p.head_dim} and head_dim_v {p.head_dim_v} on sm{device.capability}"
SOFTCAP_IN_TRAINING = RefuseWhen(
    "training with softcap {p.softcap:g} and " + DIMS + ": its backward for 256 has none there",
    lambda p, device: bool(p.softcap and p.needs_grad) and _is_sm100(device) and p.head_dim > 192,
)
# What its kernel for 256 there could not do before 4.0.0b34: of the package known_faults.json says so; the hub has no version.
BEFORE_B34 = (
    RefuseWhen(
        "softcap {p.softcap:g} and " + DIMS + ": its kernel for 256 has none there",
        lambda p, device: bool(p.softcap) and _is_sm100(device) and p.head_dim > 192,
    ),
    RefuseWhen(
        "a window {p.window} and " + DIMS + ": its kernel for 256 has none there",
        lambda p, device: p.window is not None and _is_sm100(device) and p.head_dim > 192,
    ),
    RefuseWhen(
        "q_len {p.q_len} != kv_len {p.kv_len} and " + DIMS + ": its kernel for 256 is wrong then",
        lambda p, device: p.q_len != p.kv_len and _is_sm100(device) and p.head_dim > 192,
    ),
    RefuseWhen(
        "packed sequences ({p.structure}) and " + DIMS + ": its kernel for 256 fails on empty ones, and has no window",
        lambda p, device: p.is_packed and _is_sm100(device) and p.head_dim > 192,
    ),
)
LIBRARY = "flash-attn-4"
PAGES_ON = (
    RefuseWhen(
        "pages of {p.page_size} tokens on sm{device.capability}: it has them from sm90 to sm119",
        lambda p, device: bool(p.page_size) and not 90 <= device.capability < 120,
    ),
    RefuseWhen(
        "pages of {p.page_size} tokens with " + DIMS + ": its kernel for 256 takes no lengths there",
        lambda p, device: bool(p.page_size) and _is_sm100(device) and p.head_dim > 192,
    ),
)
PAGED = (  # what holds on every device
    Range("head_dim", multiple_of=16),
    Range("head_dim_v", multiple_of=16),
    RefuseWhen(
        "pages of {p.page_size} tokens with flash-attn-4 before 4.0.0b26: on sm90 it leaves page pointers unset in tiles of 80,"
        " 112 or 144 keys",
        lambda p, _: bool(p.page_size) and is_before(LIBRARY, "4.0.0b26"),
    ),
)
KERNELS = (
    Kernel(
        name="flash_attn_4",
        summary="FlashAttention 4 (package flash-attn-4)",
        load=load,
        load_packed=load_packed,
        load_paged=load_paged,
        paged_needs=PAGED,
        library=LIBRARY,
        versions=("4", "5"),
        devices=("cuda",),
        dtypes=("float16", "bfloat16"),
        layout="bshd",
        corner="bottom_right",
        window=True,
        softcap=True,
        lse=True,
        head_dim_multiple=8,
        dense_last_dim=True,
        aligned=True,
        compiles="once",
        needs=(
            Range("capability", min=80, max=121),
            Range("head_dim", min=1, max=256),
            Range("head_dim_v", min=1, max=256),  # with 512, where k is v, it takes them for DeepSeek's latent
            # batch and heads are grid dimensions
            *GRID,
            *NOT_EMPTY,
            OneOf("scale", ("positive",)),
            RefuseWhen(
                DIMS + ": it has up to (128, 128), (192, 128) and (256, 256) there",
                lambda p, device: _is_sm100(device) and not _fits_sm100(p),
            ),
            # 99 KB of shared memory: 512 bytes for each of them, and 16 KB more in the backward
            RefuseWhen(DIMS + ": it ends at 192", lambda p, device: device.capability >= 120 and _widest(p) > 192),
            RefuseWhen(
                "training with " + DIMS + ": it ends at 160",
                lambda p, device: p.needs_grad and device.capability >= 120 and _widest(p) > 160,
            ),
            RefuseWhen(
                "training on sm{device.capability}: its backward begins at sm90",
                lambda p, device: p.needs_grad and device.capability < 90,
            ),
            RefuseWhen(
                "training with grouped queries ({p.q_heads} / {p.kv_heads}) and " + DIMS + ": they must be equal there",
                lambda p, device: (
                    device.capability == 90 and p.needs_grad and p.group > 1 and p.head_dim != p.head_dim_v
                ),
            ),
            SOFTCAP_IN_TRAINING,
            RefuseWhen(
                "a deterministic backward on sm{device.capability}: it has none from sm120 on",
                lambda p, device: p.deterministic and p.needs_grad and device.capability >= 120,
            ),
            *PAGES_ON,
        ),
    ),
)
