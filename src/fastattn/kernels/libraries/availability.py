"""Whether a kernel's library is here and can be used: by its metadata, then by importing it, first in a child process."""

from __future__ import annotations

import operator
from functools import cache
from typing import TYPE_CHECKING

import torch

from fastattn.environment import clock
from fastattn.environment.blame import raise_callers
from fastattn.environment.cache_files import cache_layers
from fastattn.environment.settings import current_settings
from fastattn.environment.text import first_line
from fastattn.kernels.kernel import Keeper, Kernel, Run
from fastattn.kernels.libraries import catalogue, tags
from fastattn.kernels.libraries.versions import comparable

if TYPE_CHECKING:
    from fastattn.problems.problem import Problem


def why_absent(kernel: Kernel) -> str | None:
    """Why the kernel's library is not there in a version that works, by its metadata alone; torch's own is looked up whole."""
    found = library_version(kernel.library)
    if found is None:
        return f"package {kernel.library} is not installed"
    first, last = kernel.versions
    if first and is_before(kernel.library, first):
        return f"package {kernel.library} {found} < {first}"
    if last and not is_before(kernel.library, last):
        return f"package {kernel.library} {found} >= {last}, which is not known to work"
    return why_unavailable(kernel) if kernel.library == "torch" else _broken.get(kernel)


_loaded: set[Kernel] = set()
_broken: dict[Kernel, str] = {}  # libraries that were tried, and cannot be used
_import_s = 0.0


def import_seconds() -> float:
    """What importing libraries has taken in this process: no tuning pays for it."""
    return _import_s


@cache
def why_unavailable(kernel: Kernel) -> str | None:
    """Why the library cannot be used: it is imported in a child process first, then here. Seconds, the first time."""
    global _import_s
    why = why_absent(kernel) if kernel.library != "torch" else None
    if why is not None:
        return why
    start = clock.now()
    try:
        why = import_crash_reason(kernel)
        if why is None:
            with torch.inference_mode(False):  # what a library makes on import must serve later calls too
                load_kernel(kernel)
    except Exception as error:
        raise_callers(error, modules_of(kernel))
        why = f"{type(error).__name__}: {first_line(error)}"
    _import_s += clock.seconds_since(start)
    if why is None:
        return None
    _broken[kernel] = f"package {kernel.library} cannot be used: {why}"
    return _broken[kernel]


@cache
def why_unprepared(kernel: Kernel) -> str | None:
    """Why what its first run imports cannot be had. Counted as what importing a library takes."""
    global _import_s
    if kernel.prepare is None:
        return None
    start = clock.now()
    try:
        kernel.prepare()
    except Exception as error:
        raise_callers(error, modules_of(kernel))
        return f"{type(error).__name__}: {first_line(error)}"
    finally:
        _import_s += clock.seconds_since(start)
    return None


def is_built(kernel: Kernel, problem: Problem) -> bool:
    """Whether a kernel that compiles need not, for this problem: it came compiled. Its library is imported to say so.

    That counts as what importing a library takes.
    """
    global _import_s
    if kernel.is_built is None or not tags.came_compiled(kernel.library) or why_unavailable(kernel) is not None:
        return False
    start = clock.now()
    try:
        return kernel.is_built(problem)
    except Exception as error:
        raise_callers(error, modules_of(kernel))
        return False
    finally:
        _import_s += clock.seconds_since(start)


def why_broken(kernel: Kernel) -> str | None:
    """Why its library cannot be used, where that was found out already."""
    return _broken.get(kernel)


def import_crash_reason(kernel: Kernel) -> str | None:
    """Why importing the library would end this process; beside whatever other library is here."""
    library = catalogue.library_of(kernel.library)
    if library is None:
        return None
    from fastattn.kernels.libraries import import_probe, operator_files  # here, as torch's own kernels need neither

    if operator_files.is_imported(library):
        return None
    root, _ = cache_layers(current_settings().cache_dir)
    known = library_version(kernel.library) or ""
    return import_probe.why_import_crashes(
        operator_files.what_to_import(library), library.entry, known, root[0] if root else None,
        operator_files.what_is_imported(), library.after,
    )  # fmt: skip


def forget_libraries() -> None:
    """Look at the installed libraries anew."""
    _broken.clear()
    _loaded.clear()
    for remembered in (
        library_version,
        load_kernel,
        load_form,
        load_keeper,
        why_unavailable,
        why_unprepared,
        tags.distributions_for,
        tags.came_compiled,
    ):
        remembered.cache_clear()


@cache
def load_kernel(kernel: Kernel) -> Run:
    """The kernel's entry point, imported once. Raises whatever the library raises."""
    run = kernel.load()
    _loaded.add(kernel)
    return run


@cache
def load_form(kernel: Kernel, form: str) -> Run:
    """The same of its entry point for "packed" sequences, or for caches: "cached", "paged" where they lie in pages, "kept"."""
    load = {
        "packed": kernel.load_packed, "cached": kernel.load_cached, "paged": kernel.load_paged, "kept": kernel.load_kept,
    }[form]  # fmt: skip
    assert load is not None
    run = load()
    _loaded.add(kernel)
    return run


@cache
def load_keeper(kernel: Kernel) -> Keeper:
    """How a cache is kept for it."""
    assert kernel.load_keeper is not None
    return kernel.load_keeper()


def is_loaded(kernel: Kernel) -> bool:
    """Whether its library was imported in this process; torch's own are."""
    return kernel.library == "torch" or kernel in _loaded


def modules_of(kernel: Kernel) -> tuple[str, ...]:
    """Top-level modules whose exceptions are the kernel's: of its library, its function, and what libraries compile with."""
    library = catalogue.library_of(kernel.library)
    own = getattr(load_kernel(kernel), "__module__", None) if kernel in _loaded else None
    names = (library.module if library is not None else "", own or "")
    return (*COMPILERS, *(name.split(".")[0] for name in names if name))


COMPILERS = ("triton", "cutlass", "cuda", "cudnn", "tvm_ffi")


@cache
def library_version(library: str) -> str | None:
    """Version of the library that is installed, None if there is none. torch's is that of the module which is imported."""
    return torch.__version__ if library == "torch" else catalogue.version_of(library)


def is_before(library: str, version: str) -> bool:
    """Whether the library is installed in an earlier version than that."""
    found = library_version(library)
    return found is not None and operator.lt(*comparable(found, version))


def library_tag(kernel: Kernel) -> str:
    """The kernel's library, its version and what its environment says: what a trial is filed under."""
    return tags.tag_of(kernel.library, library_version(kernel.library))
