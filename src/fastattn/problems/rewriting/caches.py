"""Caches that are filled to `kv_lens`, of pages or whole: their filled part, with a mask where entries differ."""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
from torch import Tensor

from fastattn.environment.text import type_name
from fastattn.problems import dense_masks, masks
from fastattn.problems.call_key import as_structured, call_key, told
from fastattn.problems.call_options import CallOptions, parse_options
from fastattn.problems.layouts import TO_BHSD
from fastattn.problems.masks.pages import followed, in_one_piece
from fastattn.problems.rewriting.rewritten import (
    Rewritten,
    as_it_is,
    check_whole,
    is_on_gpu,
    is_readable,
    listed,
)

# Masks that say the same whatever kv_len is, so that they may lie over a part of the cache.
_BY_POSITION = (masks.Causal, masks.Window, masks.Dilated, masks.Chunked, masks.Prefix, masks.Global, masks.ALiBi)


def of_cache(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, layout: str, options: dict[str, Any], kv_lens: Any, pages: Any
) -> Rewritten:
    """The call on what is filled. Raises TypeError, ValueError or RuntimeError for what does not fit."""
    if options.get("dropout_p", 0.0):
        raise ValueError("attention(): dropout_p does not go with kv_lens: a cache is for inference")
    check_whole("kv_lens", kv_lens)
    (b, _, s, _), readable = TO_BHSD[layout], is_readable(kv_lens)
    if pages is not None:
        if kv_lens is None:
            raise ValueError("attention(): page_table needs kv_lens: how much of each batch entry's pages is filled")
        if is_on_gpu(kv_lens) and (told := _in_pages(q, k, v, mask, layout, options, kv_lens, pages)) is not None:
            return told
        most = max(_lengths(kv_lens, q.shape[b]), default=0) if readable else None
        same, k = k is v, _gathered("k", k, pages, layout, kv_lens, most)
        v = k if same else _gathered("v", v, pages, layout, kv_lens, most)
    if any(x.dim() != 4 for x in (q, k, v)) or k.shape[s] != v.shape[s] or _is_dense(mask):
        call_key(q, k, v, mask, layout, CallOptions())  # raises for what does not fit the whole cache
    corner, left, rest = _corner(mask, options)
    if is_on_gpu(kv_lens) and (corner or mask is None):
        told = masks.FilledUnread(k.shape[s], _rows(q.shape[s], corner, left), left, _on_gpu(kv_lens, q, b))
        return Rewritten(q, k, v, told, layout, rest if corner else options, as_it_is)
    if not readable:
        mask = _unread(q, k, mask, kv_lens, (b, s), left, corner)
        return Rewritten(q, k, v, mask, layout, rest, as_it_is)
    filled = _lengths(kv_lens, q.shape[b])
    if len(filled) != q.shape[b] or not all(0 <= n <= k.shape[s] for n in filled):
        raise ValueError(
            f"attention(): kv_lens must be {q.shape[b]} numbers from 0 to kv_len {k.shape[s]}, got {list(filled)}"
        )
    most = max((0, *filled))
    if most < k.shape[s]:
        mask = mask[..., :most] if _is_dense(mask) and mask.shape[-1] > 1 else mask
        k, v = k.narrow(s, 0, most), v.narrow(s, 0, most)
    if len(set(filled)) < 2:
        return Rewritten(q, k, v, mask, layout, options, as_it_is)
    if corner:
        return Rewritten(q, k, v, masks.Filled(filled, _rows(q.shape[s], corner, left), left), layout, rest, as_it_is)
    if _is_dense(mask):
        mask = dense_masks.intersect(mask, masks.Filled(filled).dense(q.shape[b], 1, most, q.device))
    else:
        mask = masks.Filled(filled) if mask is None else as_structured(mask) & masks.Filled(filled)
    return Rewritten(q, k, v, mask, layout, options, as_it_is)


def _in_pages(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, layout: str, options: dict[str, Any], kv_lens: Tensor, pages: Any
) -> Rewritten | None:
    """The call with the pages as they are, for kernels that follow a table; None where no kernel could."""
    check_whole("page_table", pages)
    b, _, s, _ = TO_BHSD[layout]
    pages = pages if isinstance(pages, Tensor) else torch.as_tensor(pages, dtype=torch.int32, device="cpu")
    pages = pages.to(q.device, torch.int32, non_blocking=True)  # from a host's table too, without waiting for the GPU
    are_pages = (
        layout != "sbhd" and pages.dim() == 2 and k.dim() == v.dim() == q.dim() == 4 and k.shape[:3] == v.shape[:3]
    )
    if not are_pages or not all(map(_can_be_read, (k, v))):
        return None
    corner, left, rest = _corner(mask, options)
    if not corner and mask is not None:
        return None
    lengths, table = _on_gpu(kv_lens, q, b), pages.contiguous()
    rows, page = _rows(q.shape[s], corner, left), k.shape[s]
    if not page:
        return None
    told = masks.FilledPagesUnread(table.shape[1] * page, rows, left, lengths, page, table)
    return Rewritten(q, k, v, told, layout, rest if corner else options, as_it_is)


def _can_be_read(x: Tensor) -> bool:
    """Whether it lies as kernels read it, in vectors of 16 bytes: all pages there are would be copied else."""
    *steps, last = x.stride()
    return last == 1 and not (x.data_ptr() | x.element_size() * gcd(*steps)) & 15


def _rows(q_len: int, corner: bool, left: int) -> int:
    """The queries of a triangle at the last filled key; one query sees all that is filled."""
    return q_len if corner and (q_len > 1 or left >= 0) else 0


def _on_gpu(kv_lens: Tensor, q: Tensor, b: int) -> Tensor:
    """How much of each batch entry is filled, as kernels take it. Raises ValueError for another number of entries."""
    if kv_lens.shape not in ((), (q.shape[b],)) or kv_lens.device != q.device:
        raise ValueError(
            f"attention(): kv_lens must be {q.shape[b]} numbers on {q.device}, got shape {tuple(kv_lens.shape)} on"
            f" {kv_lens.device}"
        )
    return kv_lens.to(torch.int32).expand(q.shape[b]).contiguous()


def _corner(mask: Any, options: dict[str, Any]) -> tuple[bool, int, dict[str, Any]]:
    """(whether the triangle lies at the lower right, keys to the left of it, the other options). Raises for other masks."""
    mask = as_structured(mask)
    if mask is None or _is_dense(mask):
        return False, -1, options
    if not isinstance(mask, masks.Mask):
        raise TypeError(f"attention(): beside kv_lens, mask is None, a Tensor or a Mask, got {type_name(mask)}")
    parsed, rest, also = told(mask, parse_options(options))
    if rest is None and also is None:
        return False, -1, options
    if rest == masks.Causal("bottom_right") and not parsed.is_causal:
        left = parsed.window[0] if parsed.window else -1
        return True, left, {name: value for name, value in options.items() if name != "window"}
    if mask.anchor != "top_left" or not all(_is_by_position(leaf) for leaf in masks.leaves(mask)):
        raise ValueError(
            "attention(): beside kv_lens, a mask speaks of positions in the cache (Window, Prefix, ...), or is"
            f" masks.Causal('bottom_right'), alone or with a Window; got {mask!r}"
        )
    return False, -1, options


def _is_by_position(leaf: masks.Mask) -> bool:
    return isinstance(leaf, _BY_POSITION) or (isinstance(leaf, masks.Document) and isinstance(leaf.lengths, int))


def _lengths(given: Any, batch: int) -> tuple[int, ...]:
    """How much of each entry is filled; one number is for all. Raises TypeError for what are no whole numbers."""
    is_one = isinstance(given, int) or getattr(given, "ndim", None) == 0
    if not is_one:
        return listed("kv_lens", given)
    return listed("kv_lens", [given.item() if isinstance(given, Tensor) else given]) * batch


def _unread(q: Tensor, k: Tensor, mask: Any, kv_lens: Any, dims: tuple[int, int], left: int, is_corner: bool) -> Tensor:
    """What kv_lens and a mask leave, as a bool or float tensor that is made without reading kv_lens."""
    (b, s), device = dims, q.device
    filled = torch.as_tensor(kv_lens, dtype=torch.int64, device=device).expand(q.shape[b])[:, None, None, None]
    i, j = (torch.arange(x.shape[s], dtype=torch.int64, device=device) for x in (q, k))
    seen = j < filled
    if is_corner:
        at = i[:, None] + filled - q.shape[s]
        seen = seen & (j <= at)
        return seen if left < 0 else seen & (j >= at - left)
    mask = as_structured(mask)
    if isinstance(mask, masks.Mask):
        mask = mask.dense(q.shape[b], q.shape[s], k.shape[s], device)
        mask = mask if mask.dtype is torch.bool else mask.to(torch.promote_types(q.dtype, torch.float32))
    return dense_masks.intersect(mask, seen)


def _gathered(name: str, x: Tensor, pages: Any, layout: str, kv_lens: Any, most: int | None) -> Tensor:
    """A cache of pages, laid out as one of batch entries, as far as `most` keys reach; None: whole.

    Pages are [pages, page size] in the place of [batch, kv_len]. What kv_lens does not reach is not asked of the table.
    """
    check_whole("page_table", pages)
    pages = torch.as_tensor(pages, dtype=torch.int64, device=x.device)
    if layout == "sbhd" or pages.dim() != 2 or x.dim() != 4:
        raise ValueError(
            f"attention(): page_table is [batch, pages], {name} [pages, page size, kv_heads, head_dim] in layout 'bshd' or"
            f" [pages, kv_heads, page size, head_dim] in 'bhsd'; got {tuple(pages.shape)}, {tuple(x.shape)} in {layout!r}"
        )
    x = x.transpose(1, 2) if layout == "bhsd" else x
    if most is not None:
        if most > pages.shape[1] * x.shape[1]:
            raise ValueError(
                f"attention(): kv_lens has {most}, page_table has room for {pages.shape[1]} pages of {x.shape[1]} tokens"
            )
        pages = pages[:, : -(-most // max(1, x.shape[1]))]
    lengths = torch.as_tensor(kv_lens, dtype=torch.int64, device=x.device)
    if lengths.shape in ((), pages.shape[:1]):  # else it is an error, which the whole cache tells
        pages = followed(pages, lengths, x.shape[1])
    if is_readable(pages) and pages.numel() and not 0 <= int(pages.min()) <= int(pages.max()) < x.shape[0]:
        i, j = ((pages < 0) | (pages >= x.shape[0])).nonzero()[0].tolist()
        raise ValueError(
            f"attention(): page_table names pages from 0 to {x.shape[0] - 1}, got {int(pages[i, j])} at [{i}, {j}]"
        )
    x = in_one_piece(x, pages)
    return x.transpose(1, 2) if layout == "bhsd" else x


def _is_dense(mask: Any) -> bool:
    return isinstance(mask, Tensor) and as_structured(mask) is mask
