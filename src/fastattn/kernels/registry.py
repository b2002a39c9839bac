"""Every file in adapters/ is a library; `rows_for` lists their kernels in the fixed order that decides between equals.

A package elsewhere brings a kernel by an entry point of the group "fastattn.kernels" that names a Kernel. It is listed from
its metadata alone, and imported only where the caller names it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from fastattn.environment.blame import raise_callers
from fastattn.environment.text import unknown_kernel
from fastattn.kernels import adapters
from fastattn.kernels.kernel import Kernel

# Always there, whatever FASTATTN_KERNELS says: what the user would have had, and what accepts every problem.
FALLBACKS = ("default", "sdpa_math")
# The fixed order, and the adapters of each name: torch's own before what was installed, what is most often best before what
# seldom is.
ORDER = {
    "default": "torch_sdpa", "torch_flash": "torch_cuda torch_sdpa", "torch_cudnn": "torch_cuda",
    "torch_efficient": "torch_cuda", "aten_flash": "torch_lower", "aten_efficient": "torch_lower",
    "torch_varlen": "torch_varlen", "matmul_mixed": "matmul", "matmul_shifted": "matmul", "matmul": "matmul",
    "torch_math": "torch_sdpa", "flex": "flex", "sdpa_math": "sdpa_math",
    "flash_attn_3": "flash_attn_3", "fa3_fwd": "flash_attn_3", "flash_attn_4": "flash_attn_4",
    "flex_flash": "flex", "flash_attn_2": "flash_attn_2", "cudnn_frontend": "cudnn_frontend",
    "te_fused": "transformer_engine", "te_flash": "transformer_engine",
    "xformers_flash3": "xformers", "xformers_flash": "xformers", "xformers_cutlass": "xformers",
    "xformers_splitk": "xformers", "mslk_blackwell": "mslk", "mslk_flash3": "mslk", "mslk_flash": "mslk",
    "mslk_cutlass": "mslk", "mslk_splitk": "mslk",
    "flashinfer_single_fa3": "flashinfer", "flashinfer_ragged_fa3": "flashinfer",
    "flashinfer_ragged_cutlass": "flashinfer",
    "flashinfer_single_fa2": "flashinfer", "flashinfer_ragged_fa2": "flashinfer",
    "vllm_cpu": "vllm_cpu", "zentorch": "zentorch",
}  # fmt: skip
GROUP = "fastattn.kernels"
_registered: list[Kernel] = []


@cache
def _shipped() -> tuple[Kernel, ...]:
    rows = _rows_of(sorted(m.name for m in iter_modules(adapters.__path__)))
    places = {name: place for place, name in enumerate(ORDER)}
    return tuple(sorted(rows, key=lambda k: (places.get(k.name, len(places)), k.name)))


@cache
def _shipped_as(name: str) -> tuple[Kernel, ...]:
    """Those of that name, for which a stored verdict has only its own adapters imported."""
    rows = _rows_of(ORDER[name].split()) if name in ORDER else _shipped()
    return tuple(row for row in rows if row.name == name)


def _rows_of(modules: Iterable[str]) -> list[Kernel]:
    return [row for module in modules for row in import_module(f"{adapters.__name__}.{module}").KERNELS]


def register(kernel: Kernel) -> None:
    """Make a kernel of the program's own known to this process, behind those that are shipped."""
    _registered.append(kernel)


def registered() -> tuple[Kernel, ...]:
    """The kernels that register() made known."""
    return tuple(_registered)


def rows() -> tuple[Kernel, ...]:
    """All kernels known, the default first; a plugin's as far as its metadata tells."""
    return (*_shipped(), *plugins(), *_registered)


def rows_for(device_type: str, named: Collection[str] = (), *, with_plugins: bool = False) -> list[Kernel]:
    """The rows to ask on a device: where a name has several rows, the one of that device.

    named: names that the caller gave; the plugins among them are imported. with_plugins: list the other plugins too. Looking
    for plugins takes some milliseconds, so a call does not.
    """
    own = {kernel.name for kernel in (*_shipped(), *_registered)}
    more = plugins() if with_plugins or not own.issuperset(named) else ()
    by_name: dict[str, Kernel] = {}
    for kernel in (*_shipped(), *more, *_registered):
        row = _loaded(kernel) if kernel in more and kernel.name in named else kernel
        if kernel in more and kernel.name not in named and not with_plugins:
            continue
        if row.name not in by_name or device_type in row.devices:
            by_name[row.name] = row
    return list(by_name.values())


def row_for(name: str, device_type: str, named: Collection[str] = ()) -> Kernel | None:
    """The row of that name to ask on a device."""
    own = [*_shipped_as(name), *(kernel for kernel in _registered if kernel.name == name)]
    if own:  # the last one that says it is for the device, as in rows_for
        return next((kernel for kernel in reversed(own) if device_type in kernel.devices), own[0])
    return next((kernel for kernel in rows_for(device_type, named) if kernel.name == name), None)


def names() -> tuple[str, ...]:
    """Names of all kernels, plugins included."""
    return tuple(dict.fromkeys(kernel.name for kernel in rows()))


def is_known(name: str) -> bool:
    """Whether there is a kernel of that name. Plugins are looked for only if it is none of the others."""
    return any(kernel.name == name for kernel in (*_shipped(), *_registered)) or name in names()


def check_name(name: str) -> None:
    """Raises ValueError, with the name that is nearest, where there is no kernel of that name."""
    if not is_known(name):
        raise unknown_kernel(name, names())


def pickled_row(name: str, library: str, devices: tuple[str, ...], summary: str) -> Kernel:
    """This process's row of a kernel that was pickled; where it has none, one that can only be read."""
    here = (row for row in rows() if (row.name, row.library, row.devices) == (name, library, devices))

    def load() -> Any:
        raise ImportError(f"kernel {name!r} is of another process: register it in this process too")

    return next(here, None) or Kernel(name=name, summary=summary, load=load, library=library, devices=devices)


# --- plugins


@cache
def _entry_points() -> dict[str, Any]:
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=GROUP)}


@cache
def plugins() -> tuple[Kernel, ...]:
    """The kernels that other packages bring, as far as their metadata tells."""
    taken = {kernel.name for kernel in _shipped()}
    return tuple(_unloaded(point) for name, point in _entry_points().items() if name not in taken)


def _unloaded(point: Any, error: Exception | None = None) -> Kernel:
    """A row that says no more than the metadata: what it can do is known once it was named."""
    distribution = point.dist.name if point.dist is not None else "?"

    def load() -> Any:
        raise error if error is not None else ImportError("it was not named")

    return Kernel(
        name=point.name, summary=f"plugin {point.value} of {distribution}", load=load, library=distribution,
        devices=("cpu", "cuda"), opt_in=True,
    )  # fmt: skip


@cache
def _loaded(kernel: Kernel) -> Kernel:
    """The plugin's own row; where it cannot be had, one that says why."""
    point = _entry_points()[kernel.name]
    try:
        row = point.load()
        if not isinstance(row, Kernel):
            raise TypeError(f"entry point {point.value} is a {type(row).__name__}, not a fastattn.kernels.Kernel")
    except Exception as error:
        raise_callers(error, [point.value.split(".")[0].split(":")[0]])
        return _unloaded(point, error)
    return row.replace(name=kernel.name, library=kernel.library, opt_in=True)
