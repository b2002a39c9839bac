"""What a packed or cached call comes to, and which lengths may be read for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rewritten(NamedTuple):
    """An ordinary call, and what brings its answer back: back(out) or back((out, lse))."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Any
    layout: str
    options: dict[str, Any]
    back: Callable[[Any], Any]


def refuse(names: set[str], why: str) -> None:
    """Raises ValueError where one of these options was given."""
    if names:
        raise ValueError(f"attention(): {min(names)} {why}")


def is_readable(lengths: Any) -> bool:
    """Whether numbers may be looked at: those on a GPU would wait for it, and a graph that is traced has none."""
    if not isinstance(lengths, Tensor):
        return True
    return lengths.device.type == "cpu" and not torch.compiler.is_compiling() and type(lengths) is Tensor
