"""xFormers' memory_efficient_attention, one row for each of its operators, pinned: it would choose another by itself.

Read at 0.0.35, the last one that brings its own code: see mslk. A pinned operator's backward is not asked whether it can;
whether there is a graph is decided from q, k and v alone; the log-sum-exp comes without a graph. The window of a causal bias
counts the query's own key, that of a local one does not. cutlass is torch's own op: see torch_lower.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
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
    sees_nothing,
)  # fmt: skip

INF = float("inf")
INPUTS = ("query", "key", "value", "attn_bias", "p", "scale", "op")


def load(name: str, where: str = "xformers.ops.fmha") -> Run:
    """name: of the operator. where: the module that has them."""
    return _of(name, where, _band)


def load_packed(name: str, where: str = "xformers.ops.fmha") -> Run:
    """The same for packed sequences. It writes no row that is in no sequence."""
    return _of(name, where, _sequences)


def _of(name: str, where: str, bias_of: Callable[..., Any]) -> Run:
    try:
        fmha = import_module(where)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("flash_attn"):
            raise
        library = where.partition(".")[0]
        raise ImportError(
            f"{library} takes flash-attn-4 for flash-attn, and cannot be imported beside it alone"
        ) from None

    op, told = getattr(fmha, name), bias_of(fmha.attn_bias)
    if name == "triton_splitk" and find_spec("triton") is None:  # it says that it is there, whatever there is
        raise ImportError(f"its {name} operator was not built: triton is not there")
    if not op.FwOp.is_available():
        why = ", and the package flash_attn_3 is not there" if name == "flash3" else ""
        raise ImportError(f"its {name} operator was not built{why}")
    forward = require_keywords(fmha.memory_efficient_attention_forward, *INPUTS)
    with_lse = require_keywords(fmha.memory_efficient_attention_forward_requires_grad, *INPUTS)
    with_graph = require_keywords(fmha.memory_efficient_attention, *INPUTS)

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        q_len, heads, kv_len, kv_heads = q.shape[1], q.shape[2], k.shape[1], k.shape[2]
        bias = told(q, k, mask, a)
        if heads != kv_heads:  # (b, s, kv_heads, group, d), the keys of a group one view
            split = (kv_heads, heads // kv_heads)
            q, k, v = q.unflatten(2, split), *(x.unsqueeze(3).expand(-1, -1, -1, split[1], -1) for x in (k, v))
            bias = bias if mask is None else bias.unflatten(1, split)
        call = partial(forward, op=op.FwOp)
        if a.lse:
            call = partial(with_lse, op=op.FwOp)
        elif a.needs_grad:
            call = partial(with_graph, op=(op.FwOp, op.BwOp))
            if not (q.requires_grad or k.requires_grad or v.requires_grad):
                q = q.detach().requires_grad_()
        found = call(query=q, key=k, value=v, attn_bias=bias, p=a.dropout_p, scale=a.scale)
        out, lse = found if a.lse else (found, None)
        out = out if heads == kv_heads else out.flatten(2, 3)
        if lse is None:
            return out
        lse = lse.flatten(1, -2)[..., :q_len]  # cutlass pads it to a multiple of 32
        lse = lse.masked_fill(lse == INF, -INF)  # flash's for a row that sees nothing; cutlass says 0
        return out, lse if mask is None else lse.masked_fill(sees_nothing(mask, q_len, kv_len), -INF)

    return run


def _band(biases: Any) -> Callable[..., Any]:
    """What gives the bias of a mask, or of a triangle or a window."""

    def told(q: Tensor, k: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        b, q_len, h, kv_len = *q.shape[:3], k.shape[1]
        if mask is not None:
            return as_bias(mask, q, (b, h, q_len, kv_len))
        left, right = a.window_sides(q_len, kv_len)
        if left is None and right is None:
            return None
        if left is None and right == 0:
            return biases.LowerTriangularFromBottomRightMask()
        if left is None and a.upper == 0:
            return biases.LowerTriangularMask()
        if left is not None and right == 0:
            return biases.LowerTriangularFromBottomRightLocalAttentionMask(_window_size=left + 1)
        far = q_len + kv_len  # it takes no limit that is none
        left, right = (far if n is None else n for n in (left, right))
        return biases.LocalAttentionFromBottomRightMask(window_left=left, window_right=right)

    return told


def _sequences(biases: Any) -> Callable[..., Any]:
    """What gives the bias of packed sequences. Their lengths may lie on the GPU: its own checks of them get an empty list.

    With a longest query of 1, and groups, flash takes token i for sequence i (flash-attention#1537): it is told 2.
    """
    ends = require_keywords(biases._SeqLenInfo, "seqstart", "max_seqlen", "min_seqlen", "seqstart_py")

    def told(q: Tensor, k: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        assert a.packed is not None
        left, right = a.window_sides(0, 0)
        both = ((a.packed.cu_q, max(2, a.packed.max_q)), (a.packed.cu_kv, a.packed.max_kv))
        infos = (ends(seqstart=cu, max_seqlen=longest, min_seqlen=0, seqstart_py=[]) for cu, longest in both)
        given = dict(zip(("q_seqinfo", "k_seqinfo"), infos, strict=True))
        if right is None:
            return biases.BlockDiagonalMask(**given)
        if left is None:
            return biases.BlockDiagonalCausalFromBottomRightMask(**given)
        return biases.BlockDiagonalCausalLocalAttentionFromBottomRightMask(**given, _window_size=left + 1)

    return told


NO_GRAPH = RefuseWhen(
    "training with return_lse {p.lse}: it comes without a graph", lambda p, _: bool(p.needs_grad and p.lse)
)
NO_DROPOUT = RefuseWhen("dropout with return_lse {p.lse}", lambda p, _: bool(p.dropout and p.lse))
GROUPS = RefuseWhen(
    "training with {p.q_heads} heads and {p.kv_heads} kv heads", lambda p, _: bool(p.needs_grad and p.group > 1)
)
PACKED_WINDOW = RefuseWhen(
    "packed sequences with a window {p.any_window} that no triangle ends, it has causal ones",
    lambda p, _: bool(p.packing.window and p.packing.upper != 0),
)
SAME = (  # what cutlass takes of packed sequences: its log-sum-exp is padded to the longest one
    RefuseWhen("packed sequences with lengths of their own ({p.structure})", lambda p, _: not p.packing.are_same),
    RefuseWhen("packed sequences with a window {p.any_window}", lambda p, _: bool(p.packing.window)),
    RefuseWhen("packed sequences with return_lse {p.lse}", lambda p, _: p.lse),
)
SPLITK_DIMS = (16, 32, 64, 128, 256, 512)

FLASH = Kernel(
    name="xformers_flash",
    summary="xFormers' FlashAttention 2: the package flash-attn, or torch's copy of it",
    load=partial(load, "flash"), load_packed=partial(load_packed, "flash"), packed_needs=(PACKED_WINDOW,),
    library="xformers", versions=("0.0.34", "0.0.36"),
    devices=("cuda",), dtypes=("float16", "bfloat16"), layout="bshd",
    corner="bottom_right", causal_scales=("positive",), window=True, dropout=True, lse=True,
    equal_head_dims=True, head_dim_multiple=8, dense_last_dim=True, aligned=True, deterministic=False,
    needs=(
        Range("capability", min=80, max=121),
        Range("head_dim", min=1, max=256),
        Range("head_dim_v", max=256),
        OneOf("scale", ("positive",)),
        *GRID, *NOT_EMPTY,
        NO_GRAPH, NO_DROPOUT, GROUPS, FLASH_2_BACKWARD,
    ),
)  # fmt: skip

KERNELS = (
    FLASH,
    FLASH.replace(
        name="xformers_flash3",
        summary="xFormers' FlashAttention 3: the package flash_attn_3",
        load=partial(load, "flash3"), load_packed=partial(load_packed, "flash3"),
        dropout=False,
        needs=(
            Range("capability", min=80, max=90),
            Range("head_dim", min=32, max=256),
            Range("head_dim_v", min=32, max=256),
            OneOf("scale", ("positive",)),
            *GRID, *NOT_EMPTY,
            NO_GRAPH, GROUPS,
            RefuseWhen(
                "training with head dims {p.head_dim} and {p.head_dim_v} < 64",
                lambda p, _: p.needs_grad and max(p.head_dim, p.head_dim_v) < 64,
            ),
        ),
    ),
    FLASH.replace(
        name="xformers_cutlass",
        summary="xFormers' cutlass: torch's memory-efficient kernel",
        load=partial(load, "cutlass"), load_packed=partial(load_packed, "cutlass"), packed_needs=SAME,
        dtypes=("float16", "bfloat16", "float32"),
        corner="any", causal_scales=("positive", "zero", "negative"), masks=("additive",), mask_grad=True,
        gqa=False, gqa_fold=True, head_dim_multiple=1, head_dim_bytes=16, equal_head_dims=False, deterministic=True,
        needs=(
            Range("capability", min=50, max=90),
            Range("head_dim", min=1, max=65536),
            Range("head_dim_v", min=1, max=65536),
            *GRID, *NOT_EMPTY,
            NO_GRAPH, NO_DROPOUT, BFLOAT16, OWN_MASK,
            RefuseWhen(
                "causal bottom_right with q_len {p.q_len} > kv_len {p.kv_len}: it hides nothing then",
                lambda p, _: p.causal == "bottom_right" and p.q_len > p.kv_len,
            ),
            # with a mask the band becomes one with it
            RefuseWhen(
                "a window {p.window} that no triangle ends, it has causal ones",
                lambda p, _: bool(p.mask is None and p.window and p.causal is None and p.window[1] != 0),
            ),
            RefuseWhen(
                "a window {p.window} at the top left with q_len {p.q_len} != kv_len {p.kv_len}",
                lambda p, _: bool(p.mask is None and p.window and p.causal != "bottom_right" and p.q_len != p.kv_len),
            ),
            RefuseWhen(
                "training with a window {p.window}", lambda p, _: bool(p.mask is None and p.window and p.needs_grad)
            ),
        ),
    ),
    FLASH.replace(
        name="xformers_splitk",
        summary="xFormers' Triton kernel that splits the keys, for decoding",
        load=partial(load, "triton_splitk"), load_packed=None, packed_needs=(),
        corner=None, masks=("additive",), window=False, dropout=False, grad=False,
        head_dim_multiple=1, head_dims=SPLITK_DIMS, deterministic=True, compiles="once",
        needs=(
            Range("capability", min=80, max=121),
            Range("head_dim", min=1, max=512),
            Range("head_dim_v", min=1, max=512),
            OWN_MASK,
            OneOf("scale", ("positive",)),
            Range("batch", min=1), Range("q_heads", min=1), *NOT_EMPTY,
            RefuseWhen(
                "batch {p.batch} times {p.q_heads} heads > 65535, a grid dimension",
                lambda p, _: p.batch * p.q_heads > 65535,
            ),
        ),
    ),
)  # fmt: skip
