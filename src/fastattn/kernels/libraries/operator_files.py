"""Libraries that are a file of torch's operators: it is loaded by its path, and the package around it is not imported."""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fastattn.environment.torch_private import operator_names
from fastattn.kernels.libraries import catalogue
from fastattn.kernels.libraries.catalogue import Library
from fastattn.kernels.libraries.versions import version_numbers


def why_not_this_cpu(library: Library) -> str | None:
    """What its operators ask of a CPU, where this one has nothing of it."""
    if not library.operators or _file_for_this_cpu(library):
        return None
    needed = dict.fromkeys(needed for _, needed in library.operators)
    return f"needs {' or '.join(needed)}, of which this CPU has none"


def _file_for_this_cpu(library: Library) -> str | None:
    here = getattr(torch.cpu, "get_capabilities", dict)()
    return next((f"{file}{library.suffix}" for file, needed in library.operators if here.get(needed)), None)


def what_to_import(library: Library) -> str:
    """A library's module; of a file of operators the path of the one for this CPU. Raises ImportError where there is none."""
    if not library.operators:
        return library.module
    _, version = catalogue.installed_distribution(library) or ("", "")
    if library.follows_torch and version_numbers(version)[:2] != version_numbers(torch.__version__)[:2]:
        raise ImportError(f"its version {version} is built for another torch than {torch.__version__}")
    file = _file_for_this_cpu(library)
    if file is None:
        raise ImportError(why_not_this_cpu(library))
    spec = find_spec(library.module)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder) / file).is_file():
            return str(path)
    raise ImportError(f"its package {library.module} has no file {file}")


def is_imported(library: Library) -> bool:
    """Whether its module is in this process, or its operators are, whoever loaded them."""
    if not library.operators:
        return library.module in sys.modules
    namespace, _, name = library.entry.partition(".")
    return hasattr(getattr(torch.ops, namespace), name)


def what_is_imported() -> list[str]:
    """The modules and files of operators of all libraries in this process, as a child process may import them."""
    found: list[str] = []
    for library in filter(is_imported, catalogue.LIBRARIES):
        with suppress(ImportError):  # somebody else's operators of those names
            found.append(what_to_import(library))
    return found


def load_operators(distribution: str) -> Any:
    """The operators of a library, loaded if nobody has. Raises ImportError where others have their namespace.

    A namespace that is defined twice ends the process.
    """
    library = catalogue.library_of(distribution)
    assert library is not None
    namespace = library.entry.partition(".")[0]
    if (why := why_not_this_cpu(library)) is not None:
        raise ImportError(why)
    if not is_imported(library):
        if any(name.startswith(f"{namespace}::") for name in operator_names()):
            raise ImportError(
                f"another library has torch.ops.{namespace} in this process: to define it twice would end it"
            )
        torch.ops.load_library(what_to_import(library))
    return getattr(torch.ops, namespace)
