"""Scratch memory of a thread, kept between calls: a fresh block of some MiB costs page faults each time it is touched.

Nothing that a kernel returns, or that is saved for a backward, may lie in it.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

KEPT_BYTES = 8 * 2**20  # the most that is kept under one name; what is larger is fresh


class _Rooms(threading.local):
    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}


_rooms = _Rooms()


def scratch(name: str, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised scratch of that shape on the CPU, valid until the same name is asked for again on this thread."""
    size = dtype.itemsize * math.prod(shape)
    if size > KEPT_BYTES or torch.compiler.is_compiling():
        return like.new_empty(shape, dtype=dtype)
    kept = _rooms.kept.get(name)
    if kept is None or kept.numel() < size:
        with torch.inference_mode(False):  # an inference tensor could not be written to outside of that mode
            kept = _rooms.kept[name] = torch.empty(size, dtype=torch.uint8, device="cpu")
    return kept[:size].view(dtype).view(shape)
