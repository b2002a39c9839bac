"""Settings: read once from the environment, replaced whole by `options()`, scoped by contextvars.

FASTATTN_MODE        auto | cached | off   tune on a miss | serve what is stored, never tune | plain F.sdpa everywhere
FASTATTN_CACHE_DIR   one directory, or several joined by os.pathsep: the first is written, the others are only read
FASTATTN_KERNELS     names joined by commas: the only kernels to consider; "-name" excludes one, "+name" adds one that is
                     considered only where it is named
FASTATTN_MANIFEST    a file made by `fastattn cache export`: a table of verdicts that is only read, the same on every rank
FASTATTN_KNOWN_FAULTS      a file of known faults of kernels, added to those that are shipped (fastattn.kernels.known_faults)
FASTATTN_LOG         debug | info | warning | error: the level of the logger "fastattn"

A variable that is empty is not set.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, NoReturn

from fastattn.environment.log import log
from fastattn.environment.text import unexpected_argument, unknown_kernel

MODES = ("auto", "cached", "off")
RUNGS = ("exact", "dtype")
LEVELS = ("debug", "info", "warning", "error")
VARIABLES = (
    "FASTATTN_MODE",
    "FASTATTN_CACHE_DIR",
    "FASTATTN_KERNELS",
    "FASTATTN_MANIFEST",
    "FASTATTN_KNOWN_FAULTS",
    "FASTATTN_LOG",
)


def kernel_names() -> tuple[str, ...]:
    """Names of all kernels; fastattn.kernels puts its own function here, as imports only point down."""
    return ()


def check_accuracy(value: Any) -> str | float:
    """A rung: "exact", "dtype", or the largest row error over (P|V|) that the caller accepts."""
    if isinstance(value, str) and value in RUNGS:
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf"):
        return float(value)
    raise ValueError(f"accuracy must be 'exact', 'dtype' or a number above 0, got {value!r}")


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of one moment. `tune_budget` is in seconds for the whole process."""

    mode: str = "auto"
    kernels: tuple[str, ...] = ()
    accuracy: str | float = "exact"
    cache_dir: str | None = None
    tune_budget: float = 120.0
    manifest: str | None = None
    known_faults: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if not isinstance(self.tune_budget, (int, float)) or self.tune_budget < 0:
            raise ValueError(f"tune_budget must be a number of seconds >= 0, got {self.tune_budget!r}")
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


def from_environment(environment: Mapping[str, str] = os.environ) -> Settings:
    """The Config that the FASTATTN_* variables ask for. Raises ValueError that lists the valid values."""
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
    return Settings(
        mode=mode,
        kernels=kernels,
        cache_dir=environment.get("FASTATTN_CACHE_DIR") or None,
        manifest=environment.get("FASTATTN_MANIFEST") or None,
        known_faults=environment.get("FASTATTN_KNOWN_FAULTS") or None,
    )


def check_kernels(names: str | list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """Kernel names; "-" in front excludes, "+" adds. Raises ValueError that lists the known names."""
    parts = names.split(",") if isinstance(names, str) else names
    found = tuple(name.strip() for name in parts if name.strip())
    known = kernel_names()
    for name in found:
        bare = name.removeprefix("-").removeprefix("+")
        if bare not in known:
            raise unknown_kernel(bare, known)
    return found


_lock = Lock()


def _after_fork() -> None:
    global _lock
    _lock = Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

_base: list[Settings] = []  # what the environment says, once it was read
_changes: list[dict[str, Any]] = []  # what options() set for the process, oldest first
_process: Settings | None = None  # both together
_known: dict[Settings, Settings] = {}  # one object for equal Configs, so that the hot path compares by identity
_scoped: ContextVar[Settings | None] = ContextVar("fastattn_options", default=None)
scopes_used = False  # once True, every hot-path entry compares the Config it was made under


def current_settings() -> Settings:
    """The Config in force here: the innermost scope, else the process's. Equal Configs are one object."""
    return _scoped.get() or _process or _fold()


def _fold() -> Settings:
    global _process
    with _lock:
        if not _base:
            _base.append(from_environment())
        config = _base[0]
        for change in _changes:
            config = replace(config, **change)
        _process = _known.setdefault(config, config)
        return _process


def reload_settings() -> None:
    """Read the environment again at the next look, and drop what options() set."""
    global _process
    _base.clear()
    _changes.clear()
    _process = None
    forget_calls()


class options:
    """Set options for the process, or for a `with` block (this thread or task only).

    `options(mode="cached")` sets; `with options(kernels=["torch_flash"]): ...` scopes and restores.
    mode: "auto", "cached" or "off". kernels: the only kernel names to consider; "-name" excludes one,
    "+name" adds one that is considered only where it is named. accuracy: the
    default rung of calls that name none. cache_dir: where verdicts are stored. tune_budget: seconds of tuning for the
    whole process. Raises ValueError on a bad value and lists the valid ones, TypeError on another name.
    """

    def __init__(
        self,
        *,
        mode: str | None = None,
        kernels: list[str] | tuple[str, ...] | str | None = None,
        accuracy: str | float | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        tune_budget: float | None = None,
        **unknown: NoReturn,
    ) -> None:
        given = {
            "mode": mode,
            "kernels": None if kernels is None else check_kernels(kernels),
            "accuracy": None if accuracy is None else check_accuracy(accuracy),
            "cache_dir": None if cache_dir is None else os.fspath(cache_dir),
            "tune_budget": tune_budget,
        }
        for name in unknown:
            raise unexpected_argument("fastattn.options", name, given)
        self._change = {name: value for name, value in given.items() if value is not None}
        replace(current_settings(), **self._change)  # raises on a bad value before anything is set
        self._tokens: list[Token[Settings | None]] = []
        _changes.append(self._change)
        _set_process()

    def __enter__(self) -> Settings:
        # It turns out to be a scope: what __init__ set for the process is taken back, and set for this context only.
        global scopes_used
        if not self._tokens:
            with _lock:
                _changes[:] = [change for change in _changes if change is not self._change]
            _set_process()
        if not scopes_used:
            scopes_used = True
            forget_calls()  # entries made so far do not compare the Config
        config = replace(current_settings(), **self._change)
        config = _known.setdefault(config, config)
        self._tokens.append(_scoped.set(config))
        return config

    def __exit__(self, *exc: object) -> None:
        _scoped.reset(self._tokens.pop())


def _set_process() -> None:
    before = _process
    if _fold() is not before:
        forget_calls()


_listeners: list[Callable[[], None]] = []


def on_forget(listener: Callable[[], None]) -> None:
    """Call `listener()` when published Calls are no longer to be trusted."""
    _listeners.append(listener)


def forget_calls() -> None:
    """Drop every published Call; verdicts stay."""
    for listener in _listeners:
        listener()
