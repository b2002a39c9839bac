"""Conditions of a guard that ask more of an argument than one name: the mask, the options, where tensors start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastattn.problems import masks
from fastattn.problems.layouts import TO_BHSD


def mask_condition(mask: Any, k: Tensor, layout: str, grows: bool, values: dict[str, Any]) -> str:
    """An equal mask; of those with a meaning one that a verdict takes for the same, at the length that k has. grows: any."""
    if mask is None:
        return "m is None"
    values["MASK"] = mask
    if not hasattr(mask, "like"):
        return "m.__class__ is MASK.__class__ and m == MASK"
    dim = TO_BHSD[layout][2]
    values["LIKE"] = mask.like(k.shape[dim])
    if isinstance(mask, masks.Kept):
        values["MASK"] = values["LIKE"]  # an entry outlives its caches
    same = f"m.like(k.shape[{dim}]) == LIKE"
    return f"m.__class__ is MASK.__class__ and {same if grows else f'(m == MASK or {same})'}"


def option_conditions(kw: Any, values: dict[str, Any]) -> list[str]:
    """Equal options of the same class: 1 == True and a Tensor may equal a float, yet they are other calls."""
    if not kw:
        return ["not kw"]
    items = kw.items() if isinstance(kw, dict) else enumerate(kw)
    if isinstance(kw, dict):  # a list stays the caller's, who may change it
        kw = {name: list(value) if type(value) is list else value for name, value in items}
    values["KW"] = kw
    classes = []
    for name, value in items:
        if value is None or value is True or value is False:
            classes.append(f"kw[{name!r}] is {value}")
        else:
            values[f"C_{name}"] = type(value)
            classes.append(f"kw[{name!r}].__class__ is C_{name}")
    return ["kw == KW", *classes]


def alignment_conditions(tensors: Mapping[str, Tensor]) -> list[str]:
    """q, k and v start at multiples of 16 bytes where these do, and elsewhere where these do; a mask ("m") is not asked."""
    starts = {name: x.data_ptr() % 16 == 0 for name, x in tensors.items() if name != "m"}
    if all(starts.values()):
        return [f"not ({' | '.join(f'{name}.data_ptr()' for name in starts)}) & 15"]
    return [f"{'not ' if is_aligned else ''}{name}.data_ptr() & 15" for name, is_aligned in starts.items()]
