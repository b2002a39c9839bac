"""A number that says whether a tensor was changed."""

from __future__ import annotations

import torch
from torch import Tensor

_SAME_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_AT_ONCE = 2**20  # elements


def digest(x: Tensor) -> int:
    """A sum over its bits, each row's weighed by its place: a copy to compare with would take as much memory again.

    Some at a time: torch copies what is not of 64 bits to sum it up. Odd weights, which lose no bit where the sum overflows.
    """
    per_word = 8 // x.element_size()
    is_whole = x.stride(-1) == 1 and not any(n % per_word for n in (x.shape[-1], x.storage_offset(), *x.stride()[:-1]))
    bits = x.detach().view(torch.int64 if is_whole else _SAME_SIZE[x.element_size()])
    longest = max(range(x.ndim - 1), key=lambda dim: x.shape[dim])
    step = max(1, _AT_ONCE * x.shape[longest] // max(1, bits.numel()))
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for part in bits.split(
        step, longest
    ):  # nothing is kept of one: a small piece in the middle of freed memory splits it
        rows = part.sum(-1, dtype=torch.int64).flatten()
        odd = torch.arange(rows.numel(), dtype=torch.int64, device=x.device) * 2 + 1
        total = 31 * total + (rows * odd).sum()
    return int(total)
