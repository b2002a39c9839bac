"""Rows of overhead.py about the start of a process: the import, and the first calls on problems whose verdicts are stored."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from statistics import median
from typing import Any

import start_child
import torch
from comparison import Row
from tiny import many

import fastattn
from fastattn.dispatch.session import session
from fastattn.environment.device import Device
from fastattn.environment.settings import current_settings

PROBLEMS = 16


def start_rows(runs: int, directory: str) -> list[Row]:
    """Each number is the median over `runs` processes."""
    store_verdicts()
    found = [child(directory) for _ in range(runs + 1)][
        1:
    ]  # the first one compiles modules and fills the caches of files
    return [import_row(found), first_call_row(found), further_row(found)]


def store_verdicts() -> None:
    """Tune the problems, and store every verdict as if the machine had been quiet: reading it is what is measured."""
    for problem in many(PROBLEMS):
        fastattn.attention(*problem)
    settings, device = current_settings(), Device.of(torch.device("cpu"))
    for verdict in session.held(settings):
        trials = tuple(t._replace(noise=None, drift=None) for t in verdict.trials)
        session.keep(verdict._replace(trials=trials, cores_missing=0.0), settings, device)


def as_installed() -> dict[str, str]:
    """The environment with nothing set of fastattn; modules are compiled once, as those of an installed package are."""
    not_kept = ("FASTATTN_", "PYTHONDONTWRITEBYTECODE")
    return {name: value for name, value in os.environ.items() if not name.startswith(not_kept)}


def child(directory: str) -> dict[str, Any]:
    """One process with nothing set but the store."""
    environment = as_installed() | {"FASTATTN_CACHE_DIR": directory}
    command = [sys.executable, start_child.__file__, str(PROBLEMS)]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found = json.loads(run.stdout)
    if found["tunings"]:
        raise SystemExit(f"a new process tuned {found['tunings']} problems whose verdicts are stored")
    return found


def import_row(found: list[dict[str, Any]]) -> Row:
    """`import fastattn` after `import torch`, as a share of it; no kernel library may be imported."""
    loaded = sorted({name for f in found for name in f["loaded"]})
    base, hit = (1e3 * median(f[name] for f in found) for name in ("torch_s", "fastattn_s"))
    shares = [100 * f["fastattn_s"] / f["torch_s"] for f in found]
    note = f"imports {', '.join(loaded)}" if loaded else "no kernel library imported"
    name = "import torch -> import fastattn"
    aims: dict[str, Any] = {"aim": 1.0, "absurd": 50.0, "note": note, "share": True}
    return Row(name, "ms", base, hit, math.inf if loaded else median(shares), deviation(shares), **aims)


def first_call_row(found: list[dict[str, Any]]) -> Row:
    """The first call of a process, on a stored problem."""
    base, hit = (1e3 * median(f[name][0] for f in found) for name in ("own_s", "first_s"))
    over = [1e3 * (f["first_s"][0] - f["own_s"][0]) for f in found]
    return Row(
        "a process's first call, stored", "ms", base, hit, median(over), deviation(over), aim=20.0, absurd=1000.0
    )


def further_row(found: list[dict[str, Any]]) -> Row:
    """The first call on each further stored problem."""
    base, hit = (1e3 * median(s for f in found for s in f[name][1:]) for name in ("own_s", "first_s"))
    overs = [[1e3 * (a - b) for a, b in zip(f["first_s"][1:], f["own_s"][1:], strict=True)] for f in found]
    over = [median(one) for one in overs]
    served = ", ".join(sorted({name for f in found for name in f["served_by"]}))
    note = f"worst of {PROBLEMS - 1}: {median(max(one) for one in overs):.2f} ms; {served}"
    name = "each further stored problem"
    return Row(name, "ms", base, hit, median(over), deviation(over), aim=1.0, absurd=100.0, note=note)


def deviation(values: list[float]) -> float:
    """Median distance from the median."""
    return median(abs(x - median(values)) for x in values)
