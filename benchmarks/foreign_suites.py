"""Other projects' attention tests, stock and with fastattn in the place of F.sdpa: what passes stock must pass patched.

    python benchmarks/foreign_suites.py TEST_FILE... [--of "transformers 5.15.0"] [-k WORDS] [--string] [--workers 2]
        [--results docs/results]

TEST_FILE: of one checkout of pytorch (test/test_transformers.py), transformers, diffusers or timm that goes with what is
installed. They run together: stock, then patched on an empty store, then patched on the store that is left. With --string
transformers' own "sdpa" is attn_implementation="fastattn", in two more runs. Compared by test id. A test that fails patched
is run again alone, stock and patched, before it counts. Exit code 1 where one is left. What lies in the folder of --results
of other projects stays there.
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

from machine import add_results, environment, in_one_line, keep, open_console, results_folder
from report import plain_table
from rich.console import Console
from rich.table import Table

BAD = ("failure", "error")
PATCH, STRING = "patch()", "string"


@dataclass(frozen=True)
class Suite:
    """Test files of one project, and which of their tests: words as pytest's -k."""

    of: str
    files: list[Path]
    words: str
    workers: int

    @property
    def root(self) -> Path:
        """The folder that their packages lie in: in a package its neighbours could be taken for libraries of their names."""
        found = Path(os.path.commonpath([file.parent for file in self.files]))
        while (found / "__init__.py").exists():
            found = found.parent
        return found

    def names(self) -> list[str]:
        return [file.relative_to(self.root).as_posix() for file in self.files]


@dataclass(frozen=True)
class Result:
    """A suite served in one way, on a cold or a warm store. worse: ids that pass stock and fail here, each with its message."""

    of: str
    files: list[str]
    words: str
    date: str
    how: str
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


def run(suite: Suite, how: str, store: Path | None, ids: Sequence[str] = ()) -> tuple[dict[str, str], Counter[Any]]:
    """({test id: its message where it failed, "" where it passed, "skipped"}, what the calls came to); how "": stock."""
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
        command += ["-p", "foreign_plugin"] if how else []
        command += ["-k", suite.words] if suite.words and not ids else []
        command += ["-n", str(suite.workers)] if suite.workers > 1 and not ids else []
        command += ids or suite.names()
        told = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
            "FOREIGN_HOW": how,
            "FOREIGN_STATS": str(stats),
            "FASTATTN_CACHE_DIR": str(store or directory),
        }
        done = subprocess.run(command, cwd=suite.root, env=told, capture_output=True, text=True, check=False)
        if not report.exists():
            raise SystemExit(f"{suite.of} did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        found = {test_id(case, suite): outcome(case) for case in ET.parse(report).iter("testcase")}
        calls: Counter[Any] = Counter()
        for path in stats.iterdir():
            one = json.loads(path.read_text(encoding="utf-8"))
            calls.update({"calls": one["calls"], "tunings": one["tunings"]})
            calls.update({("served_by", name): n for name, n in one["served_by"].items()})
            calls.update({("passed_on", why): n for why, n in one["passed_on"].items()})
    return found, calls


def test_id(case: ET.Element, suite: Suite) -> str:
    """As pytest takes it in the suite's root: the report names modules by dots, from wherever the packages begin."""
    dotted = f".{case.get('classname', '')}."
    for name in suite.names():
        _, is_in_it, rest = dotted.partition(f".{name.removesuffix('.py').replace('/', '.')}.")
        if is_in_it:
            return "::".join([name, *filter(None, rest.split(".")), case.get("name", "")])
    return f"{dotted.strip('.')}::{case.get('name')}"


def outcome(case: ET.Element) -> str:
    for child in case:
        if child.tag in BAD:
            return (child.get("message") or child.text or "failed").strip().splitlines()[0][:300]
        if child.tag == "skipped":
            return "skipped"
    return ""


def compare(suite: Suite, how: str, store: Path, state: str, stock: dict[str, str], date: str) -> Result:
    patched, calls = run(suite, how, store)
    suspects = [
        test
        for test, message in stock.items()
        if message == "" and patched.get(test, "did not run") not in ("", "skipped")
    ]
    worse = {}
    for test in suspects:
        alone_stock, alone = (run(suite, way, store, [test])[0] for way in ("", how))
        if "" in alone_stock.values() and "" not in alone.values():
            worse[test] = next(iter(alone.values()), patched.get(test, "did not run"))
    better = [test for test, message in patched.items() if message == "" and stock.get(test, "") not in ("", "skipped")]
    kinds = {kind: {key[1]: n for key, n in calls.items() if key[0] == kind} for kind in ("served_by", "passed_on")}
    return Result(
        suite.of, suite.names(), suite.words, date, how, state, len(patched),
        *(sum(m == "" for m in found.values()) for found in (stock, patched)), worse, better,
        calls["calls"], kinds["served_by"], kinds["passed_on"], calls["tunings"],
    )  # fmt: skip


def kept(folder: Path | None, of: str) -> list[Result]:
    """What lies in the folder of other projects."""
    file = folder / "foreign.json" if folder else None
    if file is None or not file.exists():
        return []
    found = (Result(**row) for row in json.loads(file.read_text(encoding="utf-8"))["results"])
    return [result for result in found if result.of != of]


def table(results: Sequence[Result]) -> Table:
    shown = plain_table("tests of other projects, stock and patched")
    words, numbers = ("", "by", "store"), ("tests", "pass stock", "patched", "worse", "calls", "default", "another")
    for heading in (*words, *numbers, "passed on", "tunings"):
        shown.add_column(heading, justify="left" if heading in words else "right")
    for r in results:
        default, passed_on = r.served_by.get("default", 0), sum(r.passed_on.values())
        served = sum(r.served_by.values()) - default
        shares = (f"{100 * n / max(1, r.calls):.1f}%" for n in (default, served, passed_on))
        counts = (r.tests, r.passed_stock, r.passed_patched, len(r.worse), r.calls)
        files = f"{len(r.files)} files" if len(r.files) > 1 else r.files[0]
        shown.add_row(f"{r.of}: {files}", r.how, r.store, *map(str, counts), *shares, str(r.tunings))
    return shown


def show(console: Console, rows: Sequence[Result]) -> None:
    console.print(table(rows))
    for r in rows:
        where = f"{r.of}, {r.how}, {r.store}"
        for why, count in sorted(r.passed_on.items(), key=lambda item: -item[1])[:8]:
            console.print(f"{where}: passed on {count}: {why}")
        for test, message in r.worse.items():
            console.print(f"{where}: worse: {test}: {message}", style="red", markup=False)
    for r in {r.of: r for r in rows}.values():
        console.print(f"{r.of}, {r.date}: {' '.join(r.files)}{' -k ' + repr(r.words) if r.words else ''}", markup=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="TEST_FILE")
    parser.add_argument("--of", default="", metavar="PROJECT", help="its name, with its version")
    parser.add_argument("-k", default="", metavar="WORDS", help="tests whose names have these, as pytest's -k")
    parser.add_argument("--string", action="store_true", help='transformers: attn_implementation="fastattn" as well')
    parser.add_argument("--workers", type=int, default=2)
    add_results(parser, "foreign.txt and foreign.json")
    args = parser.parse_args()
    console, facts = open_console(150), environment()
    console.print(in_one_line(facts))
    files = [file.resolve() for file in args.files]
    suite = Suite(args.of or files[0].name, files, args.k, args.workers)
    print(f"{suite.of}, stock ...", file=sys.stderr)
    stock, _ = run(suite, "", None)
    if "" not in stock.values():
        raise SystemExit(f"{suite.of}: no test passes stock: {next(filter(None, stock.values()), 'none was found')}")
    results = []
    for how in (PATCH, STRING)[: 1 + args.string]:
        with tempfile.TemporaryDirectory() as store:
            for state in ("cold", "warm"):
                print(f"{suite.of}, {how}, {state} ...", file=sys.stderr)
                results.append(compare(suite, how, Path(store), state, stock, facts["date"]))
    rows = [*kept(results_folder(args, facts), suite.of), *results]
    show(console, rows)
    keep(args, facts, "foreign", console, rows)
    return 1 if any(r.worse for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
