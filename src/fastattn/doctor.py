"""What this machine has, what of it fastattn can use, why not the rest, and the command that would fix it: plain data.

Nothing is changed: no verdict is made, no directory is left behind, and a kernel library is imported in a child process
alone. All texts of a Report are redacted: it is meant to be pasted into an issue.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from fastattn import api, cache_health, candidates, config, importing, kernels, libraries, store
from fastattn.cache_health import Layer
from fastattn.config import Config
from fastattn.kernel import Kernel
from fastattn.libraries import Library
from fastattn.machine import Machine, this_machine
from fastattn.redaction import redacted

SCHEMA = 1
NOT_INSTALLED = "not installed"
ELSEWHERE = "export FASTATTN_CACHE_DIR=DIRECTORY, one that you may write"


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


@dataclass(frozen=True, slots=True)
class Fault:
    """What makes fastattn not work as it was asked to, and what to do."""

    what: str
    fix: str


@dataclass(frozen=True, slots=True)
class Report:
    """All that was found."""

    fastattn: str
    machine: Machine
    kernels: tuple[Row, ...]
    libraries: tuple[Row, ...]
    cache: tuple[Layer, ...]
    settings: dict[str, Any]
    faults: tuple[Fault, ...]

    @property
    def works(self) -> bool:
        """Whether attention() works here as it was asked to."""
        return not self.faults

    def to_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {"schema": SCHEMA, "works": self.works, **asdict(self)}


def examine(version: str, timeout_s: float = importing.TIMEOUT_S) -> Report:
    """The Report on this machine and process. timeout_s: what importing one library may take."""
    settings, faults = _settings()
    machine = this_machine()
    with ThreadPoolExecutor(min(4, machine.cpus)) as several:
        rows = tuple(several.map(lambda library: _library(library, machine, timeout_s), libraries.LIBRARIES))
    own = tuple(_kernel(name, machine, settings, rows) for name in kernels.names())
    layers = cache_health.layers(store.of(settings))
    faults += [*_of_answers(machine), *_of_kernels(settings, own)]
    faults += [*_of_cache(settings, layers), *_of_manifest(settings, machine)]
    in_force = {**asdict(settings), "log": logging.getLevelName(config.log.getEffectiveLevel()).lower()}
    return redacted(Report(version, machine, own, rows, layers, in_force, tuple(faults)))


# --- rows


def _library(library: Library, machine: Machine, timeout_s: float) -> Row:
    found = libraries.installed(library)
    why = [] if found else [NOT_INSTALLED]
    why += _of_hardware(*library.sm, machine)
    error = importing.why_not(library.module, library.entry, timeout_s) if found else None
    fix = library.repair if error else None if found else library.install
    if error:
        why.append(error)
    elif found and not library.is_tool and not any(_brings(library, kernel) for kernel in kernels.rows()):
        why.append("fastattn has no kernel of it yet")
    return Row(
        name=library.name,
        found=found is not None,
        version=found[1] if found else None,
        importable=error is None if found else None,
        usable=not why,
        why_not=tuple(why),
        fix=fix,
    )


def _of_hardware(first: int, last: int, machine: Machine) -> list[str]:
    if machine.why_no_cuda is not None:
        return [f"needs CUDA, {machine.why_no_cuda}"]
    here = sorted({device.capability for device in machine.devices if device.type == "cuda"})
    if any(first <= sm <= last for sm in here):
        return []
    return [f"needs sm{first} to sm{last}, this device is {' and '.join(f'sm{sm}' for sm in here)}"]


def _brings(library: Library, kernel: Kernel) -> bool:
    return re.sub(r"[-_.]+", "-", kernel.library).lower() in library.distributions


def _kernel(name: str, machine: Machine, settings: Config, found: Sequence[Row]) -> Row:
    """A kernel is usable if one of its rows is, on one of the devices."""
    rows = [kernel for kernel in kernels.rows() if kernel.name == name]
    why = [_why_not(kernel, machine, found) for kernel in rows]
    reasons = [] if not all(why) else list(dict.fromkeys(reason for reasons in why for reason in reasons))
    if name not in kernels.FALLBACKS and not settings.allows(name):
        reasons.append("FASTATTN_KERNELS leaves it out")
    version = candidates.version(rows[0].library)
    return Row(name, version is not None, version, None, not reasons, tuple(reasons))


def _why_not(kernel: Kernel, machine: Machine, found: Sequence[Row]) -> list[str]:
    devices = [device for device in machine.devices if device.type in kernel.devices]
    if not devices:
        return [f"needs CUDA, {machine.why_no_cuda}" if "cuda" in kernel.devices else f"needs {' or '.join(kernel.devices)}"]
    limits = [need for need in kernel.needs if getattr(need, "field", None) == "capability"]
    refused = [[text for need in limits if (text := need.why_not(None, device))] for device in devices]  # type: ignore[arg-type]
    if all(refused):
        return refused[0]
    if kernel.library == "torch":
        missing = candidates.unavailable(kernel)
        return [missing] if missing else []
    row = next(row for row, library in zip(found, libraries.LIBRARIES, strict=True) if _brings(library, kernel))
    return list(row.why_not)


# --- faults


def _settings() -> tuple[Config, list[Fault]]:
    """The settings in force, less the variables that cannot be read: each of those is a fault."""
    mine = {name: value for name, value in os.environ.items() if name.startswith("FASTATTN_")}
    known = ", ".join(config.VARIABLES)
    faults = [
        Fault(f"{name} is no variable of fastattn; there are {known}", f"unset {name}")
        for name in mine if name not in config.VARIABLES
    ]  # fmt: skip
    try:
        return config.current(), faults
    except ValueError:
        pass
    while True:
        try:
            return config.from_environment(mine), faults
        except ValueError as error:
            name = str(error).split()[0].rstrip(":")
            faults.append(Fault(str(error), f"unset {name}"))
            del mine[name]


def _of_answers(machine: Machine) -> list[Fault]:
    """One small call on every kind of device, by the kernel that accepts every problem; nothing is tuned for it."""
    try:
        config.current()
    except ValueError:
        return []  # told already
    faults = []
    for kind in dict.fromkeys(device.type for device in machine.devices):
        try:
            x = torch.linspace(-2, 2, 256, device=kind).view(1, 2, 16, 8)
            with config.options(mode="cached"):
                out = api.attention(x, x, x, kernel="sdpa_math")
            exact = x.double()
            wrong = (out - F.scaled_dot_product_attention(exact, exact, exact)).abs().max().item()
            what = f"its answer is off by {wrong:.1g}" if not wrong < 1e-4 else None
        except Exception as error:
            what = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if what is not None:
            faults.append(Fault(f"attention() does not work on {kind}: {what}", "reinstall torch, then fastattn"))
    return faults


def _of_kernels(settings: Config, own: Sequence[Row]) -> list[Fault]:
    return [
        Fault(f"FASTATTN_KERNELS asks for {row.name}, which is not usable here: {'; '.join(row.why_not)}",
              row.fix or "unset FASTATTN_KERNELS")
        for row in own if row.name in settings.kernels and not row.usable
    ]  # fmt: skip


def _of_cache(settings: Config, layers: Sequence[Layer]) -> list[Fault]:
    """A cache is written in mode "auto" alone."""
    again = "every process will tune again"
    is_written = settings.mode == "auto"
    if not layers and is_written:
        return [Fault(f"there is no home directory to cache in: {again}", ELSEWHERE)]
    faults = []
    for layer in layers:
        if layer.why_not and layer.is_written and is_written:
            faults.append(Fault(f"{layer.why_not}: {again}", ELSEWHERE))
        elif layer.why_not and not layer.is_written:
            faults.append(Fault(layer.why_not, "take it out of FASTATTN_CACHE_DIR, or make it readable"))
    return faults


def _of_manifest(settings: Config, machine: Machine) -> list[Fault]:
    """A manifest holds for one device: it must be for one of these."""
    if settings.manifest is None:
        return []
    what = ""
    for device in machine.devices:
        try:
            store.read_manifest(settings.manifest, device)
        except (OSError, ValueError) as error:
            what = str(error)
        else:
            return []
    return [Fault(what, "make it on such a machine: fastattn cache export FILE")]
