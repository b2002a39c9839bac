"""Every kernel that this machine can use: how fast over gpu_workload.toml, and is it right over a grid.

    python benchmarks/gpu_check.py [workload] [verify] [special] [--only REGEX] [--results docs/results]

workload  F.sdpa, every pinned candidate and attention(), interleaved, as benchmarks/cpu.py does it
verify    each kernel, with all its conversions, against float64 by the gate's probes, forward and backward
special   offsets beyond 2^31, more than 65,535 heads, misaligned views, a cache in pages, a CUDA graph: through attention() and
          each kernel

In that order, within --seconds (8 minutes): the workload in a process, torch's own kernels in one, each library in one, last in
others what compiles. A crash or a hang costs its row; another process goes on behind it. Nothing is compiled for the workload,
nor for each length, unless --compile is given. Answers are written as they come, and what there was no time for is said.
It needs torch, click and rich, not the package installed.
`--device cpu --smoke` runs a small part of it on a CPU. `--rehearse` runs the whole plan there, with stubs for the libraries
and a clock that is told what each step takes: exit code 1 where the plan does not fit.
Exit code 1 where a kernel raised or ended its process, or attention() was wrong. A refusal is no fault, nor a candidate over
its error budget now and then ("over"), which the gate keeps from every caller.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SRC = str(Path(__file__).resolve().parents[1] / "src")
sys.path.insert(0, SRC)  # on a machine that only has the source

import cpu  # noqa: E402
import gpu_child  # noqa: E402
import report  # noqa: E402
import torch  # noqa: E402
from gpu_child import MARK, SERVED, Found, workload  # noqa: E402
from gpu_rehearsal import Clock, ToldClock, made_up_gpu, where  # noqa: E402
from machine import environment, in_one_line  # noqa: E402
from report import Grid  # noqa: E402
from rich.console import Console  # noqa: E402

from fastattn.environment.device import Device  # noqa: E402
from fastattn.kernels import registry  # noqa: E402
from fastattn.kernels.libraries import availability  # noqa: E402

PARTS = ("workload", "verify", "special")
TOTAL_S = 480.0
WORKLOAD_SHARE = 0.6  # of the time, at most
PROBLEM_S = 60.0  # that one problem of the workload may take
COMPILING = 10.0  # times what an answer costs where it may have to be compiled
KERNEL_S = 30.0  # that a kernel may be silent
RESTARTS = 3  # of a group whose kernels end it
OUT_OF_TIME = "not finished: no time was left"
NOT_REACHED = "not reached: no time was left"
ENDED_OFTEN = "not reached: others ended their process too often"
OFTEN_OVER = 0.05  # of a kernel's answers: more than that is no accident
UNUSABLE = "cannot be used"


@dataclass
class Run:
    """The command line, the clock, and what is known by now."""

    args: argparse.Namespace
    console: Console
    clock: Clock
    facts: dict[str, str] = field(default_factory=dict)
    store: str = ""
    compiling_from: float = 0.0  # when all was done that need not be compiled

    def left(self) -> float:
        """Seconds of the whole that are left."""
        return self.args.seconds - self.clock.now()

    def ask(
        self, job: str, extra: tuple[str, ...], seconds: float, patience: float
    ) -> tuple[list[dict[str, Any]], str | None]:
        """A child's answers, and how it ended where that was not well. patience: seconds without an answer that end it."""
        args, end = self.args, self.clock.now() + seconds
        command = [sys.executable, gpu_child.__file__, job, "--device", args.device]
        command += ["--only", args.only] if args.only else []
        command += [f"--{name}" for name in ("smoke", "compile", "rehearse") if getattr(args, name)]
        paths = os.pathsep.join(filter(None, (SRC, os.environ.get("PYTHONPATH"))))
        told = {**os.environ, "FASTATTN_CACHE_DIR": self.store, "PYTHONPATH": paths}
        with tempfile.TemporaryFile("w+") as errors:
            child = subprocess.Popen(
                [*command, *extra], stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1, env=told
            )
            lines: queue.Queue[str | None] = queue.Queue()
            reader = threading.Thread(
                target=lambda: [*map(lines.put, child.stdout or ()), lines.put(None)], daemon=True
            )
            reader.start()
            self.clock.tell("start", 1.0, end)
            answers: list[dict[str, Any]] = []
            while True:
                left = min(patience, end - self.clock.now())
                try:
                    line = self.clock.wait(lines, left)
                except queue.Empty:
                    child.kill()
                    child.wait()
                    return answers, f"no answer within {patience:.0f} s" if left == patience else OUT_OF_TIME
                if line is None:
                    break
                if MARK in line:
                    answer = json.loads(line.partition(MARK)[2])
                    what = "workload" if job == "workload" else answer.get("part", "")
                    if "began" in answer or self.clock.tell(what, self.thinned(answer), end):
                        answers.append(answer)
            if child.wait() == 0:
                return answers, None
            errors.seek(0)
            last = (errors.read().strip().splitlines() or ["it printed nothing"])[-1]
            return answers, f"exit {child.returncode}: {last[:200]}"

    def thinned(self, answer: dict[str, Any]) -> float:
        """How many answers of a real run one of a rehearsal stands for: its grid is that of --smoke."""
        if not (self.args.rehearse and answer.get("part") == "verify"):
            return 1.0
        compiles = any(k.compiles for k in registry.rows() if k.name == answer["kernel"])
        whole, part = (len(gpu_child.grid("cuda", smoke=smoke)) for smoke in (False, True))
        return (COMPILING if compiles else 1.0) * whole / part


# --- the workload


def run_workload(run: Run) -> tuple[list[Any], list[str]]:
    """Results, and what ended a child; another one goes on after the problem that ended it."""
    results: list[Any] = []
    ended_by, done = [], []
    with made_up_gpu(run.args.rehearse):
        todo = {report.title_of(c): c for c in workload(run.args)}
    others = set(run.args.parts) - {"workload"}
    ends = run.clock.now() + run.left() * (WORKLOAD_SHARE if others else 1.0)
    while len(done) < len(todo) and ends - run.clock.now() > 5:
        run.console.print(f"workload, {len(todo) - len(done)} problems ...", style="dim")
        skip = tuple(x for title in done for x in ("--skip", title))
        answers, ended = run.ask("workload", skip, ends - run.clock.now(), PROBLEM_S)
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
        save(run, "workload", report.grids(results, with_candidates=True), ended_by, report.to_json({}, results))
    if len(done) < len(todo):
        ended_by.append(f"not reached, no time was left: {', '.join(t for t in todo if t not in done)}")
    return results, ended_by


# --- the kernels


@dataclass
class Row:
    """What is known of a kernel: its answers to each part, and how it ended or why it is not run."""

    name: str
    library: str
    why: str | None = None
    compiles: bool = False
    found: dict[str, list[Found]] = field(default_factory=lambda: {"verify": [], "special": []})

    def complaints(self, part: str) -> tuple[list[Found], list[Found]]:
        """(what is wrong, what is over its budget now and then)."""
        ran = [f for f in self.found[part] if f.refused is None]
        over = [f for f in ran if f.error is None and f.is_over]
        bad = [f for f in ran if f.error is not None]
        bad += over if self.name == SERVED or len(over) > OFTEN_OVER * len(ran) else []
        bad += [f for f in self.found[part] if UNUSABLE in (f.refused or "")][:1]
        return bad, over


def usable(args: argparse.Namespace) -> list[Row]:
    """The kernels of this device, torch's own first, then library by library, what compiles last."""
    silicon = Device.of(where(args.device))
    found = [Row(SERVED, "torch")]
    rows = registry.rows_for(silicon.type)
    always = {row.library for row in rows if row.compiles is None}
    order = {row.library: (row.library != "torch", row.library not in always) for row in rows}
    for kernel in sorted(rows, key=lambda k: (*order[k.library], k.library)):
        if silicon.type not in kernel.devices or (args.only and not re.search(args.only, kernel.name)):
            continue
        is_there = availability.library_version(kernel.library) is not None
        why = None if is_there else f"package {kernel.library} is not installed"
        if kernel.compiles == "each_length" and not args.compile:
            why = why or "it is compiled for each length: --compile"
        found.append(Row(kernel.name, kernel.library, why, kernel.compiles is not None))
    return found


def run_kernels(run: Run, parts: list[str]) -> list[Row]:
    """A row for each kernel: torch's own in one process, each library in one, and in another what it compiles."""
    with made_up_gpu(run.args.rehearse):
        rows = usable(run.args)
    groups: dict[tuple[str, bool], list[Row]] = {}
    for row in rows:
        if row.why is None and (row.name != SERVED or "special" in parts):
            groups.setdefault((row.library, row.compiles), []).append(row)
    for compiles in (False, True):  # what compiles has the time that the others leave
        run.compiling_from = run.clock.now()
        some = {library: group for (library, kind), group in groups.items() if kind is compiles}
        weights = {library: len(group) + 1 for library, group in some.items()}  # a process takes time to start
        for library, group in some.items():
            share = weights[library] / sum(weights.values())
            run_group(run, parts, library, group, run.clock.now() + share * run.left())
            del weights[library]
            save_kernels(run, parts, rows)
    return rows


def run_group(run: Run, parts: list[str], library: str, group: list[Row], ends: float) -> None:
    """The answers of one library's kernels; behind one that ends the process another process goes on."""
    todo, ended = {row.name: row for row in group}, None
    for _ in range(RESTARTS + 1):
        seconds = ends - run.clock.now()
        if not todo or seconds < 5:
            break
        run.console.print(f"{library}: {', '.join(todo)} ...", style="dim")
        extra = ("--names", *todo, "--parts", *parts)
        answers, ended = run.ask("kernels", extra, seconds, KERNEL_S)
        for answer in (a for a in answers if "found" in a):
            todo[answer["kernel"]].found[answer["part"]].append(Found(**answer["found"]))
        began = [a["began"] for a in answers if "began" in a] or list(todo)[:1]
        if ended is not None:
            todo[began[-1]].why = ended
        for name in began:
            todo.pop(name)
        if ended in (None, OUT_OF_TIME):
            break
    for row in todo.values():
        row.why = NOT_REACHED if ends - run.clock.now() < 5 or ended == OUT_OF_TIME else ENDED_OFTEN


def grids_of(rows: list[Row], part: str) -> Grid:
    """The table of a part."""
    headings = (part, "ran", "refused", "raised", "over", "forward", "backward", "")
    lines = []
    for row in rows:
        found = row.found[part]
        if not found:
            lines.append((row.name, *[""] * 6, row.why or ""))
            continue
        ran = [f for f in found if f.refused is None]
        bad, over = row.complaints(part)
        told = [*bad, *(f for f in over if f not in bad)]
        says = [_complaint(f) for f in told[:3]] + ([f"and {len(told) - 3} more"] if len(told) > 3 else [])
        says += [row.why] if row.why else []
        says = says or ([] if ran else [f"refused all: {found[0].refused}"])
        worst = max((f.forward or 0.0 for f in ran), default=0.0), max((f.backward or 0.0 for f in ran), default=0.0)
        counts = len(ran), len(found) - len(ran), sum(f.error is not None for f in ran), len(over)
        lines.append((row.name, *map(str, counts), f"{worst[0]:.2f}", f"{worst[1]:.2f}", "; ".join(says)))
    return Grid(f"{part}: largest errors in budgets", headings, lines, texts=2)


def _complaint(f: Found) -> str:
    return f"{f.candidate} on {f.what}: {f.error or f.refused or f'{f.forward} / {f.backward} budgets'}"


def save_kernels(run: Run, parts: list[str], rows: list[Row]) -> None:
    for part in parts:
        answers = [{"kernel": row.name, **vars(f)} for row in rows for f in row.found[part]]
        save(run, part, [grids_of(rows, part)], [], {"answers": answers})


def how_many_wrong(rows: list[Row], parts: list[str]) -> int:
    """Answers that are wrong, and kernels that ended their process or said nothing."""
    wrong = sum(len(row.complaints(part)[0]) for row in rows for part in parts)
    ended = [row.why for row in rows if row.why and row.why.startswith(("exit", "no answer"))]
    return wrong + len(ended)


# --- all of it


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="|".join(PARTS), help="default: all three")
    parser.add_argument("--only", metavar="REGEX", help="kernels, or titles of the workload, that match")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--smoke", action="store_true", help="a small part of everything")
    parser.add_argument(
        "--rehearse", action="store_true", help="the whole plan on the CPU, with stubs and a told clock"
    )
    parser.add_argument("--results", metavar="FOLDER", help="write gpu_<part>.json and .md there")
    parser.add_argument("--compile", action="store_true", help="also what is compiled first, flex for each length")
    parser.add_argument("--seconds", type=float, default=TOTAL_S, help="for everything (default %(default).0f)")
    args = parser.parse_args()
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if args.device == "cuda" and not args.rehearse and not torch.cuda.is_available():
        parser.error(
            "there is no CUDA device here; --rehearse runs the plan, --device cpu --smoke a part of it on the CPU"
        )
    args.parts = args.parts or list(PARTS)
    args.smoke = args.smoke or args.rehearse
    return args


def main() -> int:
    args = parse()
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    with tempfile.TemporaryDirectory() as store:
        os.environ["FASTATTN_CACHE_DIR"] = store
        run = Run(args, console, ToldClock() if args.rehearse else Clock(), store=store)
        args.seconds += run.clock.now()
        with made_up_gpu(args.rehearse):
            run.facts = environment("cpu" if args.rehearse else args.device) | {"libraries": installed()}
        began, wrong, seconds = run.clock.now(), 0, run.left()
        if "workload" in args.parts:
            results, notes = run_workload(run)
            for table in report.grids(results, with_candidates=True) if results else []:
                console.print(table.rich(), "")
            for note in notes:
                console.print(note, style="red")
            wrong += len(notes) + sum(not r.error <= 1 for r in results)
        parts = [part for part in ("verify", "special") if part in args.parts]
        rows = run_kernels(run, parts) if parts else []
        for part in parts:
            console.print(grids_of(rows, part).rich(), "")
        wrong += how_many_wrong(rows, parts)
        console.print(in_one_line(run.facts), style="dim")
        unfinished = [row for row in rows if row.why in (OUT_OF_TIME, NOT_REACHED)]
        console.print(*verdict(wrong, unfinished), sep="; ")
        left_out = [row.name for row in unfinished if not row.compiles]  # what compiles may take any time
        if args.rehearse:
            took, plain = (now - began for now in (run.clock.now(), run.compiling_from))
            told = "without what compiles, by the costs in gpu_rehearsal.py"
            console.print(f"the plan takes {took:.0f} s of {seconds:.0f}, {plain:.0f} {told}")
            if left_out:
                console.print(f"there is no time for {', '.join(left_out)}", style="red")
        return 1 if wrong or (args.rehearse and left_out) else 0


def verdict(wrong: int, unfinished: list[Row]) -> tuple[str, ...]:
    """The last line in parts. All is right only where all was looked at."""
    parts = [f"[red]{wrong} wrong[/red]"] if wrong else []
    if unfinished:
        parts += [] if wrong else ["nothing wrong"]
        parts.append(f"[red]not finished: {', '.join(row.name for row in unfinished)}[/red]")
    return tuple(parts) or ("[green]all right[/green]",)


def installed() -> str:
    """The kernel libraries of this machine, with versions."""
    named = {k.library: availability.library_version(k.library) for k in registry.rows() if k.library != "torch"}
    return ", ".join(f"{name} {version}" for name, version in named.items() if version) or "none"


def save(run: Run, part: str, tables: list[Grid], notes: list[str], data: dict[str, Any]) -> None:
    """What is known of a part by now, as JSON and as Markdown."""
    if not run.args.results:
        return
    folder = Path(run.args.results)
    folder.mkdir(parents=True, exist_ok=True)
    data = data | {"environment": run.facts, "ended": notes}
    (folder / f"gpu_{part}.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
    lines = [f"# GPU check: {part}", "", "Made by `benchmarks/gpu_check.py`.", ""]
    lines += [*(f"- {name}: {value}" for name, value in run.facts.items()), ""]
    text = "\n".join([*lines, *(f"- {note}" for note in notes), *(t.markdown() for t in tables)])
    (folder / f"gpu_{part}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
