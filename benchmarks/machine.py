"""The machine that numbers are taken on: its facts, the name of its results, and whether it does anything else.

python benchmarks/machine.py        # the name of its folder in docs/results
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

BUSY = "something else keeps this machine busy (load average above 0.5): the numbers below say little"
# Words of a CPU's name that tell no machine from another, and clock rates.
NOISE = r"\((r|tm)\)|\b(amd|intel|processor|cpu|\d+-core)\b|@|\b[\d.]+ghz\b"


def environment(on: str = "cpu") -> dict[str, str]:
    """What the numbers were taken on, and with."""
    import fastattn
    from fastattn.environment.device import Device

    device = Device.of(torch.device(on))
    gpu = {"capability": f"sm{device.capability}", "cuda": device.cuda, "cudnn": str(device.cudnn)}
    return {
        "machine": device.name,
        **(gpu if on == "cuda" else {}),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fastattn": fastattn.__version__,
        "system": platform.platform(),
        "load before": " ".join(f"{x:.2f}" for x in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown",
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }


def in_one_line(facts: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def is_busy() -> bool:
    """Whether something else was keeping this machine busy: then the numbers say little."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > 0.5


def open_console(width: int = 120) -> Console:
    """A console as wide as the terminal, `width` elsewhere, that warns where the machine is busy and records what it prints."""
    console = Console(width=None if sys.stdout.isatty() else width, highlight=False, record=True)
    if is_busy():
        console.print(BUSY, style="yellow")
    return console


# --- where results are kept


def slug(name: str) -> str:
    """A folder's name for a CPU as environment() names it: "AMD EPYC 25-17 AVX512 avx2 2cpu" becomes "epyc-25-17-2cpu"."""
    words = name.lower().split()
    family = next((i for i, word in enumerate(words) if re.fullmatch(r"\d+-\d+", word)), len(words) - 1)
    brand = re.sub(NOISE, " ", " ".join(words[:family]))
    cores = [word for word in words if re.fullmatch(r"\d+cpu", word)]
    parts = [brand, *words[family : family + 1], *cores[-1:]]
    return re.sub(r"[^a-z0-9.]+", "-", " ".join(dict.fromkeys(parts))).strip("-")


def add_results(parser: argparse.ArgumentParser, files: str) -> None:
    """The options that results_folder() reads."""
    parser.add_argument(
        "--results", metavar="FOLDER", help=f"write {files} into FOLDER/<machine>, such as docs/results"
    )
    parser.add_argument("--machine", metavar="NAME", help="name of that folder (default: made of the CPU's name)")


def results_folder(args: argparse.Namespace, facts: dict[str, str]) -> Path | None:
    """The folder of this machine's results, made if it is not there; None where none was asked for."""
    if not args.results:
        return None
    folder = Path(args.results) / (args.machine or slug(facts["machine"]))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def keep(args: argparse.Namespace, facts: dict[str, str], name: str, console: Console, results: Sequence[Any]) -> None:
    """Write what was printed, and the results (dataclasses), into this machine's folder; nothing where none was asked for."""
    folder = results_folder(args, facts)
    if folder is None:
        return
    (folder / f"{name}.txt").write_text(console.export_text(), encoding="utf-8")
    rows = {"facts": facts, "results": [asdict(result) for result in results]}
    (folder / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    print(slug(environment()["machine"]))
