"""patch(model): F.scaled_dot_product_attention is fastattn's while that model runs, and what it was before everywhere else.

One function stands in torch's place for all models. It asks how many modules of patched models run in this thread. They count
themselves: each has a class of its own, made of the one it had, so that copies and pickles of it are of that one.
"""

from __future__ import annotations

import copyreg
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.dispatch.sdpa import sdpa
from fastattn.dispatch.torch_function import NAME, OURS, stock_sdpa
from fastattn.environment import torch_private
from fastattn.environment.log import log


class _Running(threading.local):
    depth = 0  # modules of patched models that run in this thread, one inside the other


class _Place:
    elsewhere: Callable[..., Tensor] = stock_sdpa  # what F.sdpa is outside of the models
    is_installed = False  # somebody may have patched over it since


_running, _place = _Running(), _Place()
_times: weakref.WeakKeyDictionary[torch.nn.Module, int] = weakref.WeakKeyDictionary()  # how often each is patched
_counting: weakref.WeakValueDictionary[type, type] = weakref.WeakValueDictionary()  # class -> the one that counts
_lock = threading.Lock()


class ModelPatch:
    """The handle of patch(model): `undo()` it, or let a `with` block undo it at its end.

    It patches when it is made. Handles of one model, of a part of it, and of patch() may be undone in any order.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._modules = [module for module in model.modules() if module is model or _may_attend(module)]
        self._name = type(model).__name__
        with _lock:
            for module in self._modules:
                _times[module] = _times.get(module, 0) + 1
                if _times[module] == 1:
                    module.__class__ = _class_that_counts(type(module))
            held = getattr(F, NAME)
            is_above = _place.is_installed and held is not torch_private.sdpa  # and calls what it found, which is ours
            if not (hasattr(held, OURS) or is_above):
                _stand_before(held)
                setattr(F, NAME, in_models)

    def undo(self) -> bool:
        """Take the model out, and put back what was there where it was the last one; whether that was done.

        Where somebody patched over it since, what they put there stays; once it is gone, a second undo() puts back.
        """
        with _lock:
            done = bool(self._modules)
            for module in self._modules:
                _times[module] -= 1
                if not _times[module]:
                    del _times[module]
                    _give_back_class(module)
            self._modules = []
            held = getattr(F, NAME)
            if held is in_models and not _times:
                setattr(F, NAME, what_stays(in_models))
                return True
            if held is torch_private.sdpa:
                _place.is_installed = False  # somebody put it back
        if done and _place.is_installed and not hasattr(held, OURS):
            log.warning("F.scaled_dot_product_attention was patched again since; it is left as it is")
        return done

    def __repr__(self) -> str:
        return f"<fastattn.patch: {'in ' + self._name if self._modules else 'undone'}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a handle of fastattn.patch() belongs to its process; call it in the other process")

    def __enter__(self) -> ModelPatch:
        return self

    def __exit__(self, *exc: object) -> None:
        self.undo()


def what_stays(before: Any) -> Any:
    """What belongs in torch's place when patch() is undone, which found `before` there, or the last model is."""
    if _times and before is not in_models:  # the models came later
        _stand_before(before)
    if _times:
        return in_models
    if before is not in_models:
        return before
    _place.is_installed = False
    return torch_private.sdpa if _place.elsewhere is stock_sdpa else _place.elsewhere


def _stand_before(held: Any) -> None:
    _place.elsewhere, _place.is_installed = stock_sdpa if held is torch_private.sdpa else held, True


def _may_attend(module: torch.nn.Module) -> bool:
    """Whether its forward may call F.sdpa, other than by a module inside: no single layer of torch's does."""
    is_torchs = type(module).__module__.startswith("torch.")
    return not isinstance(module, torch.jit.ScriptModule) and not (
        is_torchs and not any(True for _ in module.children())
    )


def _class_that_counts(base: type[torch.nn.Module]) -> type[torch.nn.Module]:
    found = _counting.get(base)
    if found is not None:
        return found

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        _running.depth += 1
        try:
            return base.__call__(self, *args, **kwargs)
        finally:
            _running.depth -= 1

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        function, args, *rest = base.__reduce_ex__(self, protocol)  # type: ignore[misc]
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]  # of which pickle asks that the class be the object's
            function, args = copyreg._reconstructor, (made, object, None)  # type: ignore[attr-defined]
        return (function, tuple(base if arg is made else arg for arg in args), *rest)

    body = {
        "__call__": __call__,
        "__reduce_ex__": __reduce_ex__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        _BASE: base,
    }
    made = types.new_class(base.__name__, (base,), {}, lambda names: names.update(body))
    _counting[base] = made
    return made


_BASE = "_fastattn_base"


def _give_back_class(module: torch.nn.Module) -> None:
    """Unless somebody made a class of the one that counts: it stays, and counts for nothing."""
    if _BASE in vars(type(module)):
        module.__class__ = getattr(type(module), _BASE)


def in_models(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What stands in torch's place."""
    call = sdpa if _running.depth else _place.elsewhere
    return call(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _traced(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What Dynamo inlines instead: the count is guarded."""
    from fastattn.dispatch import compiled

    if _running.depth > 0:
        return compiled.sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    call = torch_private.sdpa if _place.elsewhere is stock_sdpa else _place.elsewhere
    return call(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


setattr(in_models, OURS, _place)
torch_private.as_torchs(in_models, NAME, _traced)
torch_private.run_as_python(in_models)
