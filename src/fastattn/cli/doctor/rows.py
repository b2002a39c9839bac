"""A row for each kernel and each kernel library: found, importable, usable here; else why not, and what would fix it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fastattn.cli.doctor.machine import Machine
from fastattn.environment.settings import Settings
from fastattn.environment.text import first_line
from fastattn.kernels import registry
from fastattn.kernels.kernel import Kernel
from fastattn.kernels.libraries import availability, catalogue, import_probe, operator_files
from fastattn.kernels.libraries.catalogue import Library

NOT_INSTALLED = "not installed"


@dataclass(frozen=True, slots=True)
class Row:
    """One kernel, or one kernel library. `importable` is None where nobody tried."""

    name: str
    found: bool
    version: str | None
    importable: bool | None
    usable: bool
    why_not: tuple[str, ...] = ()
    fix: str | None = None


def of_library(library: Library, machine: Machine, timeout_s: float) -> Row:
    """Its row; what is installed is imported in a child process."""
    found = catalogue.installed_distribution(library)
    why = [] if found else [NOT_INSTALLED]
    why += _of_hardware(*library.sm, machine) if library.device == "cuda" else []
    lacking = operator_files.why_not_this_cpu(library)
    why += [lacking] if lacking else []
    error = _why_import_fails(library, timeout_s) if found and not lacking else None
    fix = library.repair if error else None if found else library.install
    major, minor, *_ = machine.torch.split(".")
    if error:
        why.append(error)
    return Row(
        name=library.name,
        found=found is not None,
        version=found[1] if found else None,
        importable=error is None if found and not lacking else None,
        usable=not why,
        why_not=tuple(why),
        fix=fix.replace("{torch}", f"{major}.{minor}") if fix else None,
    )


def _why_import_fails(library: Library, timeout_s: float) -> str | None:
    try:
        what = operator_files.what_to_import(library)
    except ImportError as error:
        return f"ImportError: {first_line(error)}"
    return import_probe.why_import_fails(what, library.entry, timeout_s, library.after)


def _of_hardware(first: int, last: int, machine: Machine) -> list[str]:
    if machine.why_no_cuda is not None:
        return [f"needs CUDA, {machine.why_no_cuda}"]
    here = sorted({device.capability for device in machine.devices if device.type == "cuda"})
    if any(first <= sm <= last for sm in here):
        return []
    return [f"needs sm{first} to sm{last}, this device is {' and '.join(f'sm{sm}' for sm in here)}"]


def _brings(library: Library, kernel: Kernel) -> bool:
    return re.sub(r"[-_.]+", "-", kernel.library).lower() in library.distributions


def of_kernel(name: str, machine: Machine, settings: Settings, found: Sequence[Row]) -> Row:
    """Its row; found: the rows of LIBRARIES. A name is usable if one of its kernels is, on one of the devices."""
    rows = [kernel for kernel in registry.rows() if kernel.name == name]
    why = [_why_not(kernel, machine, found) for kernel in rows]
    reasons = [] if not all(why) else list(dict.fromkeys(reason for reasons in why for reason in reasons))
    if name not in registry.FALLBACKS and not settings.allows(name):
        reasons.append("FASTATTN_KERNELS leaves it out")
    version = availability.library_version(rows[0].library)
    return Row(name, version is not None, version, None, not reasons, tuple(reasons))


def _why_not(kernel: Kernel, machine: Machine, found: Sequence[Row]) -> list[str]:
    devices = [device for device in machine.devices if device.type in kernel.devices]
    if not devices:
        return [
            f"needs CUDA, {machine.why_no_cuda}" if "cuda" in kernel.devices else f"needs {' or '.join(kernel.devices)}"
        ]
    limits = [need for need in kernel.needs if getattr(need, "field", None) == "capability"]
    refused = [[text for need in limits if (text := need.why_not(None, device))] for device in devices]  # type: ignore[arg-type]
    if all(refused):
        return refused[0]
    if kernel.library == "torch":
        missing = availability.why_unavailable(kernel)
        return [missing] if missing else []
    rows = [row for row, library in zip(found, catalogue.LIBRARIES, strict=True) if _brings(library, kernel)]
    if rows:
        return list(rows[0].why_not)
    why = availability.why_absent(kernel)  # a plugin's package
    return [why] if why else ["considered only where it is named"] if kernel.opt_in else []
