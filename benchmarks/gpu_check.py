"""Every kernel this machine can use: is it right over a grid, and how fast over gpu_workload.toml.

    python benchmarks/gpu_check.py [verify] [special] [workload] [--only REGEX] [--results docs/results]

verify    each kernel, with all its conversions, against float64 by the gate's probes, forward and backward
special   offsets beyond 2^31, more than 65,535 heads, misaligned views, a CUDA graph: through attention() and each kernel
workload  F.sdpa, every pinned candidate and attention(), interleaved, as benchmarks/cpu.py does it

Each kernel, and the workload, runs in a process of its own, so that a crash costs a row. Without a name: all three.
`--device cpu --smoke` runs the same on a CPU. Exit code 1 where a kernel raised or ended its process, or attention() was wrong.
A refusal is no fault, nor a candidate over its error budget now and then ("over"), which the gate keeps from every caller.
What compiles for each length waits for --compile. Answers are written as they come; what there was no time for is said.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import cpu
import gpu_child
import report
import torch
from gpu_child import MARK, Found, workload
from machine import environment, in_one_line
from report import Grid
from rich.console import Console

from fastattn.environment.device import Device
from fastattn.kernels import registry
from fastattn.kernels.libraries import availability

PARTS = ("verify", "special", "workload")
CHILD_S = 120.0
PROBLEM_S = 60.0  # that one problem of the workload may take
TOTAL_S = 560.0
OUT_OF_TIME = "not finished: no time was left"
OFTEN_OVER = 0.05  # of a kernel's answers: more than that is no accident
UNUSABLE = "cannot be used"


def ask(
    part: str, name: str, args: argparse.Namespace, extra: tuple[str, ...] = (), *, seconds: float, patience: float
) -> tuple[list[dict[str, Any]], str | None]:
    """A child's answers, and how it ended where that was not well. patience: seconds without an answer that end it."""
    command = [sys.executable, gpu_child.__file__, part, name, "--device", args.device]
    command += ["--only", args.only] if args.only else []
    command += ["--smoke"] if args.smoke else []
    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryDirectory() as store:
        child = subprocess.Popen([*command, *extra], stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1,
                                 env={**os.environ, "FASTATTN_CACHE_DIR": store})  # fmt: skip
        lines: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=lambda: [*map(lines.put, child.stdout or ()), lines.put(None)], daemon=True)
        reader.start()
        answers, end = [], time.monotonic() + seconds
        while True:
            left = min(patience, end - time.monotonic())
            try:
                line = lines.get(timeout=max(0.0, left))
            except queue.Empty:
                child.kill()
                child.wait()
                why = f"no answer within {patience:.0f} s" if left == patience else OUT_OF_TIME
                return answers, why
            if line is None:
                break
            if MARK in line:
                answers.append(json.loads(line.partition(MARK)[2]))
        if child.wait() == 0:
            return answers, None
        errors.seek(0)
        last = (errors.read().strip().splitlines() or ["it printed nothing"])[-1]
        return answers, f"exit {child.returncode}: {last[:200]}"


def usable(args: argparse.Namespace) -> list[tuple[str, str | None]]:
    """(kernel, why it is not run): those of this device, what compiles last."""
    silicon = Device.of(torch.device(args.device))
    found = []
    for kernel in sorted(registry.rows_for(silicon.type), key=lambda k: k.compiles is not None):
        if silicon.type not in kernel.devices or (args.only and not re.search(args.only, kernel.name)):
            continue
        is_there = availability.library_version(kernel.library) is not None
        why = None if is_there else f"package {kernel.library} is not installed"
        if kernel.compiles == "each_length" and not args.compile:
            why = why or "compiles for each length: --compile"
        found.append((kernel.name, why))
    return found


def check(part: str, args: argparse.Namespace, console: Console, ends: float) -> tuple[Grid, list[dict[str, Any]], int]:
    """The table of a part, its raw answers, and how many are wrong; both are written after every kernel."""
    rows, raw, wrong = [], [], 0
    names = usable(args)
    if part == "special":
        names.insert(0, ("attention()", None))
    headings = (part, "ran", "refused", "raised", "over", "forward", "backward", "took", "")
    grid = Grid(f"{part}: largest errors in budgets", headings, rows, texts=2)
    for name, why in names:
        if why is None and ends - time.monotonic() < 5:
            why = "not reached: no time was left"
        if why is not None:
            rows.append((name, *[""] * 7, why))
            continue
        console.print(f"{part} {name} ...", style="dim")
        start = time.monotonic()
        seconds = min(args.child_seconds, ends - start)
        answers, ended = ask(part, name, args, seconds=seconds, patience=seconds)
        found = [Found(**answer) for answer in answers]
        raw += [{"kernel": name, **answer} for answer in answers]
        ran = [f for f in found if f.refused is None]
        over = [f for f in ran if f.error is None and f.is_over]
        is_often = name == "attention()" or len(over) > OFTEN_OVER * len(ran)
        bad = [f for f in ran if f.error is not None] + (over if is_often else [])
        bad += [f for f in found if UNUSABLE in (f.refused or "")][:1]
        ended = ended or (None if found else "it answered nothing")
        wrong += len(bad) + (ended not in (None, OUT_OF_TIME))
        told = [*bad, *(f for f in over if f not in bad)]
        says = "; ".join([*(_complaint(f) for f in told[:3]), *([f"and {len(told) - 3} more"] if len(told) > 3 else []),
                          *([ended] if ended else [])])  # fmt: skip
        if not ran and found:
            says = says or f"refused all: {found[0].refused}"
        worst = max((f.forward or 0.0 for f in ran), default=0.0), max((f.backward or 0.0 for f in ran), default=0.0)
        counts = len(ran), len(found) - len(ran), sum(f.error is not None for f in ran), len(over)
        took = f"{time.monotonic() - start:.0f} s"
        rows.append((name, *map(str, counts), f"{worst[0]:.2f}", f"{worst[1]:.2f}", took, says))
        save(args, part, [grid], [], {"answers": raw})
    return grid, raw, wrong


def _complaint(f: Found) -> str:
    return f"{f.candidate} on {f.what}: {f.error or f.refused or f'{f.forward} / {f.backward} budgets'}"


def run_workload(args: argparse.Namespace, console: Console, ends: float) -> tuple[list[Any], list[str]]:
    """Results, and what ended a child; another one goes on after the problem that ended it."""
    results: list[Any] = []
    ended_by, done = [], []
    todo = {report.title_of(c): c for c in workload(args)}
    while len(done) < len(todo) and ends - time.monotonic() > 5:
        console.print(f"workload, {len(todo) - len(done)} problems ...", style="dim")
        skip = tuple(x for title in done for x in ("--skip", title))
        answers, ended = ask("workload", "all", args, skip, seconds=ends - time.monotonic(), patience=PROBLEM_S)
        for answer in (a for a in answers if "result" in a):
            data = answer["result"] | {"case": todo[answer["title"]]}
            data["candidates"] = [cpu.Candidate(**c) for c in data["candidates"]]
            results.append(cpu.Result(**data))
        began = [a["began"] for a in answers if "began" in a]
        done += began if ended != OUT_OF_TIME else began[:-1]
        if ended is not None and ended != OUT_OF_TIME:
            ended_by.append(f"{began[-1] if began else 'the start'}: {ended}")
        if not began:
            ended_by += [] if ended else ["the start: it answered nothing"]
            break
        save(args, "workload", report.grids(results, with_candidates=True), ended_by, report.to_json({}, results))
    if len(done) < len(todo):
        console.print(f"not reached, no time was left: {', '.join(t for t in todo if t not in done)}", style="yellow")
    return results, ended_by


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="|".join(PARTS), help="default: all three")
    parser.add_argument("--only", metavar="REGEX", help="kernels, or titles of the workload, that match")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--smoke", action="store_true", help="a small part of everything")
    parser.add_argument("--results", metavar="FOLDER", help="write gpu_<part>.json and .md there")
    parser.add_argument("--compile", action="store_true", help="verify also what must compile for each length (flex)")
    parser.add_argument(
        "--child-seconds", type=float, default=CHILD_S, help="that one kernel may take (default %(default).0f)"
    )
    parser.add_argument("--seconds", type=float, default=TOTAL_S, help="for everything (default %(default).0f)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu --smoke runs the same on the CPU")
    args.facts = environment(args.device) | {"libraries": installed()}
    ends = time.monotonic() + args.seconds
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    facts, wrong = args.facts, 0
    for part in args.parts or PARTS:
        if part == "workload":
            results, notes = run_workload(args, console, ends)
            tables = report.grids(results, with_candidates=True) if results else []
            wrong += len(notes) + sum(not r.error <= 1 for r in results)
        else:
            table, _, bad = check(part, args, console, ends)
            tables, notes = [table], []
            wrong += bad
        for table in tables:
            console.print(table.rich(), "")
        for note in notes:
            console.print(note, style="red")
    console.print(in_one_line(facts), style="dim")
    console.print("all right" if not wrong else f"{wrong} wrong", style="green" if not wrong else "red")
    return 1 if wrong else 0


def installed() -> str:
    """The kernel libraries of this machine, with versions."""
    named = {k.library: availability.library_version(k.library) for k in registry.rows() if k.library != "torch"}
    return ", ".join(f"{name} {version}" for name, version in named.items() if version) or "none"


def save(args: argparse.Namespace, part: str, tables: list[Grid], notes: list[str], data: dict[str, Any]) -> None:
    """What is known of a part by now, as JSON and as Markdown."""
    if not args.results:
        return
    folder, facts = Path(args.results), args.facts
    folder.mkdir(parents=True, exist_ok=True)
    data = data | {"environment": facts, "ended": notes}
    (folder / f"gpu_{part}.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
    lines = [f"# GPU check: {part}", "", "Made by `benchmarks/gpu_check.py`.", ""]
    lines += [*(f"- {name}: {value}" for name, value in facts.items()), ""]
    text = "\n".join([*lines, *(f"- {note}" for note in notes), *(t.markdown() for t in tables)])
    (folder / f"gpu_{part}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
