"""torch.nn.attention.flex_attention: compiled for one problem at a time, and never run unfused above a small size.

The only one that takes a caller's score_mod or BlockMask. Windows, triangles and the squares of other masks become a BlockMask
here, a cap a score_mod. Its backend FLASH puts them into the forward of FlashAttention 4. That one skips two tiles of 128
queries at once on sm100, so a row of squares is 256 queries high there; a caller's BlockMask has squares of a size that no
Problem says. It takes no number that is a symbol: each length is compiled for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastattn.kernels import (
    GRID,
    NOT_EMPTY,
    SIZE,
    Arguments,
    Kernel,
    MaskBlocks,
    OneOf,
    Range,
    RefuseWhen,
    Run,
    Tensor,
    log,
    remembered,
    require_keywords,
)

EAGER_SCORES = 2**16  # up to so many scores compiling is not worth it, and unfused costs nothing
DECODE = 16  # up to so many queries, sizes are dynamic: lengths grow with every token
KERNELS_KEPT = 32  # problems that are compiled for themselves in one process; beyond it sizes are dynamic


CHANGING = ("changing sizes",)


def load_flash() -> Run:
    from flash_attn.cute import interface  # pyright: ignore[reportMissingImports]

    from fastattn.kernels import check_silicon

    # what the code that torch makes calls
    require_keywords(
        interface._flash_attn_fwd, "out", "lse", "score_mod", "mask_mod", "block_sparse_tensors", "aux_tensors"
    )
    check_silicon()
    return load("FLASH")


def load_cpu() -> Run:
    import shutil

    import torch

    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512", "AMX"):
        raise ImportError(f"it needs AVX2, this CPU has {torch.backends.cpu.get_cpu_capability()}")
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        raise ImportError("it is compiled by g++ or clang++, and neither is there")
    return load()


def load(backend: str = "AUTO") -> Run:
    import warnings

    import torch
    from torch.nn.attention import flex_attention as flex

    from fastattn.kernels import band_mask, square_mask

    attend: Callable[..., Any] = flex.flex_attention
    compiled: dict[Any, Callable[..., Any]] = {}
    is_flash = backend == "FLASH"
    height = 2 * SIZE if is_flash else SIZE

    def fused(sizes: Any) -> Callable[..., Any]:
        """flex_attention compiled for these sizes; a code object of its own, as torch bounds the recompiles of each."""
        if len(compiled) >= KERNELS_KEPT and sizes not in compiled:
            if is_flash:  # it takes no changing ones
                compiled.pop(next(iter(compiled)), None)
            else:
                sizes = CHANGING
        if sizes not in compiled:
            log.info("flex_attention is compiled: kernel %d of this process, for %s", len(compiled) + 1, sizes)
            compiled[sizes] = torch.compile(_own(attend), fullgraph=True, dynamic=sizes is CHANGING)
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

    kept_band, kept_squares, kept_cap = kept(band_mask), kept(square_mask), kept(cap)

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Any, a: Arguments) -> Any:
        is_traced = torch.compiler.is_compiling()  # nothing is kept then, and Dynamo would warn of a cache
        if a.lower is not None or a.upper is not None:
            mask = (band_mask if is_traced else kept_band)(a.lower, a.upper, q.shape[2], k.shape[2], q.device, height)
        elif isinstance(mask, MaskBlocks):
            mask = (square_mask if is_traced else kept_squares)(mask, height)
        options: dict[str, Any] = {"block_mask": mask, "scale": a.scale, "enable_gqa": q.shape[1] != k.shape[1]}
        options["score_mod"] = (cap if is_traced else kept_cap)(a.softcap) if a.softcap else a.score_mod
        if is_flash:
            options["kernel_options"] = {"BACKEND": backend}
        if a.lse:
            options["return_aux"] = flex.AuxRequest(lse=True)
        is_small = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] <= EAGER_SCORES
        if is_traced:
            found = attend(q, k, v, **options)
        elif is_small and not is_flash:
            found = unfused(q, k, v, **options)
        else:
            tensors = tuple((x.shape, x.stride(), x.dtype) for x in (q, k, v))
            sizes = CHANGING if q.shape[2] <= DECODE and not is_flash else (tensors, a._replace(score_mod=None))
            found = run_fused(sizes, q, k, v, options)
        return (found[0], found[1].lse.detach()) if a.lse else found

    return run


def kept(make: Callable[..., Any]) -> Callable[..., Any]:
    """The same, remembered, and of tensors that may be saved for a backward, whatever mode they were made in."""
    import torch

    def made(*given: Any) -> Any:
        with torch.inference_mode(False):
            return make(*given)

    return remembered(32)(made)


def cap(softcap: float) -> Callable[..., Tensor]:
    """The score_mod of a softcap."""
    import torch

    return lambda score, b, h, i, j: softcap * torch.tanh(score / softcap)


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
        mask_blocks=True,
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
        mask_blocks=True,
        lse=True,
        dense_last_dim=True,
        compiles="each_length",
        products=True,
        no_broadcast=True,  # it would read beyond them (pytorch#172225)
        needs=(*GRID, *NOT_EMPTY, Range("capability", min=75), Range("head_dim", min=16), Range("head_dim_v", min=16)),
    ),
    Kernel(
        name="flex_flash",
        summary="torch's flex_attention, compiled into FlashAttention 4 (package flash-attn-4)",
        load=load_flash,
        library="flash-attn-4",
        versions=("4", "5"),
        devices=("cuda",),
        dtypes=("float16", "bfloat16"),
        corner="any",
        window=True,
        softcap=True,
        score_mod=True,
        mask_blocks=True,
        lse=True,
        grad=False,
        head_dim_multiple=8,
        dense_last_dim=True,
        aligned=True,
        output_lies="as_query",
        compiles="each_length",
        no_broadcast=True,
        needs=(
            *GRID,
            *NOT_EMPTY,
            Range("capability", min=90, max=119),
            Range("head_dim", min=16),
            Range("head_dim_v", min=16),
            OneOf("scale", ("positive",)),  # a row's maximum is taken before it is scaled
            RefuseWhen(
                "head_dim {p.head_dim} and head_dim_v {p.head_dim_v}: it skips squares up to (128, 128), and for (192, 128)",
                lambda p, _: max(p.head_dim, p.head_dim_v) > 128 and (p.head_dim, p.head_dim_v) != (192, 128),
            ),
        ),
    ),
)
