"""The memory of a KVCache: what may be written to it, where, and how it grows."""

from __future__ import annotations

import torch
from torch import Tensor


def check_tokens(stores: tuple[Tensor | None, Tensor | None], k: Tensor, v: Tensor) -> None:
    """Raises ValueError for tokens that do not go with those before. All are (batch, kv_heads, tokens, head_dim or _v)."""
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"KVCache.append(): k and v must be alike but for head_dim, got {tuple(k.shape)} and {tuple(v.shape)} in bhsd"
        )
    if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
        raise ValueError("KVCache.append(): a cache is for inference: use it under torch.no_grad()")
    for name, store, given in zip("kv", stores, (k, v), strict=True):
        if store is None:
            continue
        before, now = (
            (batch, heads, head_dim, x.dtype, x.device)
            for x in (store, given)
            for batch, heads, _, head_dim in (x.shape,)
        )
        if before != now:
            raise ValueError(
                f"KVCache.append(): {name} has (batch, kv_heads, head_dim, dtype, device) {now}, the cache {before}"
            )


def grown(store: Tensor | None, used: int, like: Tensor, room: int) -> Tensor:
    """The `used` first tokens in memory with room for more. What is not filled is never read."""
    with torch.inference_mode(False):  # it outlives the mode that it was made in
        found = torch.empty(*like.shape[:2], room, like.shape[3], dtype=like.dtype, device=like.device)
    if store is not None:
        found[:, :, :used].copy_(store[:, :, :used])
    return found


def write_tokens(store: Tensor, given: Tensor, filled: list[int], after: list[int]) -> None:
    """The first tokens of each entry, behind what it has. given: [batch, heads, tokens, head_dim]."""
    batch, tokens = len(filled), given.shape[2]
    count = after[0] - filled[0]
    if filled.count(filled[0]) == batch == after.count(after[0]):
        store.narrow(2, filled[0], count).copy_(given if count == tokens else given[:, :, :count])
    elif all(last - first == count for first, last in zip(filled, after, strict=True)):
        begin, entries = (
            torch.tensor(n, dtype=torch.int64, device=store.device)[:, None] for n in (filled, range(batch))
        )
        at = begin + torch.arange(count, dtype=torch.int64, device=store.device)
        store.transpose(1, 2)[entries, at] = given.transpose(1, 2)[:, :count]
    else:
        for entry, (first, last) in enumerate(zip(filled, after, strict=True)):
            store[entry, :, first:last].copy_(given[entry, :, : last - first])
