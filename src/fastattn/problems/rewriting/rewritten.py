"""What a packed or cached call comes to, and which lengths may be read for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.environment.text import dtype_name, type_name
from fastattn.problems.masks.values import numbers_in


class Rewritten(NamedTuple):
    """An ordinary call, and what brings its answer back: back(out) or back((out, lse))."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Any
    layout: str
    options: dict[str, Any]
    back: Callable[[Any], Any]


def as_it_is(found: Any) -> Any:
    """The answer needs no change."""
    return found


def refuse(names: set[str], why: str) -> None:
    """Raises ValueError where one of these options was given."""
    if names:
        raise ValueError(f"attention(): {min(names)} {why}")


def listed(name: str, given: Any) -> tuple[int, ...]:
    """Numbers from a tensor, an array or a sequence of one dimension. Raises TypeError that names them."""
    found = numbers_in(given)
    if found is None:
        raise TypeError(f"attention(): {name} must be whole numbers in one dimension, got {type_name(given)} {given!r}")
    return found


def check_whole(name: str, given: Any) -> None:
    """Raises TypeError for a tensor of no whole numbers, without reading one."""
    if isinstance(given, Tensor) and (given.is_floating_point() or given.is_complex() or given.dtype is torch.bool):
        raise TypeError(f"attention(): {name} must be whole numbers, got {dtype_name(given.dtype)}")


def is_on_gpu(lengths: Any) -> bool:
    """Whether they are a plain tensor on a GPU, which a kernel may read there, and nothing is being traced."""
    return type(lengths) is Tensor and lengths.is_cuda and not torch.compiler.is_compiling()


def is_readable(lengths: Any) -> bool:
    """Whether numbers may be looked at: those on a GPU would wait for it, and a graph that is traced has none."""
    if not isinstance(lengths, Tensor):
        return True
    return lengths.device.type == "cpu" and not torch.compiler.is_compiling() and type(lengths) is Tensor
