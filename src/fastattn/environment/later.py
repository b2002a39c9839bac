"""Names of a package that are imported when they are first asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any


def imported_later(package: str, files: dict[str, str], modules: dict[str, str] | None = None) -> Callable[[str], Any]:
    """The `__getattr__` of a package: in which module below it each name is; and names that are modules themselves.

    A module that begins with a dot is counted from one package further up, as in Python's own relative imports.
    """

    def get(name: str) -> Any:
        if modules and name in modules:
            value: Any = import_module(f".{modules[name]}", package)
        elif name in files:
            value = getattr(import_module(f".{files[name]}", package), name)
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)  # found at once from now on
        return value

    return get
