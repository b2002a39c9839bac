"""Scratch memory of a thread, kept between calls: a fresh block of some MiB costs page faults each time it is touched.

Nothing that a kernel returns, or that is saved for a backward, may lie in it. What all threads keep together is bounded: a
thread that takes more has those forget theirs that used it longest ago. Memory that one of them works in just then goes with
the last tensor that lies in it, so nobody has to wait, or to be asked. What is still worked in is not given out a second time:
a signal handler may call in the middle of a call.
"""

from __future__ import annotations

import itertools
import math
import threading
import weakref

import torch
from torch import Tensor

from fastattn.environment.torch_private import replaces_tensors

KEPT_BYTES = 8 * 2**20  # the most that is kept under one name; what is larger is fresh
ALL_BYTES = 16 * 2**20  # the most that threads keep together, beside what the thread that came last needs for itself

_numbers = itertools.count()
_rooms: dict[int, weakref.ref[_Room]] = {}  # of all threads; one that ended takes its room with it


class _Room:
    """What one thread keeps, the tensors that it gave out, and when it last used that."""

    __slots__ = ("__weakref__", "given", "kept", "last")

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}
        self.given: dict[str, weakref.ref[Tensor]] = {}
        self.last = number = next(_numbers)
        _rooms[number] = weakref.ref(self, lambda _: _rooms.pop(number, None))

    def size(self) -> int:
        """Bytes."""
        return sum(block.numel() for block in list(self.kept.values()))


class _Here(threading.local):
    def __init__(self) -> None:
        self.room = _Room()


_here = _Here()


def scratch(name: str, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised scratch of that shape on the CPU, valid as long as the tensor itself, not a view of it, is held."""
    size = dtype.itemsize * math.prod(shape)
    if size > KEPT_BYTES or torch.compiler.is_compiling() or replaces_tensors():
        return like.new_empty(shape, dtype=dtype)
    room = _here.room
    room.last = next(_numbers)
    given = room.given.get(name)
    is_held = given is not None and given() is not None
    block = None if is_held else room.kept.get(name)  # who holds the old one, a traceback it may be, keeps it
    if block is None or block.numel() < size:
        with torch.inference_mode(False):  # an inference tensor could not be written to outside of that mode
            block = room.kept[name] = torch.empty(size, dtype=torch.uint8, device="cpu")
        _make_others_forget(room)
    found = block[:size].view(dtype).view(shape)
    room.given[name] = weakref.ref(found)
    return found


def _make_others_forget(mine: _Room) -> None:
    """Until all keep no more than ALL_BYTES. Whoever stores last looks last, so no lock is needed for that to hold."""
    others = [room for ref in list(_rooms.values()) if (room := ref()) is not None and room is not mine]
    left = mine.size() + sum(room.size() for room in others)
    for room in sorted(others, key=lambda room: room.last):
        if left <= ALL_BYTES:
            return
        left -= room.size()
        room.kept.clear()
