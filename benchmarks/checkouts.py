"""`overhead.py --against DIR`: the cost of a hit in this checkout and in another, in processes that alternate."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import checkout_child
from report import plain_table
from rich.console import Console
from rich.table import Table

OURS, THEIRS, AGAIN = "ours", "theirs", "ours again"
Samples = dict[str, list[dict[str, float]]]  # arm -> row -> ns, one of each process


def compare(against: Path, rounds: int, smoke: bool) -> Samples:
    """Run `rounds` processes of each arm, in an order of its own each round."""
    here = Path(__file__).resolve().parents[1]
    arms = {OURS: here, THEIRS: against.resolve(), AGAIN: here}
    found: Samples = {arm: [] for arm in arms}
    order, console = random.Random(0), Console(stderr=True)
    for index in range(rounds):
        for arm in order.sample(list(arms), len(arms)):
            console.print(f"round {index + 1} of {rounds}: {arm} ...", style="dim")
            found[arm].append(child(arms[arm], smoke))
    return found


def child(checkout: Path, smoke: bool) -> dict[str, float]:
    """What one process of a checkout adds to F.sdpa, by row."""
    command = [sys.executable, checkout_child.__file__, *(["--rounds", "20", "--seconds", "0.3"] if smoke else [])]
    with tempfile.TemporaryDirectory() as directory:
        set_up = {"FASTATTN_MODE": "cached", "FASTATTN_CACHE_DIR": directory, "FASTATTN_LOG": "error"}
        environment = {**os.environ, **set_up, "PYTHONPATH": str(checkout / "src")}
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found = json.loads(run.stdout)
    if not Path(found["file"]).resolve().is_relative_to(checkout):
        raise SystemExit(f"{found['file']} is not of {checkout}")
    return found["over_ns"]


def summary(found: Samples) -> list[Mapping[str, float | str]]:
    """A row for each thing measured: medians over the processes, in ns."""
    rows = []
    for name in found[OURS][0]:
        ours, theirs, again = (median(sample[name] for sample in found[arm]) for arm in (OURS, THEIRS, AGAIN))
        rows.append({"name": name, OURS: ours, THEIRS: theirs, "A/A": abs(again - ours)})
    return rows


def table(rows: list[Mapping[str, float | str]], against: Path) -> Table:
    title = f"attention() beyond F.sdpa on the tiny problem, here and in {against}"
    made = plain_table(title)
    made.add_column("", no_wrap=True)
    for heading in (OURS, THEIRS, "difference", "A/A"):
        made.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        ours, theirs, spread = (float(row[name]) for name in (OURS, THEIRS, "A/A"))
        made.add_row(
            str(row["name"]),
            *(f"{ns:,.0f} ns" for ns in (ours, theirs)),
            f"{ours - theirs:+,.0f} ns",
            f"{spread:,.0f} ns",
        )
    return made
