"""Every kernel this machine can use: is it right over a grid, and how fast over gpu_workload.toml.

    python benchmarks/gpu_check.py [verify] [special] [workload] [--only REGEX] [--results docs/results]

verify    each kernel, with all its conversions, against float64 by the gate's probes, forward and backward
special   offsets beyond 2^31, more than 65,535 heads, misaligned views, a CUDA graph: through attention() and each kernel
workload  F.sdpa, every pinned candidate and attention(), interleaved, as benchmarks/cpu.py does it

Each kernel, and the workload, runs in a process of its own, so that a crash costs a row. Without a name: all three.
`--device cpu --smoke` runs the same on a CPU. Exit code 1 where a kernel raised, ended its process, or attention() was wrong; a
refusal is no fault, nor is a candidate over its error budget, which the gate keeps from every caller ("over").
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cpu
import gpu_child
import report
import torch
from gpu_child import MARK, Found, workload
from report import Grid
from rich.console import Console
from rounds import environment

from fastattn import candidates, kernels
from fastattn.device import Device

PARTS = ("verify", "special", "workload")
CHILD_S = 420.0


def ask(part: str, name: str, args: argparse.Namespace, extra: tuple[str, ...] = ()) -> tuple[list[dict[str, Any]], str | None]:
    """A child's answers, and how it ended where that was not well."""
    command = [sys.executable, __file__, "--child", part, name, "--device", args.device]
    command += ["--only", args.only] if args.only else []
    command += ["--smoke"] if args.smoke else []
    try:
        run = subprocess.run([*command, *extra], capture_output=True, text=True, timeout=args.child_seconds)
        output, ended = run.stdout, None
        if run.returncode:
            last = (run.stderr.strip().splitlines() or ["it printed nothing"])[-1]
            ended = f"exit {run.returncode}: {last[:200]}"
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        ended = f"no end within {args.child_seconds:.0f} s"
    return [json.loads(line.removeprefix(MARK)) for line in output.split("\n") if line.startswith(MARK)], ended


def usable(device: str, only: str | None) -> list[tuple[str, str | None]]:
    """(kernel, why it cannot be used here): those that could run on this device at all."""
    silicon = Device.of(torch.device(device))
    found = []
    for kernel in kernels.rows_for(silicon.type):
        if silicon.type not in kernel.devices or (only and not re.search(only, kernel.name)):
            continue
        is_there = candidates.version(kernel.library) is not None
        found.append((kernel.name, None if is_there else f"package {kernel.library} is not installed"))
    return found


def check(part: str, args: argparse.Namespace, console: Console) -> tuple[Grid, list[dict[str, Any]], int]:
    """The table of a part, its raw answers, and how many are wrong."""
    rows, raw, wrong = [], [], 0
    names = usable(args.device, args.only)
    if part == "special":
        names.insert(0, ("attention()", None))
    for name, why in names:
        if why is not None:
            rows.append((name, "", "", "", "", "", "", "", why))
            continue
        console.print(f"{part} {name} ...", style="dim")
        start = time.perf_counter()
        answers, ended = ask(part, name, args)
        found = [Found(**answer) for answer in answers]
        raw += [{"kernel": name, **answer} for answer in answers]
        ran = [f for f in found if f.refused is None]
        over = [f for f in ran if f.error is None and f.is_over]
        bad = [f for f in ran if f.error is not None] + (over if name == "attention()" else [])
        ended = ended or (None if found else "it answered nothing")
        wrong += len(bad) + (ended is not None)
        worst = max((f.forward or 0.0 for f in ran), default=0.0), max((f.backward or 0.0 for f in ran), default=0.0)
        told = [*bad, *(f for f in over if f not in bad)]
        says = "; ".join([*(_complaint(f) for f in told[:3]), *([f"and {len(told) - 3} more"] if len(told) > 3 else []),
                          *([ended] if ended else [])])  # fmt: skip
        if not ran and found:
            says = says or f"refused all: {found[0].refused}"
        counts = len(ran), len(found) - len(ran), len(bad), len(over)
        took = f"{time.perf_counter() - start:.0f} s"
        rows.append((name, *map(str, counts), f"{worst[0]:.2f}", f"{worst[1]:.2f}", took, says))
    headings = (part, "ran", "refused", "raised", "over", "forward", "backward", "took", "")
    return Grid(f"{part}: largest errors in budgets", headings, rows, texts=2), raw, wrong


def _complaint(f: Found) -> str:
    return f"{f.candidate} on {f.what}: {f.error or f'{f.forward} / {f.backward} budgets'}"


def run_workload(args: argparse.Namespace, console: Console) -> tuple[list[Any], list[str]]:
    """Results, and what ended a child; another one goes on after the problem that ended it."""
    results, ends, done = [], [], []
    todo = {report.title_of(c): c for c in workload(args)}
    while len(done) < len(todo):
        console.print(f"workload, {len(todo) - len(done)} problems ...", style="dim")
        answers, ended = ask("workload", "all", args, tuple(x for title in done for x in ("--skip", title)))
        for answer in (a for a in answers if "result" in a):
            data = answer["result"] | {"case": todo[answer["title"]]}
            data["candidates"] = [cpu.Candidate(**c) for c in data["candidates"]]
            results.append(cpu.Result(**data))
        began = [a["began"] for a in answers if "began" in a]
        done += began
        if ended is not None:
            ends.append(f"{began[-1] if began else 'the start'}: {ended}")
        if not began:
            ends += [] if ended else ["the start: it answered nothing"]
            break
    return results, ends


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="|".join(PARTS), help="default: all three")
    parser.add_argument("--only", metavar="REGEX", help="kernels, or titles of the workload, that match")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--smoke", action="store_true", help="a small part of everything")
    parser.add_argument("--results", metavar="FOLDER", help="write gpu_<part>.json and .md there")
    parser.add_argument("--child-seconds", type=float, default=CHILD_S, help="that one kernel may take (default %(default).0f)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--skip", action="append", default=[], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu --smoke runs the same on the CPU")
    if args.child:
        gpu_child.main(*args.child, args)
        return 0
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    facts = environment(args.device) | {"libraries": installed()}
    wrong = 0
    for part in args.parts or PARTS:
        if part == "workload":
            results, ends = run_workload(args, console)
            tables = report.grids(results, with_candidates=True) if results else []
            wrong += len(ends) + sum(not r.error <= 1 for r in results)
            data: Any = report.to_json(facts, results) if results else {}
            notes = ends
        else:
            table, raw, bad = check(part, args, console)
            tables, data, notes = [table], {"environment": facts, "answers": raw}, []
            wrong += bad
        for table in tables:
            console.print(table.rich(), "")
        for note in notes:
            console.print(note, style="red")
        if args.results:
            write(Path(args.results), part, facts, tables, notes, data)
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), style="dim")
    console.print("all right" if not wrong else f"{wrong} wrong", style="green" if not wrong else "red")
    return 1 if wrong else 0


def installed() -> str:
    """The kernel libraries of this machine, with versions."""
    named = {k.library: candidates.version(k.library) for k in kernels.rows() if k.library != "torch"}
    return ", ".join(f"{name} {version}" for name, version in named.items() if version) or "none"


def write(folder: Path, part: str, facts: dict[str, str], tables: list[Grid], notes: list[str], data: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"gpu_{part}.json").write_text(json.dumps({**data, "ended": notes}, indent=1), encoding="utf-8")
    lines = [f"# GPU check: {part}", "", "Made by `benchmarks/gpu_check.py`.", ""]
    lines += [*(f"- {name}: {value}" for name, value in facts.items()), ""]
    text = "\n".join([*lines, *(f"- {note}" for note in notes), *(t.markdown() for t in tables)])
    (folder / f"gpu_{part}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
