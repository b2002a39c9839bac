"""Whose an exception is that came up through a kernel: the kernel's own, the caller's, or the machine's.

Whatever interrupts a program surfaces in the frame that runs just then: a signal handler that raises, a debugger that quits,
an exception that another thread throws in. None of these says anything about the kernel it passes through.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Collection, Generator
from contextlib import contextmanager
from enum import Enum
from types import CodeType
from typing import Any

from fastattn.environment.errors import is_out_of_memory, is_sticky


class Cause(Enum):
    """Whose fault an exception is."""

    KERNEL = "the kernel"  # nothing speaks against it: another run tells
    CALLER = "the caller"  # it only passed through
    CIRCUMSTANCE = "the circumstances"  # of this one call: how deep the stack is, warnings that are errors
    MEMORY = "memory"  # there is none left
    DEVICE = "the device"  # a CUDA error that every later call meets


RAISED = (Cause.CALLER, Cause.MEMORY, Cause.DEVICE)  # what a caller sees, whatever else could answer
INTERRUPTING = ("bdb", "asyncio", "concurrent", "torch.utils.checkpoint")  # modules whose exceptions steer a program


def cause_of(error: BaseException, own: Collection[str] = ()) -> Cause:
    """Whose an exception is. own: top-level modules of the kernel's library, whose exceptions are the kernel's."""
    if is_sticky(error):
        return Cause.DEVICE
    if is_out_of_memory(error):
        return Cause.MEMORY
    if is_callers(error, own):
        return Cause.CALLER
    if isinstance(error, (RecursionError, Warning)):
        return Cause.CIRCUMSTANCE
    return Cause.KERNEL


def is_callers(error: BaseException, own: Collection[str] = ()) -> bool:
    """Whether an exception only passed through: it ends or interrupts the program, or a handler of the caller's raised it.

    An exception of a type that neither Python, torch, `own` nor any module on its way defines was thrown in from outside.
    """
    if not isinstance(error, Exception):
        return True
    kind = type(error).__module__
    if any(kind == name or kind.startswith(f"{name}.") for name in INTERRUPTING):
        return True
    frames = _frames(error)
    callbacks = _callbacks()
    if any(frame.f_code in callbacks for frame in frames):
        return True
    modules = {_top(frame.f_globals.get("__name__") or "") for frame in frames}
    known = {"torch", "fastattn", *sys.stdlib_module_names, *own, *modules}
    return _top(kind) not in known


def raise_callers(error: BaseException, own: Collection[str] = ()) -> None:
    """Raise an exception again that only passed through; for whoever makes do without what it was about to do."""
    if is_callers(error, own):
        raise error


@contextmanager
def suppress_system_errors() -> Generator[None]:
    """contextlib.suppress(OSError), but for what only passed through: a TimeoutError may be a signal handler's."""
    try:
        yield
    except OSError as error:
        raise_callers(error)


def _frames(error: BaseException) -> list[Any]:
    """The frames it came up through, below whoever caught it."""
    found, at = [], error.__traceback__
    while at is not None:
        found.append(at.tb_frame)
        at = at.tb_next
    return found[1:]


def _callbacks() -> set[CodeType]:
    """The code of what may run between any two lines: signal handlers, trace and profile functions."""
    functions: list[Any] = [sys.gettrace(), sys.getprofile()]
    functions += [signal.getsignal(number) for number in signal.valid_signals()]
    return {code for function in functions if (code := _code_of(function)) is not None}


def _code_of(function: Any) -> CodeType | None:
    function = getattr(function, "func", function)  # functools.partial
    found = getattr(function, "__code__", None) or getattr(getattr(type(function), "__call__", None), "__code__", None)  # noqa: B004
    return found if isinstance(found, CodeType) else None


def _top(module: str) -> str:
    return module.partition(".")[0]
