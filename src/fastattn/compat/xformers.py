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

    def materialize(
        self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor:
        """The bias as a tensor [..., q_len, kv_len] of this shape: 0 where a query sees a key, -inf where not."""
        seen = self._seen(torch.ones(*shape[-2:], dtype=torch.bool, device=device))
        return torch.zeros(tuple(shape), dtype=dtype, device=device).masked_fill(~seen, float("-inf"))

    def _seen(self, pairs: Tensor) -> Tensor:
        """Which of the pairs (q_len, kv_len), all True, see each other."""
        raise NotImplementedError(f"materialize() of {type(self).__name__}")


@dataclass(frozen=True)
class LowerTriangularMask(AttentionBias):
    """The triangle at the top left. device: as xFormers takes it; it holds no tensor."""

    device: Any = None
    corner = "top_left"

    def add_bias(self, bias: Tensor) -> LowerTriangularMaskWithTensorBias:
        """The triangle with a tensor that is added, [batch, heads, q_len, kv_len]."""
        return LowerTriangularMaskWithTensorBias(bias)

    def _seen(self, pairs: Tensor) -> Tensor:
        return pairs.tril()


class LowerTriangularMaskWithTensorBias(AttentionBias):
    """The triangle at the top left, and a tensor that is added."""

    def __init__(self, bias: Tensor) -> None:
        self.bias = bias

    def materialize(
        self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor:
        """As of all biases, with the tensor added."""
        return LowerTriangularMask().materialize(shape, dtype, device) + self.bias.to(device=device, dtype=dtype)


@dataclass(frozen=True)
class LowerTriangularFromBottomRightMask(AttentionBias):
    """The triangle at the lower right."""

    corner = "bottom_right"

    def _seen(self, pairs: Tensor) -> Tensor:
        return pairs.tril(pairs.shape[1] - pairs.shape[0])


@dataclass(frozen=True)
class LocalAttentionFromBottomRightMask(AttentionBias):
    """A window around the diagonal at the lower right."""

    window_left: int
    window_right: int

    def _seen(self, pairs: Tensor) -> Tensor:
        at = pairs.shape[1] - pairs.shape[0]
        return pairs.triu(at - self.window_left).tril(at + self.window_right)


@dataclass
class BlockDiagonalMask(AttentionBias):
    """Packed sequences, side by side in a batch of one: q_seqlen and kv_seqlen are their lengths.

    _batch_sizes: of the tensors of from_tensor_list(), as which split() gives them back. Users of xFormers write it themselves.
    """

    q_seqlen: tuple[int, ...]
    kv_seqlen: tuple[int, ...]
    _batch_sizes: Sequence[int] | None = None
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
        bias = replace(cls.from_seqlens(lengths), _batch_sizes=tuple(x.shape[0] for x in tensors))
        return bias, torch.cat([x.flatten(0, 1) for x in tensors])[None]

    def split(self, x: Tensor) -> list[Tensor]:
        """[1, length, ...] of each sequence in [1, tokens, ...], or the tensors that from_tensor_list() was given."""
        if self._batch_sizes is None:
            return list(x.split(list(self.q_seqlen), 1))
        lengths = [self.q_seqlen[end - 1] for end in accumulate(self._batch_sizes)]
        parts = x.split([n * length for n, length in zip(self._batch_sizes, lengths, strict=True)], 1)
        return [part[0].unflatten(0, (n, -1)) for part, n in zip(parts, self._batch_sizes, strict=True)]

    def _seen(self, pairs: Tensor) -> Tensor:
        if tuple(pairs.shape) != (sum(self.q_seqlen), sum(self.kv_seqlen)):
            wanted = sum(self.q_seqlen), sum(self.kv_seqlen)
            raise ValueError(f"materialize(): shape must end in {wanted}, got {tuple(pairs.shape)}")
        blocks = [
            torch.ones(n, m, dtype=torch.bool, device=pairs.device)
            for n, m in zip(self.q_seqlen, self.kv_seqlen, strict=True)
        ]
        at = [m - n if self.corner == "bottom_right" else 0 for n, m in zip(self.q_seqlen, self.kv_seqlen, strict=True)]
        blocks = [block.tril(to) for block, to in zip(blocks, at, strict=True)] if self.corner else blocks
        return torch.block_diag(*blocks).bool()

    def make_causal(self) -> BlockDiagonalCausalMask:
        """The same with a triangle at the top left of each sequence."""
        return BlockDiagonalCausalMask(self.q_seqlen, self.kv_seqlen, self._batch_sizes)

    def make_causal_from_bottomright(self) -> BlockDiagonalCausalFromBottomRightMask:
        """The same with a triangle at the lower right of each sequence."""
        return BlockDiagonalCausalFromBottomRightMask(self.q_seqlen, self.kv_seqlen, self._batch_sizes)


class BlockDiagonalCausalMask(BlockDiagonalMask):
    """Packed sequences with a triangle at the top left of each."""

    corner = "top_left"


class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    """Packed sequences with a triangle at the lower right of each."""

    corner = "bottom_right"


def unbind(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    """x.unbind(dim)."""
    return x.unbind(dim)


def index_select_cat(sources: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    """Rows of several [rows, n] tensors, one behind the other in one dimension."""
    return torch.cat([x[at].flatten() for x, at in zip(sources, indices, strict=True)])


def scaled_index_add(
    input: Tensor, index: Tensor, source: Tensor, scaling: Tensor | None = None, alpha: float = 1.0
) -> Tensor:
    """input [batch, length, width] with alpha * scaling * source added to the entries of the batch in index."""
    return input.index_add(0, index, source if scaling is None else source * scaling, alpha=alpha)


def memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0, scale: float | None = None, *,
    op: Any = None, output_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Attention of [batch, length, heads, head_dim], [batch, length, head_dim] or [batch, length, groups, heads, head_dim].

    attn_bias: None, a float tensor that is added, [batch, heads, q_len, kv_len], or [batch, q_len, kv_len] for a query of 3
    dimensions, [batch, groups, heads, q_len, kv_len] for one of 5, or one of the biases above. Raises TypeError for another,
    ValueError for a tensor of other dimensions, NotImplementedError for an op.
    """
    if op is not None:
        raise NotImplementedError("memory_efficient_attention: op is not chosen here; fastattn chooses by measuring")
    shape = query.shape
    attn_bias = _with_heads(attn_bias, query.dim())
    if query.dim() == 3:
        query, key, value = (x[:, :, None] for x in (query, key, value))
    elif query.dim() == 5:  # heads of a group share a key head, which is repeated by a stride of 0
        query = query.flatten(2, 3)
        is_repeated = key.stride(3) == value.stride(3) == 0
        key, value = (x[:, :, :, 0] if is_repeated else x.flatten(2, 3) for x in (key, value))
    out = _attend(query, key, value, attn_bias, p, scale)
    out = out.reshape(*shape[:-1], value.shape[-1])
    return out if output_dtype is None else out.to(output_dtype)


def _with_heads(bias: Any, dims: int) -> Any:
    """A tensor's dimensions between the batch and the lengths as one, that of heads."""
    if isinstance(bias, LowerTriangularMaskWithTensorBias):
        return LowerTriangularMaskWithTensorBias(_with_heads(bias.bias, dims))
    if not isinstance(bias, Tensor):
        return bias
    if bias.dim() != dims:
        raise ValueError(
            f"memory_efficient_attention: attn_bias must have {dims} dimensions as query has, got {tuple(bias.shape)}"
        )
    return bias[:, None] if dims == 3 else bias.flatten(1, 2) if dims == 5 else bias


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
    if isinstance(bias, LowerTriangularMaskWithTensorBias):
        return attention(q, k, v, bias.bias, "bshd", is_causal=True, **options)
    if isinstance(bias, LocalAttentionFromBottomRightMask):
        if q.shape[1] == k.shape[1]:
            return attention(q, k, v, masks.Window(bias.window_left, bias.window_right), "bshd", **options)
        at = k.shape[1] - q.shape[1]
        seen = bands.visible(q, q.shape[1], k.shape[1], at - bias.window_left, at + bias.window_right)
        return attention(q, k, v, seen, "bshd", **options)
    if bias is not None and not isinstance(bias, Tensor):
        raise TypeError(f"memory_efficient_attention: attn_bias {type(bias).__name__} is not known to fastattn.compat")
    return attention(q, k, v, bias, "bshd", **options)
