"""Caches that are filled to `kv_lens`, of pages or whole: their filled part, with a mask where entries differ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.environment.text import type_name
from fastattn.problems import masks
from fastattn.problems.call_key import as_structured
from fastattn.problems.call_options import window_sides
from fastattn.problems.layouts import TO_BHSD
from fastattn.problems.rewriting.rewritten import Rewritten, is_readable


def of_cache(
    q: Tensor, k: Tensor, v: Tensor, mask: Any, layout: str, options: dict[str, Any], kv_lens: Any, pages: Any
) -> Rewritten:
    if pages is not None:
        if kv_lens is None:
            raise ValueError("attention(): page_table needs kv_lens: how much of each batch entry's pages is filled")
        k, v = (_gathered(name, x, pages, layout) for name, x in (("k", k), ("v", v)))
    batch, dim = q.shape[TO_BHSD[layout][0]], TO_BHSD[layout][2]
    kv_len = k.shape[dim]
    if not is_readable(kv_lens):
        return Rewritten(q, k, v, _cache_mask(q, k, mask, layout, kv_lens), layout, options, _as_it_is)
    filled = _filled(kv_lens, batch, kv_len)
    most = max(filled, default=0)
    if most < kv_len:
        k, v = k.narrow(dim, 0, most), v.narrow(dim, 0, most)
        mask = mask[..., :most] if _is_dense(mask) and mask.shape[-1] == kv_len else mask
    if len(set(filled)) < 2:
        return Rewritten(q, k, v, mask, layout, options, _as_it_is)
    if _is_dense(mask):
        seen = masks.Filled(filled).dense(batch, 1, most, q.device)
        return Rewritten(q, k, v, _both(mask, seen), layout, options, _as_it_is)
    return Rewritten(q, k, v, *_told(mask, options, filled, q.shape[dim], layout), _as_it_is)  # type: ignore[arg-type]


def _told(
    mask: Any, options: dict[str, Any], filled: tuple[int, ...], q_len: int, layout: str
) -> tuple[masks.Mask, str, dict[str, Any]]:
    mask = as_structured(mask)
    if mask is not None and not isinstance(mask, masks.Mask):
        raise TypeError(f"attention(): beside kv_lens, mask is None, a Tensor or a Mask, got {type_name(mask)}")
    if mask is None or mask.anchor == "top_left":
        return (masks.Filled(filled) if mask is None else mask & masks.Filled(filled)), layout, options
    window = window_sides(options.get("window"))
    if mask != masks.Causal("bottom_right") or options.get("is_causal", False):
        raise ValueError(
            "attention(): beside kv_lens of several lengths, the lower right corner is masks.Causal('bottom_right')"
            f" alone, with window=(left, 0) where it is wanted; got {mask!r}"
        )
    left = window[0] if window else -1
    rest = {name: value for name, value in options.items() if name != "window"}
    return masks.Filled(filled, 0 if q_len == 1 and left < 0 else q_len, left), layout, rest


def _filled(given: Any, batch: int, kv_len: int) -> tuple[int, ...]:
    """How much of each entry is filled. Raises TypeError or ValueError where it cannot be."""
    found = given.tolist() if isinstance(given, Tensor) else given
    found = [found] * batch if type(found) is int else list(found)
    if not all(type(n) is int for n in found):
        raise TypeError(f"attention(): kv_lens must be whole numbers, one for each batch entry, got {given!r}")
    if len(found) != batch or not all(0 <= n <= kv_len for n in found):
        raise ValueError(f"attention(): kv_lens must be {batch} numbers from 0 to kv_len {kv_len}, got {found}")
    return tuple(found)


def _cache_mask(q: Tensor, k: Tensor, mask: Any, layout: str, kv_lens: Any) -> Tensor:
    """What kv_lens and a mask leave as a bool or float tensor, made without reading kv_lens."""
    b, _, s, _ = TO_BHSD[layout]
    kv_lens = torch.as_tensor(kv_lens, dtype=torch.int64, device=q.device).expand(q.shape[b])
    j = torch.arange(k.shape[s], dtype=torch.int64, device=q.device)
    seen = j < kv_lens[:, None, None, None]
    mask = as_structured(mask)
    if isinstance(mask, masks.Causal) and mask.corner == "bottom_right":
        i = torch.arange(q.shape[s], dtype=torch.int64, device=q.device)[:, None]
        return seen & (j <= i + kv_lens[:, None, None, None] - q.shape[s])
    if isinstance(mask, masks.Mask):
        return _both(mask.dense(q.shape[b], q.shape[s], k.shape[s], q.device), seen)
    return seen if mask is None else _both(mask, seen)


def _both(mask: Tensor, seen: Tensor) -> Tensor:
    if mask.dtype is torch.bool:
        return mask & seen
    return torch.where(seen, mask, torch.tensor(float("-inf"), dtype=mask.dtype, device=mask.device))


def _gathered(name: str, x: Tensor, pages: Any, layout: str) -> Tensor:
    """A cache of pages, laid out as one of batch entries. Pages are [pages, page size] in the place of [batch, kv_len]."""
    pages = torch.as_tensor(pages, dtype=torch.int64, device=x.device)
    if layout == "sbhd" or pages.dim() != 2 or x.dim() != 4:
        raise ValueError(
            f"attention(): page_table is [batch, pages], {name} [pages, page size, kv_heads, head_dim] in layout 'bshd' or"
            f" [pages, kv_heads, page size, head_dim] in 'bhsd'; got {tuple(pages.shape)}, {tuple(x.shape)} in {layout!r}"
        )
    x = x.transpose(1, 2) if layout == "bhsd" else x
    x = x[pages].flatten(1, 2)
    return x.transpose(1, 2) if layout == "bhsd" else x


def _as_it_is(found: Any) -> Any:
    return found


def _is_dense(mask: Any) -> bool:
    return isinstance(mask, Tensor) and as_structured(mask) is mask
