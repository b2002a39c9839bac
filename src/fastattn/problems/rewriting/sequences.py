"""Packed sequences, layout "thd": a batch of one, with a mask that holds where each sequence ends."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastattn.environment.text import type_name
from fastattn.problems import bands, masks
from fastattn.problems.call_key import as_structured
from fastattn.problems.call_options import window_sides
from fastattn.problems.masks.unread import Sequences
from fastattn.problems.rewriting.rewritten import Rewritten, check_whole, is_on_gpu, is_readable, listed


def of_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    options: dict[str, Any],
    of_q: Any,
    of_kv: Any,
    most_q: Any,
    most_kv: Any,
    is_whole: bool = False,
) -> Rewritten:
    """The call on a batch of one. is_whole: no token lies behind the last sequence.

    Raises TypeError, ValueError or RuntimeError for lengths that do not fit.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3:
            raise ValueError(f"attention(): {name} must have 3 dimensions (thd), got shape {tuple(x.shape)}")
    if of_q is None:
        raise ValueError(
            "attention(): layout='thd' needs cu_seqlens_q, where each sequence begins and the end of the last"
        )
    of_kv = of_q if of_kv is None else of_kv
    if k.shape[0] != v.shape[0]:
        raise RuntimeError(f"attention(): k and v must agree in tokens, got {k.shape[0]} and {v.shape[0]}")
    check_whole("cu_seqlens_q", of_q)
    check_whole("cu_seqlens_kv", of_kv)
    corner, window = _triangle(mask, options, "layout='thd'")
    if is_readable(of_q) and is_readable(of_kv):
        queries = _lengths("cu_seqlens_q", of_q, q.shape[0], most_q, "max_q_len")
        keys = _lengths(
            "cu_seqlens_kv" if of_kv is not of_q else "cu_seqlens_q", of_kv, k.shape[0], most_kv, "max_kv_len"
        )
        if len(queries) != len(keys):
            raise ValueError(f"attention(): cu_seqlens_q has {len(queries)} sequences, cu_seqlens_kv {len(keys)}")
        told: Any = _mask_of(queries, keys, corner, window, q.shape[0] == k.shape[0] == sum(queries) == sum(keys))
    elif is_on_gpu(of_q) and is_on_gpu(of_kv):
        told = _unread(q, k, (of_q, of_kv), (most_q, most_kv), corner, window, is_whole)
    else:
        told = _packed_mask(q, k, of_q, of_kv, corner, window)
    options = {name: value for name, value in options.items() if name not in ("is_causal", "window")}

    def back(found: Any) -> Any:
        return (found[0][0], found[1][0]) if isinstance(found, tuple) else found[0]

    return Rewritten(q[None], k[None], v[None], told, "bshd", options, back)


def _triangle(mask: Any, options: dict[str, Any], where: str) -> tuple[str, bands.Sides | None]:
    """(the corner, the window) within each sequence. Raises ValueError for a mask that is no triangle."""
    mask = as_structured(mask)
    if mask is not None and not isinstance(mask, masks.Causal):
        raise ValueError(
            f"attention(): beside {where}, mask is None or masks.Causal(...), within each sequence; got {type_name(mask)}"
        )
    is_causal, window = options.get("is_causal", False), window_sides(options.get("window"))
    corner = mask.corner if mask is not None else "top_left" if is_causal else ""
    if mask is not None and is_causal and mask.corner != "top_left":
        raise ValueError(f"attention(): is_causal beside mask={mask!r} and {where} is ambiguous; give one")
    return corner, window


def _mask_of(
    queries: tuple[int, ...], keys: tuple[int, ...], corner: str, window: bands.Sides | None, is_whole: bool
) -> masks.Mask:
    """The mask of packed sequences. Where queries and keys are the same tokens it says so in the plainest way."""
    if queries != keys or not is_whole or not any(queries):
        return masks.Packed(queries, keys, corner, window or (-1, -1))
    own = [masks.Causal()] if corner else []
    own += [masks.Window(*window)] if window else []
    return masks.all_of([masks.Document(tuple(n for n in queries if n)), *own])


def _lengths(name: str, given: Any, tokens: int, most: Any, name_of_most: str) -> tuple[int, ...]:
    """The length of each sequence. Raises TypeError or ValueError where they cannot be those of so many tokens."""
    ends = listed(name, given)
    lengths = tuple(last - first for first, last in pairwise(ends))
    if len(ends) < 2 or ends[0] != 0 or ends[-1] > tokens or min(lengths, default=0) < 0:
        raise ValueError(
            f"attention(): {name} must rise from 0 to {tokens} tokens, a number more than sequences; got {list(ends)}"
        )
    longest = max(lengths, default=0)
    if most is not None and listed(name_of_most, [most])[0] < longest:
        raise ValueError(f"attention(): {name_of_most} is {most}, the longest sequence of {name} has {longest} tokens")
    return lengths


def _unread(
    q: Tensor,
    k: Tensor,
    ends: tuple[Tensor, Tensor],
    most: tuple[Any, Any],
    corner: str,
    window: bands.Sides | None,
    is_whole: bool,
) -> masks.Mask:
    """The mask of packed sequences whose lengths stay on the GPU. What is not told of them is taken for as large as can be."""
    for name, cu in zip(("cu_seqlens_q", "cu_seqlens_kv"), ends, strict=True):
        if cu.dim() != 1 or cu.shape != ends[0].shape or cu.shape[0] < 2 or cu.device != q.device:
            raise ValueError(
                f"attention(): {name} must be one number more than there are sequences, as many of keys as of queries, on"
                f" {q.device}; got shape {tuple(cu.shape)} beside {tuple(ends[0].shape)}, on {cu.device}"
            )
    tokens = q.shape[0], k.shape[0]
    are_same = ends[0] is ends[1] and tokens[0] == tokens[1]
    cu_q = ends[0].to(torch.int32).contiguous()
    cu_kv = cu_q if are_same else ends[1].to(torch.int32).contiguous()
    told = [n if n is None else listed(name, [n])[0] for name, n in zip(("max_q_len", "max_kv_len"), most, strict=True)]
    told = [told[0] or told[1], told[1] or told[0]] if are_same else told
    max_q, max_kv = (n if m is None else min(n, m) for n, m in zip(tokens, told, strict=True))
    of_q, of_kv = (-(-n // (cu_q.shape[0] - 1)) for n in tokens)
    sequences = Sequences(cu_q, cu_kv, max_q, max_kv, tokens if is_whole else None)
    return masks.PackedUnread(of_q, of_kv, corner, window or (-1, -1), are_same, sequences)


def _packed_mask(q: Tensor, k: Tensor, of_q: Any, of_kv: Any, corner: str, window: bands.Sides | None) -> Tensor:
    """The mask of packed sequences as a bool tensor, made of their ends without reading them."""
    of_q, of_kv = (torch.as_tensor(x, dtype=torch.int64, device=q.device) for x in (of_q, of_kv))
    i, j = (torch.arange(x.shape[0], dtype=torch.int64, device=q.device) for x in (q, k))
    n, m = torch.bucketize(i, of_q[1:], right=True), torch.bucketize(j, of_kv[1:], right=True)
    i, j = i - of_q[n], j - of_kv[m]  # those behind the last sequence see nothing, and are not seen
    if corner == "bottom_right":
        longer = of_kv.diff() - of_q.diff()
        i = i + torch.cat([longer, longer.new_zeros(1)])[n]
    seen = (n[:, None] == m) & (n[:, None] < of_q.shape[0] - 1)
    return seen & _in_band(i[:, None], j, corner, window)


def _in_band(i: Tensor, j: Tensor, corner: str, window: bands.Sides | None) -> Tensor:
    lower, upper = bands.band(corner or None, window, 0, 0)
    seen = j <= i + upper if upper is not None else j >= 0
    return seen & (j >= i + lower) if lower is not None else seen
