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
    try:
        bits = x.detach().view(torch.int64)
    except RuntimeError:  # its rows are no whole number of them
        bits = x.detach().view(_SAME_SIZE[x.element_size()])
    longest = max(range(x.ndim - 1), key=lambda dim: x.shape[dim])
    step = max(1, _AT_ONCE * x.shape[longest] // max(1, bits.numel()))
    rows = torch.cat([part.sum(-1, dtype=torch.int64).flatten() for part in bits.split(step, longest)])
    odd = torch.arange(rows.numel(), dtype=torch.int64, device=rows.device) * 2 + 1
    return int((rows * odd).sum())
