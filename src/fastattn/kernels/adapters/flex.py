"""torch.nn.attention.flex_attention: compiled for one problem at a time, and never run unfused above a small size.

The only kernel that takes a caller's score_mod or BlockMask. Windows and triangles become a mask_mod here, a cap a score_mod.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from fastattn.kernels import GRID, NOT_EMPTY, Arguments, Kernel, Range, Run, Tensor, log

EAGER_SCORES = 2**16  # up to so many scores compiling is not worth it, and unfused costs nothing
DECODE = 16  # up to so many queries, sizes are dynamic: lengths grow with every token
KERNELS_KEPT = 32  # problems that are compiled for themselves in one process; beyond it sizes are dynamic


CHANGING = ("changing sizes",)


def load_cpu() -> Run:
    import shutil

    import torch

    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512", "AMX"):
        raise ImportError(f"it needs AVX2, this CPU has {torch.backends.cpu.get_cpu_capability()}")
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        raise ImportError("it is compiled by g++ or clang++, and neither is there")
    return load()


def load() -> Run:
    import warnings

    import torch
    from torch.nn.attention import flex_attention as flex

    attend: Callable[..., Any] = flex.flex_attention
    compiled: dict[Any, Callable[..., Any]] = {}

    def fused(sizes: Any) -> Callable[..., Any]:
        """flex_attention compiled for these sizes; a code object of its own, as torch bounds the recompiles of each."""
        sizes = sizes if len(compiled) < KERNELS_KEPT or sizes in compiled else CHANGING
        if sizes not in compiled:
            log.info("flex_attention is compiled: kernel %d of this process, for %s", len(compiled) + 1, sizes)
            compiled[sizes] = torch.compile(_own(attend), fullgraph=True, dynamic=sizes[0] == CHANGING[0])
        return compiled[sizes]

    def run_fused(sizes: Any, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Any:
        try:
            return fused(sizes)(q, k, v, **options)
        except Exception as error:
            if type(error).__name__ != "FailOnRecompileLimitHit":
                raise
        # each function of the caller's compiles anew, and torch allows a code object only so many
        compiled.pop(sizes, None)
        compiled.pop(CHANGING, None)
        return fused(sizes)(q, k, v, **options)

    def unfused(*given: Any, **options: Any) -> Any:
        with warnings.catch_warnings():  # it warns that it is not compiled, which is what is wanted here
            warnings.simplefilter("ignore")
            return attend(*given, **options)

    def make_band_mask(lower: int | None, upper: int | None, q_len: int, kv_len: int, device: torch.device) -> Any:
        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            seen = j >= 0
            if lower is not None:
                seen = seen & (j >= i + lower)
            return seen if upper is None else seen & (j <= i + upper)

        return flex.create_block_mask(visible, None, None, q_len, kv_len, device=device)

    def make_cap(softcap: float) -> Callable[..., Tensor]:
        return lambda score, b, h, i, j: softcap * torch.tanh(score / softcap)

    band_mask, cap = lru_cache(64)(make_band_mask), lru_cache(64)(make_cap)

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Any, a: Arguments) -> Any:
        is_traced = torch.compiler.is_compiling()  # nothing is kept then, and Dynamo would warn of a cache
        if a.lower is not None or a.upper is not None:
            mask = (make_band_mask if is_traced else band_mask)(a.lower, a.upper, q.shape[2], k.shape[2], q.device)
        options: dict[str, Any] = {"block_mask": mask, "scale": a.scale, "enable_gqa": q.shape[1] != k.shape[1]}
        options["score_mod"] = (make_cap if is_traced else cap)(a.softcap) if a.softcap else a.score_mod
        if a.lse:
            options["return_aux"] = flex.AuxRequest(lse=True)
        is_small = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] <= EAGER_SCORES
        if is_traced:
            found = attend(q, k, v, **options)
        elif is_small:
            found = unfused(q, k, v, **options)
        else:
            tensors = tuple((x.shape, x.stride(), x.dtype) for x in (q, k, v))
            sizes = CHANGING if q.shape[2] <= DECODE else (tensors, a._replace(score_mod=None))
            found = run_fused(sizes, q, k, v, options)
        return (found[0], found[1].lse.detach()) if a.lse else found

    return run


def _own(attend: Callable[..., Any]) -> Callable[..., Any]:
    """A function that only calls `attend`, with a code object that no other has."""

    def call(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return attend(q, k, v, **options)

    call.__code__ = call.__code__.replace()
    return call


KERNELS = (
    Kernel(
        name="flex",
        summary="torch's flex_attention, compiled: forward only on the CPU",
        load=load_cpu,
        dtypes=("float16", "bfloat16", "float32"),
        corner="any",
        window=True,
        softcap=True,
        score_mod=True,
        custom_mask=True,
        grad=False,
        dense_last_dim=True,
        compiles="each_length",
        products=True,
        needs=(Range("batch", min=1), Range("q_heads", min=1), *NOT_EMPTY, Range("head_dim", min=1)),
    ),
    Kernel(
        name="flex",
        summary="torch's flex_attention, compiled to Triton",
        load=load,
        devices=("cuda",),
        dtypes=("float16", "bfloat16", "float32"),
        corner="any",
        window=True,
        softcap=True,
        score_mod=True,
        custom_mask=True,
        lse=True,
        dense_last_dim=True,
        compiles="each_length",
        products=True,
        no_broadcast=True,  # it would read beyond them (pytorch#172225)
        needs=(*GRID, *NOT_EMPTY, Range("capability", min=75), Range("head_dim", min=16), Range("head_dim_v", min=16)),
    ),
)
