"""`fastattn.options(...)` sets options for the process, `fastattn.options.scope(...)` for a block of code."""

from __future__ import annotations

import os
import sys
from contextvars import Token
from dataclasses import replace
from opcode import opname
from types import FrameType
from typing import Any, NoReturn

from fastattn.environment.settings import (
    Settings,
    change_process,
    check_accuracy,
    check_cache_dir,
    check_kernels,
    current_settings,
    enter_scope,
    leave_scope,
    take_back,
)
from fastattn.environment.text import unexpected_argument


class _Scope:
    """A block in which options hold, for this thread or task alone; it may be entered again, also inside itself."""

    def __init__(self, change: dict[str, Any]) -> None:
        self._change = change
        self._tokens: list[Token[Settings | None]] = []

    def __enter__(self) -> Settings:
        self._tokens.append(enter_scope(self._change))
        return current_settings()

    def __reduce__(self) -> Any:
        if self._tokens:
            raise TypeError("a scope that is entered holds in this process alone; pickle it before it is entered")
        return _Scope, (self._change,)

    def __exit__(self, *exc: object) -> None:
        leave_scope(self._tokens.pop())


class options(_Scope):
    """Set options for the process: `options(mode="cached")`; or for a block: `with options.scope(mode="cached"): ...`.

    mode: "auto", "cached" or "off". kernels: the only kernel names to consider; "-name" excludes one, "+name" adds one that
    is considered only where it is named. accuracy: the default rung of calls that name none. cache_dir: where verdicts are
    stored. tune_budget: seconds of tuning for the whole process. same_kernel_in_training: calls without gradients are served as
    in training, with the same bits. Raises ValueError on a bad value and lists the valid ones,
    TypeError on another name.

    A scope holds in its own thread or task alone. `with options(...):` is the older spelling of a scope.
    """

    def __init__(
        self,
        *,
        mode: str | None = None,
        kernels: list[str] | tuple[str, ...] | str | None = None,
        accuracy: str | float | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        tune_budget: float | None = None,
        same_kernel_in_training: bool | None = None,
        **unknown: NoReturn,
    ) -> None:
        super().__init__(_checked(mode, kernels, accuracy, cache_dir, tune_budget, same_kernel_in_training, unknown))
        self._is_set = not _begins_a_with_block(sys._getframe(1))
        if self._is_set:
            change_process(self._change)

    def __enter__(self) -> Settings:
        if self._is_set:  # as a statement it looked like a change of the process, and turns out to be a scope
            take_back(self._change)
            self._is_set = False
        return super().__enter__()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "fastattn.options(...) sets options of this process; call fastattn.options(...) in the other process"
        )

    @staticmethod
    def scope(
        *,
        mode: str | None = None,
        kernels: list[str] | tuple[str, ...] | str | None = None,
        accuracy: str | float | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        tune_budget: float | None = None,
        same_kernel_in_training: bool | None = None,
        **unknown: NoReturn,
    ) -> _Scope:
        """The same options for a `with` block, in this thread or task alone."""
        return _Scope(_checked(mode, kernels, accuracy, cache_dir, tune_budget, same_kernel_in_training, unknown))


def _checked(
    mode: str | None,
    kernels: Any,
    accuracy: Any,
    cache_dir: Any,
    tune_budget: float | None,
    same_kernel_in_training: bool | None,
    unknown: dict[str, Any],
) -> dict[str, Any]:
    """The options that were given. Raises ValueError or TypeError."""
    given = {
        "mode": mode,
        "kernels": None if kernels is None else check_kernels(kernels),
        "accuracy": None if accuracy is None else check_accuracy(accuracy),
        "cache_dir": None if cache_dir is None else check_cache_dir(cache_dir),
        "tune_budget": tune_budget,
        "same_kernel_in_training": same_kernel_in_training,
    }
    for name in unknown:
        raise unexpected_argument("fastattn.options", name, given)
    change = {name: value for name, value in given.items() if value is not None}
    replace(current_settings(), **change)
    return change


def _begins_a_with_block(frame: FrameType) -> bool:
    """Whether the call that a frame is making stands in a `with` statement: then its result is entered at once.

    Without this look `with options(...)` would set the options for every thread until `__enter__` takes them back.
    """
    code, at = frame.f_code.co_code, frame.f_lasti + 2
    while at + 2 < len(code) and opname[code[at]] in ("CACHE", "COPY"):
        at += 2
    return at < len(code) and opname[code[at]] in ("SETUP_WITH", "BEFORE_WITH", "LOAD_SPECIAL")
