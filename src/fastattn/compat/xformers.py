"""memory_efficient_attention() of xformers.ops, and the biases that its users write most.

A bias is a value of fastattn.masks under xFormers' name; a block diagonal one is packed sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fastattn.dispatch.attention import attention
from fastattn.problems import bands, masks


class AttentionBias:
    """What all biases are."""


@dataclass(frozen=True)
class LowerTriangularMask(AttentionBias):
    """The triangle at the top left. device: as xFormers takes it; it holds no tensor."""

    device: Any = None
    corner = "top_left"


@dataclass(frozen=True)
class LowerTriangularFromBottomRightMask(AttentionBias):
    """The triangle at the lower right."""

    corner = "bottom_right"


@dataclass(frozen=True)
class LocalAttentionFromBottomRightMask(AttentionBias):
    """A window around the diagonal at the lower right."""

    window_left: int
    window_right: int


@dataclass(frozen=True)
class BlockDiagonalMask(AttentionBias):
    """Packed sequences, side by side in a batch of one: q_seqlen and kv_seqlen are their lengths.

    batch_sizes: of the tensors of from_tensor_list(), as which split() gives them back.
    """

    q_seqlen: tuple[int, ...]
    kv_seqlen: tuple[int, ...]
    batch_sizes: tuple[int, ...] | None = None
    corner = ""

    @classmethod
    def from_seqlens(
        cls, q_seqlen: Sequence[int], kv_seqlen: Sequence[int] | None = None, *, device: Any = None
    ) -> BlockDiagonalMask:
        """Of these lengths; keys as queries where the second is None."""
        kv_seqlen = q_seqlen if kv_seqlen is None else kv_seqlen
        if len(q_seqlen) != len(kv_seqlen):
            raise ValueError(f"q_seqlen and kv_seqlen must be as many, got {len(q_seqlen)} and {len(kv_seqlen)}")
        return cls(tuple(q_seqlen), tuple(kv_seqlen))

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[Tensor]) -> tuple[BlockDiagonalMask, Tensor]:
        """(the bias, [1, tokens, ...]) of tensors [batch, length, ...]."""
        lengths = [x.shape[1] for x in tensors for _ in range(x.shape[0])]
        bias = replace(cls.from_seqlens(lengths), batch_sizes=tuple(x.shape[0] for x in tensors))
        return bias, torch.cat([x.flatten(0, 1) for x in tensors])[None]

    def split(self, x: Tensor) -> list[Tensor]:
        """[1, length, ...] of each sequence in [1, tokens, ...], or the tensors that from_tensor_list() was given."""
        if self.batch_sizes is None:
            return list(x.split(list(self.q_seqlen), 1))
        lengths = [self.q_seqlen[end - 1] for end in accumulate(self.batch_sizes)]
        parts = x.split([n * length for n, length in zip(self.batch_sizes, lengths, strict=True)], 1)
        return [part[0].unflatten(0, (n, -1)) for part, n in zip(parts, self.batch_sizes, strict=True)]

    def make_causal(self) -> BlockDiagonalCausalMask:
        """The same with a triangle at the top left of each sequence."""
        return BlockDiagonalCausalMask(self.q_seqlen, self.kv_seqlen, self.batch_sizes)

    def make_causal_from_bottomright(self) -> BlockDiagonalCausalFromBottomRightMask:
        """The same with a triangle at the lower right of each sequence."""
        return BlockDiagonalCausalFromBottomRightMask(self.q_seqlen, self.kv_seqlen, self.batch_sizes)


class BlockDiagonalCausalMask(BlockDiagonalMask):
    """Packed sequences with a triangle at the top left of each."""

    corner = "top_left"


class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    """Packed sequences with a triangle at the lower right of each."""

    corner = "bottom_right"


def memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0, scale: float | None = None, *,
    op: Any = None, output_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Attention of [batch, length, heads, head_dim], [batch, length, head_dim] or [batch, length, groups, heads, head_dim].

    attn_bias: None, a float tensor that is added, [batch, heads, q_len, kv_len] or [batch, q_len, kv_len], or one of the biases
    above. Raises TypeError for another, NotImplementedError for an op.
    """
    if op is not None:
        raise NotImplementedError("memory_efficient_attention: op is not chosen here; fastattn chooses by measuring")
    shape = query.shape
    if query.dim() == 3:
        query, key, value = (x[:, :, None] for x in (query, key, value))
        attn_bias = attn_bias[:, None] if isinstance(attn_bias, Tensor) and attn_bias.dim() == 3 else attn_bias
    elif query.dim() == 5:  # heads of a group share a key head, which is repeated by a stride of 0
        query = query.flatten(2, 3)
        key, value = (x[:, :, :, 0] if x.stride(3) == 0 else x.flatten(2, 3) for x in (key, value))
    out = _attend(query, key, value, attn_bias, p, scale)
    out = out.reshape(*shape[:-1], value.shape[-1])
    return out if output_dtype is None else out.to(output_dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Any, p: float, scale: float | None) -> Tensor:
    options: dict[str, Any] = {"dropout_p": p, "scale": scale}
    if isinstance(bias, BlockDiagonalMask):
        if not q.shape[0] == k.shape[0] == v.shape[0] == 1:
            batches = q.shape[0], k.shape[0], v.shape[0]
            raise ValueError(f"memory_efficient_attention: with {type(bias).__name__} the batch is 1, got {batches}")
        ends_q, ends_kv = (
            torch.tensor([0, *accumulate(n)], dtype=torch.int64, device="cpu") for n in (bias.q_seqlen, bias.kv_seqlen)
        )
        same = bias.q_seqlen == bias.kv_seqlen
        options |= {"cu_seqlens_q": ends_q, "cu_seqlens_kv": ends_q if same else ends_kv}
        mask = masks.Causal(bias.corner) if bias.corner else None
        return attention(q[0], k[0], v[0], mask, "thd", **options)[None]
    if isinstance(bias, (LowerTriangularMask, LowerTriangularFromBottomRightMask)):
        return attention(q, k, v, masks.Causal(bias.corner), "bshd", **options)
    if isinstance(bias, LocalAttentionFromBottomRightMask):
        if q.shape[1] == k.shape[1]:
            return attention(q, k, v, masks.Window(bias.window_left, bias.window_right), "bshd", **options)
        at = k.shape[1] - q.shape[1]
        seen = bands.visible(q, q.shape[1], k.shape[1], at - bias.window_left, at + bias.window_right)
        return attention(q, k, v, seen, "bshd", **options)
    if bias is not None and not isinstance(bias, Tensor):
        raise TypeError(f"memory_efficient_attention: attn_bias {type(bias).__name__} is not known to fastattn.compat")
    return attention(q, k, v, bias, "bshd", **options)
