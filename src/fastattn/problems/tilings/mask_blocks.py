"""A mask with a meaning as squares of the scores: which are hidden, which are seen whole, and what the others hide.

It is what flex_attention's BlockMask is made of. The squares of the last rows and keys reach beyond them and are never whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastattn.environment.remembered import remembered
from fastattn.problems.dense_masks import as_bytes
from fastattn.problems.masks import Mask, runs

SIZE = 128  # rows and keys of a square; flex_attention's own choice
HIDDEN, WHOLE = 0, 1  # the first two patterns


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
    entries, rows = range(batch if mask.is_per_batch() else 1), range(0, q_len, SIZE)
    pattern = torch.full((len(entries), len(rows), -(-kv_len // SIZE)), HIDDEN, dtype=torch.int32, device="cpu")
    hidden = torch.zeros(SIZE, SIZE, dtype=torch.bool, device="cpu")
    patterns = {as_bytes(p): (at, p) for at, p in enumerate((hidden, hidden.logical_not()))}
    for b in entries:
        for row, first in enumerate(rows):
            for square, found in _seen_squares(mask, b, range(first, min(first + SIZE, q_len)), q_len, kv_len):
                at, _ = patterns.setdefault(as_bytes(found), (len(patterns), found))
                pattern[b, row, square] = at
    kept = torch.stack([p for _, p in patterns.values()])
    room = (1 << (len(kept) - 1).bit_length()) - len(kept)  # kernels are compiled for a number of patterns
    with torch.inference_mode(False):
        return MaskBlocks(pattern.to(device, copy=True), pad(kept, (0, 0, 0, 0, 0, room)).to(device), q_len, kv_len)


def _seen_squares(mask: Mask, b: int, rows: range, q_len: int, kv_len: int) -> Iterator[tuple[int, Tensor]]:
    """The squares of some rows in which a key is seen: (which, its pattern)."""
    offset = mask.offset(q_len, kv_len)
    at = range(rows.start + offset, rows.stop + offset)
    p = torch.arange(at.start, at.stop, dtype=torch.int64, device="cpu")
    some, every = mask.runs(b, at, kv_len)
    for square in sorted({n for first, last in some for n in range(first // SIZE, -(-last // SIZE))}):
        keys = range(square * SIZE, min((square + 1) * SIZE, kv_len))
        pattern = torch.zeros(SIZE, SIZE, dtype=torch.bool, device="cpu")
        part = pattern[: len(rows), : len(keys)]
        if runs.holds(every, ((keys.start, keys.stop),)):
            part.fill_(True)
        else:
            j = torch.arange(keys.start, keys.stop, dtype=torch.int64, device="cpu")
            part.copy_(mask.part(range(b, b + 1), p, j, kv_len)[0, 0])
        yield square, pattern
