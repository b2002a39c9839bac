"""torch.nn.attention.flex_attention: compiled for one problem at a time, and never run unfused above a small size.

The only kernel that takes a caller's score_mod or BlockMask. Windows, triangles and the squares of other masks become a
BlockMask here, a cap a score_mod.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastattn.kernels import (
    GRID,
    HIDDEN,
    NOT_EMPTY,
    SIZE,
    WHOLE,
    Arguments,
    Kernel,
    MaskBlocks,
    Range,
    Run,
    Tensor,
    log,
    remembered,
)

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

    kept_band, kept_squares, kept_cap = kept(band_mask), kept(square_mask), kept(cap)

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Any, a: Arguments) -> Any:
        is_traced = torch.compiler.is_compiling()  # nothing is kept then, and Dynamo would warn of a cache
        if a.lower is not None or a.upper is not None:
            mask = (band_mask if is_traced else kept_band)(a.lower, a.upper, q.shape[2], k.shape[2], q.device)
        elif isinstance(mask, MaskBlocks):
            mask = (square_mask if is_traced else kept_squares)(mask)
        options: dict[str, Any] = {"block_mask": mask, "scale": a.scale, "enable_gqa": q.shape[1] != k.shape[1]}
        options["score_mod"] = (cap if is_traced else kept_cap)(a.softcap) if a.softcap else a.score_mod
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


def kept(make: Callable[..., Any]) -> Callable[..., Any]:
    """The same, remembered, and of tensors that may be saved for a backward, whatever mode they were made in."""
    import torch

    def made(*given: Any) -> Any:
        with torch.inference_mode(False):
            return make(*given)

    return remembered(32)(made)


def band_mask(lower: int | None, upper: int | None, q_len: int, kv_len: int, device: Any) -> Any:
    """The BlockMask of a triangle or a window; None is no limit."""
    import torch

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = j >= 0
        if lower is not None:
            seen = seen & (j >= i + lower)
        return seen if upper is None else seen & (j <= i + upper)

    def first_and_last(length: int) -> tuple[Tensor, Tensor]:
        """Of the rows, or of the keys, of each square."""
        first = torch.arange(0, length, SIZE, dtype=torch.int64, device=device)
        return first, torch.cat([first[1:] - 1, first.new_tensor([length - 1])])

    (i, last_i), (j, last_j) = first_and_last(q_len), first_and_last(kv_len)
    every = (last_i - i == SIZE - 1)[:, None] & (last_j - j == SIZE - 1)  # squares that reach beyond are never whole
    i, last_i, some = i[:, None], last_i[:, None], torch.ones_like(every)
    if lower is not None:
        some, every = some & (last_j >= i + lower), every & (j >= last_i + lower)
    if upper is not None:
        some, every = some & (j <= last_i + upper), every & (last_j <= i + upper)
    return block_mask(some[None], every[None], visible, q_len, kv_len)


def square_mask(blocks: MaskBlocks) -> Any:
    """The BlockMask of MaskBlocks: in a square that is hidden in part each pair is looked up in the square's pattern."""
    pattern, patterns, of_entries = blocks.pattern, blocks.patterns, int(len(blocks.pattern) > 1)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return patterns[pattern[b * of_entries, i // SIZE, j // SIZE], i % SIZE, j % SIZE]

    return block_mask(pattern != HIDDEN, pattern == WHOLE, visible, blocks.q_len, blocks.kv_len)


def block_mask(some: Tensor, every: Tensor, visible: Callable[..., Tensor], q_len: int, kv_len: int) -> Any:
    """A BlockMask from whether some and all of each square is seen, bool [1 or batch, rows of squares, squares in a row]."""
    import torch
    from torch.nn.attention.flex_attention import BlockMask

    def listed(squares: Tensor) -> tuple[Tensor, Tensor]:
        """How many there are in each row of squares, and which: they come first."""
        order = squares.int().argsort(dim=-1, descending=True, stable=True)
        return squares.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]

    lists = (*listed(some & ~every), *listed(every))
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=SIZE, mask_mod=visible, seq_lengths=(q_len, kv_len))


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
)
