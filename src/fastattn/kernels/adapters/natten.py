"""NATTEN's attention(), a row for each of its backends in libnatten: CUTLASS (any silicon), Hopper, Blackwell.

Needs 0.21.6: is_causal came in 0.21.5, Hopper's triangle in 0.21.6. It is the top-left one, whatever the lengths: upstream
compares it so with F.sdpa. A scale of 0 is taken for none at all, the log-sum-exp is (b, s, h), and q, k and v are copied to
dense memory unless they lie so. na1d, na2d and na3d are neighbourhoods, another contract.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

from fastattn.kernels import (
    BFLOAT16,
    GRID,
    NOT_EMPTY,
    Arguments,
    Kernel,
    OneOf,
    Range,
    RefuseWhen,
    Run,
    Tensor,
    require_keywords,
)

HALF = ("float16", "bfloat16")
WIDTHS = (32, 64, 128, 256)  # that Hopper's is built for


def load(backend: str) -> Run:
    import natten  # pyright: ignore[reportMissingImports]

    if not natten.HAS_LIBNATTEN:
        try:
            import_module("natten.libnatten")
        except ModuleNotFoundError:
            raise ImportError("this natten was built without libnatten, which has the kernels") from None
        raise ImportError("this natten does not use its libnatten, which has the kernels")
    attend = require_keywords(
        natten.attention, "query", "key", "value", "is_causal", "scale", "backend", "backward_kv_splits", "return_lse"
    )
    is_split = backend == "cutlass-fmha"  # its backward splits the keys, and adds what comes of it in any order

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        found = attend(
            query=q,
            key=k,
            value=v,
            is_causal=a.upper is not None,
            scale=a.scale,
            backend=backend,
            backward_kv_splits=1 if is_split and a.deterministic else None,
            return_lse=a.lse,
        )
        if not a.lse:
            return found
        out, lse = found
        return out, lse.detach().transpose(1, 2)

    return run


def _padded(p: Any) -> int:
    return -(-max(p.head_dim, p.head_dim_v) // 32) * 32


def _row(name: str, backend: str, *needs: Any, **fields: Any) -> Kernel:
    shared = (
        *GRID, *NOT_EMPTY,
        Range("head_dim", min=1), OneOf("scale", ("positive",)),
    )  # fmt: skip
    return Kernel(
        name=name, summary=f"NATTEN's {backend}", load=partial(load, backend), library="natten", versions=("0.21.6", ""),
        devices=("cuda",), layout="bshd", corner="top_left", causal_scales=("positive",), lse=True, dense=True, aligned=True,
        needs=(*needs, *shared), **fields,
    )  # fmt: skip


KERNELS = (
    _row(
        "natten_cutlass", "cutlass-fmha",
        Range("capability", min=60),
        Range("head_dim", max=65536),
        Range("head_dim_v", max=65536),
        BFLOAT16,
        dtypes=(*HALF, "float32"), head_dim_multiple=8,
    ),
    _row(
        "natten_hopper", "hopper-fmha",
        OneOf("capability", (90,)),
        RefuseWhen(f"head dims {{p.head_dim}} and {{p.head_dim_v}}, padded to 32, are none of {', '.join(map(str, WIDTHS))}",
                   lambda p, _: _padded(p) not in WIDTHS),
        RefuseWhen("training with head dims {p.head_dim} and {p.head_dim_v} > 128",
                   lambda p, _: p.needs_grad and _padded(p) > 128),
        dtypes=HALF, head_dim_multiple=32, equal_head_dims=True, deterministic=False,
    ),
    _row(
        "natten_blackwell", "blackwell-fmha",
        OneOf("capability", (100, 103)),
        Range("head_dim", max=128),
        Range("head_dim_v", max=128),
        dtypes=HALF, head_dim_multiple=8, equal_head_dims=True,
    ),
)  # fmt: skip
