"""Every file here is a library; `rows_for` lists their kernels in the fixed order that decides between equals."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from fastattn.kernel import Kernel

# Always there, whatever FASTATTN_KERNELS says: what the user would have had, and what accepts every problem.
FALLBACKS = ("default", "sdpa_math")
# The fixed order of torch's own: the default first, what is most often best before what seldom is, the last resort last.
ORDER = (
    "default", "torch_flash", "torch_cudnn", "torch_efficient", "matmul_mixed", "matmul_shifted", "matmul", "torch_math",
    "flex", "sdpa_math",
)  # fmt: skip
_extra: list[Kernel] = []


@cache
def _shipped() -> tuple[Kernel, ...]:
    rows: list[Kernel] = []
    for module in sorted(m.name for m in iter_modules(__path__)):
        rows += import_module(f"{__name__}.{module}").KERNELS
    return tuple(sorted(rows, key=lambda k: (k.library != "torch", ORDER.index(k.name) if k.name in ORDER else len(ORDER))))


def rows() -> tuple[Kernel, ...]:
    """All kernels known, the default first, sdpa_math last of torch's."""
    return (*_shipped(), *_extra)


def rows_for(device_type: str) -> list[Kernel]:
    """The rows to ask on a device: where a name has several rows, the one of that device."""
    named: dict[str, Kernel] = {}
    for kernel in rows():
        if kernel.name not in named or device_type in kernel.devices:
            named[kernel.name] = kernel
    return list(named.values())


def names() -> tuple[str, ...]:
    """Names of all kernels."""
    return tuple(dict.fromkeys(kernel.name for kernel in rows()))

