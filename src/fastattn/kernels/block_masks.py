"""BlockMasks of flex_attention, from a band and from the squares of a mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.problems.tilings.mask_blocks import HIDDEN, SIZE, WHOLE, MaskBlocks


def band_mask(lower: int | None, upper: int | None, q_len: int, kv_len: int, device: Any, height: int = SIZE) -> Any:
    """The BlockMask of a triangle or a window; None is no limit."""

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
    return block_mask(some[None], every[None], visible, q_len, kv_len, height)


def square_mask(blocks: MaskBlocks, height: int = SIZE) -> Any:
    """The BlockMask of MaskBlocks: in a square that is hidden in part each pair is looked up in the square's pattern."""
    pattern, patterns, of_entries = blocks.pattern, blocks.patterns, int(len(blocks.pattern) > 1)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return patterns[pattern[b * of_entries, i // SIZE, j // SIZE], i % SIZE, j % SIZE]

    return block_mask(pattern != HIDDEN, pattern == WHOLE, visible, blocks.q_len, blocks.kv_len, height)


def block_mask(
    some: Tensor, every: Tensor, visible: Callable[..., Tensor], q_len: int, kv_len: int, height: int
) -> Any:
    """A BlockMask from whether some and all of each square is seen, bool [1 or batch, rows of squares, squares in a row].

    height: queries of one row of its squares, whose other rows are put together.
    """
    from torch.nn.attention.flex_attention import BlockMask

    def listed(squares: Tensor) -> tuple[Tensor, Tensor]:
        """How many there are in each row of squares, and which: they come first."""
        order = squares.int().argsort(dim=-1, descending=True, stable=True)
        return squares.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]

    def together(squares: Tensor) -> Tensor:
        """The rows that are one row then, [.., rows, how many, squares in a row]; the last is repeated where it is alone."""
        rows = torch.cat([squares, *[squares[:, -1:]] * (-squares.shape[1] % (height // SIZE))], 1)
        return rows.unflatten(1, (-1, height // SIZE))

    some, every = together(some).any(2), together(every).all(2)
    lists = (*listed(some & ~every), *listed(every))
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=(height, SIZE), mask_mod=visible, seq_lengths=(q_len, kv_len))
