"""MSLK (package mslk-cuda): where xFormers' operators went on after its 0.0.35, and one of its own, for sm100.

Read at 1.1.0: functions, operators and biases are called as xFormers' are; flash3 has fewer head dims. Blackwell's takes the
strides of k for those of v, and its backward is not told the scale: it is a forward here. The operators of the CuTe DSL
(cute_hopper, cute_blackwell) call a FlashAttention 4 that is not public.
"""

from __future__ import annotations

from functools import partial

from fastattn.kernels import GRID, NOT_EMPTY, Kernel, OneOf, Range, RefuseWhen, Run
from fastattn.kernels.adapters import xformers

MODULE = "mslk.attention.fmha"


def load_blackwell() -> Run:
    import torch

    run = xformers.load("cutlass_blackwell", MODULE)
    if not hasattr(torch.ops.mslk, "fmha_fwd"):  # with MSLK_PYTHON_ONLY
        raise ImportError("its kernels for sm100 are not loaded")
    return run


def _row(base: Kernel, name: str, operator: str, **changes: object) -> Kernel:
    packed = {"load_packed": partial(xformers.load_packed, operator, MODULE)} if base.load_packed else {}
    return base.replace(
        name=f"mslk_{name}", load=partial(xformers.load, operator, MODULE), library="mslk-cuda", versions=("1.1", ""),
        summary=base.summary.replace("xFormers'", "MSLK's"), **packed, **changes,
    )  # fmt: skip


FLASH, FLASH_3, CUTLASS, SPLITK = xformers.KERNELS
KERNELS = (
    _row(FLASH, "flash", "flash"),
    _row(
        FLASH_3, "flash3", "flash3",
        head_dim_multiple=64,  # to 64, 128, 192 or 256
        needs=(
            Range("capability", min=80, max=90),
            Range("head_dim", min=1, max=256),
            Range("head_dim_v", max=256),
            OneOf("scale", ("positive",)),
            *GRID,
            *NOT_EMPTY,
            xformers.NO_GRAPH,
            xformers.GROUPS,
        ),
    ),
    _row(CUTLASS, "cutlass", "cutlass"),
    _row(SPLITK, "splitk", "triton_splitk"),
    _row(FLASH, "blackwell", "cutlass_blackwell").replace(
        summary="MSLK's cutlass kernel for sm100",
        load=load_blackwell,
        load_packed=None,
        packed_needs=(),
        dropout=False,
        grad=False,
        head_dim_multiple=64,  # to 64 or 128
        dense=True,
        deterministic=True,
        needs=(
            OneOf("capability", (100,)),
            Range("head_dim", min=1, max=128),
            Range("head_dim_v", max=128),
            OneOf("scale", ("positive",)),
            *GRID,
            Range("q_len", min=1),
            RefuseWhen("q_len {p.q_len} > kv_len {p.kv_len}", lambda p, _: p.q_len > p.kv_len),
        ),
    ),
)  # fmt: skip
