"""A mask with a meaning as squares of the scores: which are hidden, which are seen whole, and what the others hide.

It is what flex_attention's BlockMask is made of. The squares of the last rows and keys reach beyond them and are never whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastattn.environment.remembered import remembered
from fastattn.problems.dense_masks import as_bytes
from fastattn.problems.masks import Mask

SIZE = 128  # rows and keys of a square; flex_attention's own choice
HIDDEN, WHOLE = 0, 1  # the first two patterns
AT_ONCE = 64  # squares whose pairs are asked about at once: a mebibyte
Square = tuple[int, int, int]  # (batch entry, row of squares, which in the row)


@dataclass(frozen=True, eq=False)
class MaskBlocks:
    """pattern: of each square, int32 [1 or batch, rows of squares, squares in a row], HIDDEN, WHOLE or another one.

    patterns: bool [patterns, SIZE, SIZE], True where a query sees a key.
    """

    pattern: Tensor
    patterns: Tensor
    q_len: int
    kv_len: int


@remembered(32)  # a model asks for the same one in each layer
def blocks_of_mask(mask: Mask, batch: int, q_len: int, kv_len: int, device: torch.device) -> MaskBlocks:
    """The squares of a mask that adds nothing to the scores. No tensor of queries by keys is made."""
    entries = batch if mask.is_per_batch() else 1
    pattern = torch.full((entries, -(-q_len // SIZE), -(-kv_len // SIZE)), HIDDEN, dtype=torch.int32, device="cpu")
    hidden = torch.zeros(SIZE, SIZE, dtype=torch.bool, device="cpu")
    patterns = {as_bytes(p): (at, p) for at, p in enumerate((hidden, hidden.logical_not()))}
    whole, partly = _seen_squares(mask, entries, q_len, kv_len)
    _put(pattern, whole, [WHOLE] * len(whole))
    for first in range(0, len(partly), AT_ONCE):
        squares = partly[first : first + AT_ONCE]
        shown = _shown(mask, squares, q_len, kv_len)
        _put(pattern, squares, [patterns.setdefault(as_bytes(p), (len(patterns), p))[0] for p in shown])
    kept = torch.stack([p for _, p in patterns.values()])
    room = (1 << (len(kept) - 1).bit_length()) - len(kept)  # kernels are compiled for a number of patterns
    with torch.inference_mode(False):
        return MaskBlocks(pattern.to(device, copy=True), pad(kept, (0, 0, 0, 0, 0, room)).to(device), q_len, kv_len)


def _seen_squares(mask: Mask, entries: int, q_len: int, kv_len: int) -> tuple[list[Square], list[Square]]:
    """The squares that are seen whole, and those of which a part may be seen."""
    offset = mask.offset(q_len, kv_len)
    whole: list[Square] = []
    partly: list[Square] = []
    for b, first in product(range(entries), range(0, q_len, SIZE)):
        rows = range(first, min(first + SIZE, q_len))
        some, every = mask.runs(b, range(rows.start + offset, rows.stop + offset), kv_len)
        full = {n for begin, end in every if len(rows) == SIZE for n in range(-(-begin // SIZE), end // SIZE)}
        for n in sorted({n for begin, end in some for n in range(begin // SIZE, -(-end // SIZE))}):
            (whole if n in full else partly).append((b, first // SIZE, n))
    return whole, partly


def _shown(mask: Mask, squares: list[Square], q_len: int, kv_len: int) -> Tensor:
    """What each square shows: bool [squares, SIZE, SIZE]."""
    # int64, as a mask may hold any number: int32 is faster to compare, and wraps
    b, row, column = torch.tensor(squares, dtype=torch.int64, device="cpu").unbind(1)
    at = torch.arange(SIZE, dtype=torch.int64, device="cpu")
    i, j = (row[:, None] * SIZE + at)[:, :, None], (column[:, None] * SIZE + at)[:, None]
    is_there = (i < q_len) & (j < kv_len)
    i, j = i.where(i < q_len, q_len - 1), j.where(j < kv_len, kv_len - 1)
    return (mask.sees(b[:, None, None], i + mask.offset(q_len, kv_len), j, kv_len) & is_there).contiguous()


def _put(pattern: Tensor, squares: list[Square], values: list[int]) -> None:
    if squares:
        at = torch.tensor(squares, dtype=torch.int64, device="cpu").unbind(1)
        pattern[at] = torch.tensor(values, dtype=torch.int32, device="cpu")
