"""patch(): fastattn.sdpa in the place of F.scaled_dot_product_attention, and out of it again."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from types import FunctionType, ModuleType
from typing import Any, NoReturn, overload

import torch
import torch.nn.functional as F

from fastattn.dispatch import patching_models
from fastattn.dispatch.patching_models import ModelPatch
from fastattn.dispatch.sdpa import sdpa
from fastattn.dispatch.torch_function import NAME, OURS
from fastattn.environment import torch_private
from fastattn.environment.log import log
from fastattn.environment.text import type_name


class Patch:
    """The handle of patch(): `undo()` it, or let a `with` block undo it at its end.

    There is one at a time: patching twice gives the same handle. It patches when it is made, not at `with`. It undoes itself
    only if it is still the one in place; otherwise somebody patched over it, and what they put there stays.
    """

    def __init__(self) -> None:
        self._before = getattr(F, NAME)
        self.rebound: tuple[str, ...] = ()  # "module.name" of what patch(scan=True) found
        self._calls = 0  # of patch(), less the `with` blocks that are over
        self._done = False
        function = _as_torchs()
        setattr(function, OURS, self)
        setattr(F, NAME, function)

    def undo(self) -> bool:
        """Put back what was there before; whether that was done."""
        if not self._is_in_place:
            if not self._done:
                log.warning("F.scaled_dot_product_attention was patched again since; it is left as it is")
            return False
        setattr(F, NAME, patching_models.what_stays(self._before))
        for module, name in self._places():
            if getattr(getattr(module, name, None), OURS, None) is self:
                setattr(module, name, torch_private.sdpa)
        self._done, self.rebound = True, ()
        return True

    def rebind(self) -> None:
        """Put our function where modules hold torch's under a name of their own, and remember these places."""
        for module in list(sys.modules.values()):
            if not isinstance(module, ModuleType) or module.__name__.partition(".")[0] in ("torch", "fastattn"):
                continue
            for name, value in list(vars(module).items()):
                if value is torch_private.sdpa:
                    setattr(module, name, _as_torchs())
                    self.rebound += (f"{module.__name__}.{name}",)

    def _places(self) -> Iterator[tuple[ModuleType, str]]:
        for place in self.rebound:
            module, _, name = place.rpartition(".")
            if module in sys.modules:
                yield sys.modules[module], name

    def __repr__(self) -> str:
        state = "in place" if self._is_in_place else "undone" if self._done else "patched over"
        also = f", also in {', '.join(self.rebound)}" if self.rebound else ""
        return f"<fastattn.patch: {state}{also}>"

    @property
    def _is_in_place(self) -> bool:
        """Whether torch holds its function, also where somebody put it back after it was undone."""
        return getattr(getattr(F, NAME), OURS, None) is self

    def __copy__(self) -> Patch:
        return self

    def __deepcopy__(self, memo: object) -> Patch:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a fastattn.Patch belongs to its process; call fastattn.patch() in the other process")

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exc: object) -> None:
        self._calls -= 1
        if self._calls <= 0:
            self.undo()


@overload
def patch(model: None = None, *, scan: bool = False) -> Patch: ...
@overload
def patch(model: torch.nn.Module, *, scan: bool = False) -> ModelPatch: ...
def patch(model: torch.nn.Module | None = None, *, scan: bool = False) -> Patch | ModelPatch:
    """Put `fastattn.sdpa` in the place of torch.nn.functional.scaled_dot_product_attention, for the process or in one model.

    Without a model it is for the whole process, and takes effect when it is called; `with` only undoes it at the end of the
    block, where nothing patched before it. Code that imported the function by name before keeps the old one, unless
    scan=True: then every module's global name that is torch's function is bound to ours, and `rebound` of the handle lists
    them; undoing puts them back. Names in classes, closures and default arguments keep the old one. Patching twice is
    harmless: it gives the handle that there is.

    With a model (any torch.nn.Module, a part of another one too) F.sdpa is ours while that module, or one inside it, is
    called, in whatever thread, and when activation checkpointing calls one again in a backward inside the block; everywhere
    else it is what it was. Until it is undone the modules are of other classes, subclasses of theirs by the same name.
    Copies and pickles are of the old classes, and not patched. It does not reach names that were imported earlier; methods
    other than a call, such as `model.encode(x)` and `model.forward(x)`, but for the modules that they call; a plain
    function that is checkpointed, when it is called again; modules that are added later; compiled code of torch.jit.

    Raises TypeError where the model is no Module, ValueError where there is one and scan is True.
    """
    if model is not None:
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"patch(): model must be a torch.nn.Module or None, got {type_name(model)}")
        if scan:
            raise ValueError("patch(): scan=True binds names of the whole process, and goes with no model")
        return ModelPatch(model)
    handle = _handle() or Patch()
    handle._calls += 1
    if scan:
        handle.rebind()
    return handle


def unpatch() -> bool:
    """Undo patch(), wherever its handle is; whether anything was undone. Models stay patched until their handles are undone."""
    handle = _handle()
    return handle is not None and handle.undo()


def _handle() -> Patch | None:
    """That of the patch in place, if there is one for the process."""
    found = getattr(getattr(F, NAME), OURS, None)
    return found if hasattr(found, "rebind") else None  # by a name, as autoreload makes Patch another class


@cache
def _as_torchs() -> Any:
    """sdpa under torch's name: with its documentation, for pickle in its place, for torch.jit.script a builtin."""
    found = FunctionType(sdpa.__code__, sdpa.__globals__, NAME, sdpa.__defaults__, sdpa.__closure__)
    found.__kwdefaults__ = dict(sdpa.__kwdefaults__ or {})
    found.__annotations__ = dict(sdpa.__annotations__)
    torch_private.as_torchs(found, NAME, sdpa._torchdynamo_inline)  # type: ignore[attr-defined]
    return found
