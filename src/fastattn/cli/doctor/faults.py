"""What makes fastattn not work as it was asked to, each fault with what to do."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastattn.cli.doctor.cache import Layer
from fastattn.cli.doctor.machine import Machine
from fastattn.cli.doctor.rows import Row
from fastattn.dispatch.attention import attention
from fastattn.environment.option_scope import options
from fastattn.environment.settings import VARIABLES, Settings, current_settings, from_environment
from fastattn.environment.text import first_line
from fastattn.verdicts.manifest import read_manifest

ELSEWHERE = "export FASTATTN_CACHE_DIR=DIRECTORY, one that you may write"


@dataclass(frozen=True, slots=True)
class Fault:
    """One of them."""

    what: str
    fix: str


def of_settings() -> tuple[Settings, list[Fault]]:
    """The settings in force, less the variables that cannot be read: each of those is a fault."""
    mine = {name: value for name, value in os.environ.items() if name.startswith("FASTATTN_")}
    known = ", ".join(VARIABLES)
    faults = [
        Fault(f"{name} is no variable of fastattn; there are {known}", f"unset {name}")
        for name in mine if name not in VARIABLES
    ]  # fmt: skip
    try:
        return current_settings(), faults
    except ValueError:
        pass
    while True:
        try:
            return from_environment(mine), faults
        except ValueError as error:
            name = str(error).split()[0].rstrip(":")
            faults.append(Fault(str(error), f"unset {name}"))
            del mine[name]


def of_answers(machine: Machine) -> list[Fault]:
    """One small call on every kind of device, by the kernel that accepts every problem; nothing is tuned for it."""
    try:
        current_settings()
    except ValueError:
        return []  # told already
    faults = []
    for kind in dict.fromkeys(device.type for device in machine.devices):
        try:
            x = torch.linspace(-2, 2, 256, dtype=torch.float32, device=kind).view(1, 2, 16, 8)
            with options.scope(mode="cached"):
                out = attention(x, x, x, kernel="sdpa_math")
            exact = x.double()
            wrong = (out - F.scaled_dot_product_attention(exact, exact, exact)).abs().max().item()
            what = f"its answer is off by {wrong:.1g}" if not wrong < 1e-4 else None
        except Exception as error:
            what = f"{type(error).__name__}: {first_line(error)}"
        if what is not None:
            faults.append(Fault(f"attention() does not work on {kind}: {what}", "reinstall torch, then fastattn"))
    return faults


def of_kernels(settings: Settings, own: Sequence[Row]) -> list[Fault]:
    """Kernels that FASTATTN_KERNELS asks for must be usable."""
    return [
        Fault(f"FASTATTN_KERNELS asks for {row.name}, which is not usable here: {'; '.join(row.why_not)}",
              row.fix or "unset FASTATTN_KERNELS")
        for row in own if row.name in settings.kernels and not row.usable
    ]  # fmt: skip


def of_cache(settings: Settings, layers: Sequence[Layer], why_none: str) -> list[Fault]:
    """A cache is written in mode "auto" alone. why_none: why there are no layers, where there are none."""
    again = "every process will tune again"
    is_written = settings.mode == "auto"
    if not layers and is_written:
        return [Fault(f"{why_none}: {again}", ELSEWHERE)]
    faults = []
    for layer in layers:
        if layer.why_not and layer.is_written and is_written:
            faults.append(Fault(f"{layer.why_not}: {again}", ELSEWHERE))
        elif layer.why_not and not layer.is_written:
            faults.append(Fault(layer.why_not, "take it out of FASTATTN_CACHE_DIR, or make it readable"))
    return faults


def of_manifest(settings: Settings, machine: Machine) -> list[Fault]:
    """A manifest holds for one device: it must be for one of these."""
    if settings.manifest is None:
        return []
    what = ""
    for device in machine.devices:
        try:
            read_manifest(settings.manifest, device)
        except (OSError, ValueError) as error:
            what = str(error)
        else:
            return []
    return [Fault(what, "make it on such a machine: fastattn cache export FILE")]
