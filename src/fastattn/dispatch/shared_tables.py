"""Tables of verdicts that several processes share, asked before a private store: rank 0's, and FASTATTN_MANIFEST."""

from __future__ import annotations

from fastattn.environment.device import Device
from fastattn.environment.log import log
from fastattn.environment.settings import Settings
from fastattn.problems.problem import Problem
from fastattn.verdicts.verdict import Verdict

Table = dict[Problem, Verdict]


class SharedTables:
    """The tables of this process. of_ranks: what `fastattn.sync` brought, the same on every rank."""

    def __init__(self) -> None:
        self.of_ranks: Table | None = None
        self.forget_manifests()

    def forget_manifests(self) -> None:
        """Read manifests anew when they are next asked for."""
        self._manifests: dict[tuple[str, Device], Table] = {}

    def all(self, settings: Settings, device: Device, may_read: bool) -> list[Table]:
        """The tables that hold here, the first one first. may_read: a manifest that was not read yet may be opened."""
        found = [self.of_ranks] if self.of_ranks is not None else []
        if settings.manifest is not None:
            name = (settings.manifest, device)
            if name not in self._manifests and may_read:
                from fastattn.verdicts.manifest import read_manifest  # here, as few processes have one

                try:
                    self._manifests[name] = read_manifest(settings.manifest, device)
                except (OSError, ValueError) as error:
                    self._manifests[name] = {}
                    log.warning("%s", error)
            found.append(self._manifests.get(name, {}))
        return found
