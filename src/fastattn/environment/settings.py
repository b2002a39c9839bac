"""Settings: read once from the environment, changed for the process or for a scope by `options` (option_scope.py).

FASTATTN_MODE           auto | cached | off   tune on a miss | serve what is stored, never tune | plain F.sdpa everywhere
FASTATTN_CACHE_DIR      one directory, or several joined by os.pathsep: the first is written, the others are only read
FASTATTN_KERNELS        names joined by commas: the only kernels to consider; "-name" excludes one, "+name" adds one that is
                        considered only where it is named
FASTATTN_MANIFEST       a file made by `fastattn cache export`: a table of verdicts that is only read, the same on every rank
FASTATTN_KNOWN_FAULTS   a file of known faults of kernels, added to those that are shipped (kernels/known_faults.py)
FASTATTN_SAME_KERNEL_IN_TRAINING
                        1 | 0: whether calls without gradients are served by the kernel that serves them in training
FASTATTN_LOG            debug | info | warning | error: the level of the logger "fastattn"

A variable that is empty is not set.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

from fastattn.environment.log import log

MODES = ("auto", "cached", "off")
RUNGS = ("exact", "dtype")
SWITCH = {"": False, "0": False, "1": True}
LEVELS = ("debug", "info", "warning", "error")
VARIABLES = (
    "FASTATTN_MODE", "FASTATTN_CACHE_DIR", "FASTATTN_KERNELS", "FASTATTN_SAME_KERNEL_IN_TRAINING", "FASTATTN_MANIFEST",
    "FASTATTN_KNOWN_FAULTS", "FASTATTN_LOG",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of one moment. `tune_budget` is in seconds for the whole process."""

    mode: str = "auto"
    kernels: tuple[str, ...] = ()
    accuracy: str | float = "exact"
    cache_dir: str | None = None
    tune_budget: float = 120.0
    same_kernel_in_training: bool = False
    manifest: str | None = None
    known_faults: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if not isinstance(self.tune_budget, (int, float)) or self.tune_budget < 0:
            raise ValueError(f"tune_budget must be a number of seconds >= 0, got {self.tune_budget!r}")
        if type(self.same_kernel_in_training) is not bool:
            raise ValueError(f"same_kernel_in_training must be True or False, got {self.same_kernel_in_training!r}")
        check_accuracy(self.accuracy)

    def allows(self, name: str) -> bool:
        """Whether a kernel of that name may be considered."""
        only = [k for k in self.kernels if not k.startswith(("-", "+"))]
        return f"-{name}" not in self.kernels and (not only or name in self.named)

    @property
    def named(self) -> tuple[str, ...]:
        """The kernels that are asked for by name."""
        return tuple(k.removeprefix("+") for k in self.kernels if not k.startswith("-"))

    def naming(self, name: str) -> Settings:
        """The same, and that kernel asked for by name."""
        return replace(self, kernels=(*self.kernels, f"+{name}"))


# --- what a value may be


def check_accuracy(value: Any) -> str | float:
    """A rung: "exact", "dtype", or the largest row error over (P|V|) that the caller accepts."""
    if isinstance(value, str) and value in RUNGS:
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf"):
        return float(value)
    raise ValueError(f"accuracy must be 'exact', 'dtype' or a number above 0, got {value!r}")


def _accept(name: str) -> None:
    """The kernel names are known further up: see on_kernel_name."""


_check_kernel_name: Callable[[str], None] = _accept


def on_kernel_name(check: Callable[[str], None]) -> None:
    """Have `check(name)` raise ValueError for a kernel that does not exist."""
    global _check_kernel_name
    _check_kernel_name = check


def check_kernels(names: str | Iterable[str]) -> tuple[str, ...]:
    """Kernel names; "-" in front excludes, "+" adds. Raises ValueError that lists the known names."""
    parts = names.split(",") if isinstance(names, str) else names
    found = tuple(name.strip() for name in parts if name.strip())
    for name in found:
        _check_kernel_name(name.removeprefix("-").removeprefix("+"))
    return found


def check_cache_dir(path: str | os.PathLike[str]) -> str:
    """Directories joined by os.pathsep, made absolute: they stay where they are when the process changes its directory."""
    parts = os.fspath(path).split(os.pathsep)
    return os.pathsep.join(os.path.abspath(os.path.expanduser(part)) if part else part for part in parts)


def from_environment(environment: Mapping[str, str] = os.environ) -> Settings:
    """The Settings that the FASTATTN_* variables ask for. Raises ValueError that lists the valid values."""
    mode = environment.get("FASTATTN_MODE") or "auto"
    if mode not in MODES:
        raise ValueError(f"FASTATTN_MODE must be one of {', '.join(MODES)}, got {mode!r}")
    level = environment.get("FASTATTN_LOG", "")
    if level:
        if level not in LEVELS:
            raise ValueError(f"FASTATTN_LOG must be one of {', '.join(LEVELS)}, got {level!r}")
        log.setLevel(level.upper())
        if not log.handlers and not logging.getLogger().handlers:
            log.addHandler(logging.StreamHandler())
    try:
        kernels = check_kernels(environment.get("FASTATTN_KERNELS", ""))
    except ValueError as error:
        raise ValueError(f"FASTATTN_KERNELS: {error}") from None
    same_kernel = environment.get("FASTATTN_SAME_KERNEL_IN_TRAINING", "")
    if same_kernel not in SWITCH:
        raise ValueError(f"FASTATTN_SAME_KERNEL_IN_TRAINING must be one of 0, 1, got {same_kernel!r}")
    cache_dir = environment.get("FASTATTN_CACHE_DIR")
    return Settings(
        mode=mode,
        kernels=kernels,
        cache_dir=check_cache_dir(cache_dir) if cache_dir else None,
        same_kernel_in_training=SWITCH[same_kernel],
        manifest=environment.get("FASTATTN_MANIFEST") or None,
        known_faults=environment.get("FASTATTN_KNOWN_FAULTS") or None,
    )


# --- what is in force

_lock = Lock()


def _after_fork() -> None:
    global _lock
    _lock = Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

_from_environment: Settings | None = None  # once it was read
_changes: list[dict[str, Any]] = []  # what options() set for the process, oldest first
_process: Settings | None = None  # both together
_one_of_each: dict[Settings, Settings] = {}  # one object for equal Settings: the hot path compares by identity
_scope: ContextVar[Settings | None] = ContextVar("fastattn_options", default=None)
scoped_settings = _scope.get  # the Settings of the innermost scope, None outside of all: every guard reads it


def current_settings() -> Settings:
    """The Settings in force here: the innermost scope's, else the process's. Equal Settings are one object."""
    return _scope.get() or _process or _combine()


def _combine() -> Settings:
    global _from_environment, _process
    with _lock:
        if _from_environment is None:
            _from_environment = from_environment()
        settings = _from_environment
        for change in _changes:
            settings = replace(settings, **change)
        _process = _one_of_each.setdefault(settings, settings)
        return _process


def change_process(change: dict[str, Any]) -> None:
    """Set options for the whole process. Raises ValueError on a bad value, before anything is set."""
    before = current_settings()
    replace(before, **change)
    with _lock:
        _changes.append(change)
    _tell(before)


def take_back(change: dict[str, Any]) -> None:
    """Undo change_process() of this very object."""
    before = _process
    with _lock:
        _changes[:] = [other for other in _changes if other is not change]
    _tell(before)


def _tell(before: Settings | None) -> None:
    if _combine() is not before:
        for listener in _listeners:
            listener()


def enter_scope(change: dict[str, Any]) -> Token[Settings | None]:
    """Set options for this context alone, until leave_scope()."""
    settings = replace(current_settings(), **change)
    return _scope.set(_one_of_each.setdefault(settings, settings))


def leave_scope(token: Token[Settings | None]) -> None:
    """Put back what held before enter_scope() returned this token."""
    _scope.reset(token)


def reload_settings() -> None:
    """Read the environment again at the next look, and drop what options() set."""
    global _from_environment, _process
    _from_environment = _process = None
    _changes.clear()
    for listener in _listeners:
        listener()


_listeners: list[Callable[[], None]] = []


def on_change(listener: Callable[[], None]) -> None:
    """Call `listener()` when the process's Settings have changed."""
    _listeners.append(listener)
