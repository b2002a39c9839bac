"""What this machine has, what of it fastattn can use, why not the rest, and the command that would fix it: plain data.

Nothing is changed: no verdict is made, no directory is left behind, and a kernel library is imported in a child process
alone. All texts of a Report are redacted: it is meant to be pasted into an issue.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from fastattn.cli.doctor import cache, faults, rows
from fastattn.cli.doctor.cache import Layer
from fastattn.cli.doctor.faults import Fault
from fastattn.cli.doctor.machine import Machine, this_machine
from fastattn.cli.doctor.redaction import redacted
from fastattn.cli.doctor.rows import Row
from fastattn.environment.log import log
from fastattn.kernels import registry
from fastattn.kernels.libraries import catalogue, import_probe
from fastattn.verdicts import store

SCHEMA = 1


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


def examine(version: str, timeout_s: float = import_probe.TIMEOUT_S) -> Report:
    """The Report on this machine and process. timeout_s: what importing one library may take."""
    settings, found = faults.of_settings()
    machine = this_machine()
    with ThreadPoolExecutor(min(4, machine.cpus)) as several:
        held = tuple(several.map(lambda library: rows.of_library(library, machine, timeout_s), catalogue.LIBRARIES))
    own = tuple(rows.of_kernel(name, machine, settings, held) for name in registry.names())
    verdicts = store.store_of(settings)
    layers = cache.layers(verdicts)
    found += [*faults.of_answers(machine), *faults.of_kernels(settings, own)]
    found += [*faults.of_cache(settings, layers, verdicts.why_none), *faults.of_manifest(settings, machine)]
    in_force = {**asdict(settings), "log": logging.getLevelName(log.getEffectiveLevel()).lower()}
    return redacted(Report(version, machine, own, held, layers, in_force, tuple(found)))
