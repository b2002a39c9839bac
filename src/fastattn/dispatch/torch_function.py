"""F.sdpa for Tensor subclasses and function modes: their handlers are given the function that they compare with.

Stock, the function that a `__torch_function__` is given and the one that torch.nn.functional holds are the same object. Under
patch() they are two, torch's and ours, and each handler knows one of them: one that reads the name off torch when it runs, or
keeps a table that was made under the patch, ours; any other one, torch's own.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function

from fastattn.environment import torch_private

NAME = "scaled_dot_product_attention"
OURS = "_fastattn_patch"  # an attribute of the function that patch() puts in torch's place


def stock_sdpa(
    q: Any,
    k: Any,
    v: Any,
    mask: Any = None,
    dropout_p: Any = 0.0,
    is_causal: Any = False,
    *,
    scale: Any = None,
    enable_gqa: Any = False,
) -> Tensor:
    """F.scaled_dot_product_attention as it was before any patch, for any kind of tensor."""
    given = (q, k, v) if mask is None else (q, k, v, mask)
    held = getattr(F, NAME)
    is_handled = torch_private.has_torch_function(*given) and hasattr(held, OURS)
    if is_handled and any(_knows(handler, kind, held) for handler, kind in _handlers(given)):
        given_options = zip(_DEFAULTS.items(), (mask, dropout_p, is_causal, scale, enable_gqa), strict=True)
        said = {name: x for (name, default), x in given_options if type(x) is not type(default) or x != default}
        return handle_torch_function(held, given, q, k, v, **said)
    return torch_private.sdpa(q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


def _handlers(given: tuple[Any, ...]) -> Iterator[tuple[Any, type]]:
    """The handlers that are asked: of the innermost function mode, and of each argument's type."""
    for kind in dict.fromkeys((*map(type, torch_private.function_modes()[-1:]), *map(type, given))):
        handler = getattr(kind, "__torch_function__", None)
        if handler is not None:
            yield handler, kind


def _knows(handler: Any, kind: type, ours: Any) -> bool:
    """Whether a handler, or a function it calls by name, knows our function: by torch's name, or by a table that holds it.

    torch.fx records calls as they were made, which is by torch's name.
    """
    if kind.__module__.startswith("torch.fx."):
        return True
    first = getattr(handler, "__func__", handler)
    for function in (first, *_named(first, kind)):
        if not isinstance(function, types.FunctionType):
            continue
        if NAME in _names(function.__code__) and function.__globals__.get(NAME) is not torch_private.sdpa:
            return True
        if any(_holds(value, ours) for value in _named(function, kind)):
            return True
    return False


def _named(function: Any, kind: type) -> list[Any]:
    """What the names in a function's code stand for: in its class, around it, or in its module."""
    if not isinstance(function, types.FunctionType):
        return []
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    filled = {name: cell.cell_contents for name, cell in cells if cell != _EMPTY}
    around = {**function.__globals__, **filled}
    names = {*_names(function.__code__), *function.__code__.co_freevars}
    found = [value for name in names for value in (getattr(kind, name, None), around.get(name))]
    return [getattr(value, "__func__", value) for value in found if value is not None]


def _names(code: types.CodeType) -> set[str]:
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*inner)


_EMPTY = types.CellType()  # of a name that has no value yet


def _holds(value: Any, ours: Any) -> bool:
    """Whether it is our function, or a table with it; what else a list holds may not be comparable."""
    if isinstance(value, (dict, set, frozenset)):
        return ours in value
    return value is ours or (isinstance(value, (list, tuple)) and any(item is ours for item in value))
