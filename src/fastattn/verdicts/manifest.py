"""A manifest: many verdicts in one file, with the device they hold for; it is only read, the same on every rank."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from fastattn.environment.device import Device
from fastattn.problems.problem import Problem
from fastattn.verdicts.store import described, refuse_constant
from fastattn.verdicts.verdict import SCHEMA, Verdict


def export_manifest(verdicts: Iterable[Verdict], device: Device) -> str:
    """One JSON text with many verdicts and the device they hold for."""
    found = [verdict.to_json() for verdict in verdicts]
    return json.dumps({"schema": SCHEMA, "environment": described(device), "verdicts": found}, indent=1)


def read_manifest(path: str | os.PathLike[str], device: Device) -> dict[Problem, Verdict]:
    """The verdicts of a manifest. Raises OSError or ValueError, naming the file, if it cannot serve here."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse_constant)
        found = [Verdict.from_json(v) for v in data["verdicts"]]
        made_for = data["environment"]["slug"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"FASTATTN_MANIFEST {path}: not a manifest ({type(error).__name__}: {error})") from None
    if made_for != device.slug:
        raise ValueError(f"FASTATTN_MANIFEST {path}: made for {made_for}, this is {device.slug}")
    return {v.problem: v for v in found}
