"""Other projects' attention tests, stock and with fastattn in the place of F.sdpa: what passes stock must pass patched.

    python benchmarks/foreign_suites.py TEST_FILE... [-k WORDS] [--workers 2] [--results docs/results]

TEST_FILE: of a checkout of pytorch (test/test_transformers.py), transformers, diffusers or timm that goes with what is
installed. Each file runs stock, then patched on an empty store, then patched on the store that is left. Compared by test id.
A test that fails patched is run again alone, stock and patched, before it counts. Exit code 1 where one is left.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import add_results, environment, in_one_line, keep, open_console
from rich.table import Table

BAD = ("failure", "error")


@dataclass(frozen=True)
class Result:
    """One file patched, on a cold or a warm store. worse: ids that pass stock and fail patched, each with its message."""

    file: str
    store: str
    tests: int
    passed_stock: int
    passed_patched: int
    worse: dict[str, str]
    better: list[str]
    calls: int
    served_by: dict[str, int]
    passed_on: dict[str, int]
    tunings: int


def run(
    file: Path, store: Path | None, words: str, workers: int, ids: Sequence[str] = ()
) -> tuple[dict[str, str], Counter[Any]]:
    """({test id: its message where it failed, "" where it passed, "skipped"}, what the calls came to); store None: stock."""
    with tempfile.TemporaryDirectory() as directory:
        report, stats = Path(directory, "report.xml"), Path(directory, "stats")
        stats.mkdir()
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            "-o",
            "addopts=",
        ]
        command += ["-p", "foreign_plugin"] if store else []
        command += ["-k", words] if words else []
        command += ["-n", str(workers)] if workers > 1 and not ids else []
        command += [f"{file.name}::{name}" for name in ids] or [file.name]
        here = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        told = {
            **os.environ,
            "PYTHONPATH": here,
            "FOREIGN_STATS": str(stats),
            "FASTATTN_CACHE_DIR": str(store or directory),
        }
        done = subprocess.run(command, cwd=file.parent, env=told, capture_output=True, text=True, check=False)
        if not report.exists():
            raise SystemExit(f"{file} did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        found = {
            f"{case.get('classname', '').rsplit('.', 1)[-1]}::{case.get('name')}": outcome(case)
            for case in ET.parse(report).iter("testcase")
        }
        calls: Counter[Any] = Counter()
        for path in stats.iterdir():
            one = json.loads(path.read_text(encoding="utf-8"))
            calls.update({"calls": one["calls"], "tunings": one["tunings"]})
            calls.update({("served_by", name): n for name, n in one["served_by"].items()})
            calls.update({("passed_on", why): n for why, n in one["passed_on"].items()})
    return found, calls


def outcome(case: ET.Element) -> str:
    for child in case:
        if child.tag in BAD:
            return (child.get("message") or child.text or "failed").strip().splitlines()[0][:300]
        if child.tag == "skipped":
            return "skipped"
    return ""


def compare(file: Path, store: Path, name: str, stock: dict[str, str], words: str, workers: int) -> Result:
    patched, calls = run(file, store, words, workers)
    suspects = [
        test
        for test, message in stock.items()
        if message == "" and patched.get(test, "did not run") not in ("", "skipped")
    ]
    worse = {}
    for test in suspects:
        alone_stock, alone = (run(file, where, "", 1, [test])[0] for where in (None, store))
        if "" in alone_stock.values() and "" not in alone.values():
            worse[test] = next(iter(alone.values()), patched.get(test, "did not run"))
    better = [test for test, message in patched.items() if message == "" and stock.get(test, "") not in ("", "skipped")]
    kinds = {kind: {key[1]: n for key, n in calls.items() if key[0] == kind} for kind in ("served_by", "passed_on")}
    return Result(
        file.name, name, len(patched), *(sum(m == "" for m in found.values()) for found in (stock, patched)), worse, better,
        calls["calls"], kinds["served_by"], kinds["passed_on"], calls["tunings"],
    )  # fmt: skip


def table(results: Sequence[Result]) -> Table:
    shown = Table(
        title="tests of other projects, stock and patched", title_justify="left", box=None, padding=(0, 1, 0, 0)
    )
    for heading in (
        "",
        "store",
        "tests",
        "pass stock",
        "pass patched",
        "worse",
        "calls",
        "default",
        "another",
        "passed on",
        "tunings",
    ):
        shown.add_column(heading, justify="right" if heading not in ("", "store") else "left")
    for r in results:
        default, passed_on = r.served_by.get("default", 0), sum(r.passed_on.values())
        served = sum(r.served_by.values()) - default
        shares = (f"{100 * n / max(1, r.calls):.1f}%" for n in (default, served, passed_on))
        counts = (r.tests, r.passed_stock, r.passed_patched, len(r.worse), r.calls)
        shown.add_row(r.file, r.store, *map(str, counts), *shares, str(r.tunings))
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="TEST_FILE")
    parser.add_argument("-k", default="", metavar="WORDS", help="tests whose names have these, as pytest's -k")
    parser.add_argument("--workers", type=int, default=2)
    add_results(parser, "foreign.txt and foreign.json")
    args = parser.parse_args()
    console, facts, results = open_console(150), environment(), []
    console.print(in_one_line(facts))
    for file in args.files:
        print(f"{file.name}, stock ...", file=sys.stderr)
        stock, _ = run(file.resolve(), None, args.k, args.workers)
        with tempfile.TemporaryDirectory() as store:
            for name in ("cold", "warm"):
                print(f"{file.name}, patched, {name} ...", file=sys.stderr)
                results.append(compare(file.resolve(), Path(store), name, stock, args.k, args.workers))
    console.print(table(results))
    for r in results:
        for why, count in sorted(r.passed_on.items(), key=lambda item: -item[1])[:8]:
            console.print(f"{r.file}, {r.store}: passed on {count}: {why}")
        for test, message in r.worse.items():
            console.print(f"{r.file}, {r.store}: worse: {test}: {message}", style="red")
    keep(args, facts, "foreign", console, results)
    return 1 if any(r.worse for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
