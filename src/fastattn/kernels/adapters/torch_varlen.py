"""torch.nn.attention.varlen, torch's flash kernel for packed sequences and caches: without any library, from torch 2.11 on.

Read in torch 2.13. It writes no row that is in no sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from inspect import signature
from typing import Any

from fastattn.kernels import Arguments, Range, RefuseWhen, Run, Tensor, require_keywords
from fastattn.kernels.adapters import torch_lower


def import_varlen() -> Any:
    """A second to import: for whoever runs it."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    return varlen_attn, AuxRequest


def varlen_entry(*more: str) -> Callable[[], tuple[Any, Any, bool]]:
    """What gives (varlen_attn, AuxRequest, whether it is told of groups of heads). more: parameters that it must have.

    Raises ImportError where there is none.
    """
    if find_spec("torch.nn.attention.varlen") is None:
        raise ImportError("this torch has no torch.nn.attention.varlen")

    @cache
    def entry() -> tuple[Any, Any, bool]:
        attend, aux_request = import_varlen()
        told = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "return_aux", "scale", "window_size")
        return require_keywords(attend, *told, *more), aux_request, "enable_gqa" in signature(attend).parameters

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
        return (found[0][None], torch_lower.natural(found[1])[None]) if a.lse else found[None]

    return run


def load_cached_varlen(*more: str) -> Run:
    """Of a cache: as packed sequences of the cache's size, of which each is used as far as kv_lens says."""
    from torch import arange, int32

    entry = varlen_entry("seqused_k", "enable_gqa", *more)

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        batch, q_len, kv_len = q.shape[0], q.shape[1], k.shape[1]
        pages = {}
        if a.page_table is None:
            k, v = k.flatten(0, 1), v.flatten(0, 1)
        else:
            pages, kv_len = {"block_table": a.page_table}, kv_len * a.page_table.shape[1]
        left, right = (-1 if n is None else n for n in a.window_sides(0, 0))
        attend, aux_request, _ = entry()
        starts = (arange(0, (batch + 1) * n, n, dtype=int32, device=q.device) for n in (q_len, kv_len))
        found = attend(
            query=q.flatten(0, 1), key=k, value=v, seqused_k=a.kv_lens, enable_gqa=True, **pages,
            **dict(zip(("cu_seq_q", "cu_seq_k"), starts, strict=True)), max_q=q_len, max_k=kv_len,
            window_size=(left, right), scale=a.scale, return_aux=aux_request(lse=a.lse),
        )  # fmt: skip
        return shaped(found, a, batch, q_len)

    return run


def shaped(found: Any, a: Arguments, batch: int, q_len: int) -> Any:
    """What sequences of one length gave, as a batch."""
    if not a.lse:
        return found.unflatten(0, (batch, q_len))
    out, lse = found
    return out.unflatten(0, (batch, q_len)), torch_lower.natural(lse).unflatten(1, (batch, q_len)).transpose(0, 1)


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
        return shaped(found, a, batch, q_len)

    return run


KERNELS = (
    torch_lower.FLASH.replace(
        name="torch_varlen",
        summary="torch.nn.attention.varlen: packed sequences, or every sequence of one length",
        load=load_varlen,
        load_packed=load_packed_varlen,
        load_cached=load_cached_varlen,
        load_paged=partial(load_cached_varlen, "block_table"),
        paged_needs=(Range("page_size", multiple_of=256),),
        prepare=import_varlen,
        dropout=False,
        needs=(
            *torch_lower.FLASH_NEEDS,
            RefuseWhen(
                "{p.q_heads} heads and {p.kv_heads} kv heads with torch {device.torch} < 2.12",
                lambda p, device: p.group > 1 and device.torch_version < (2, 12),
            ),
        ),
    ),
)
