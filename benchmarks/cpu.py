"""attention() against F.scaled_dot_product_attention and against every candidate, over workload.toml, on this CPU.

    python benchmarks/cpu.py [--only REGEX] [--dtype bfloat16] [--smoke] [--results docs/results]

F.sdpa, F.sdpa again (A/A), attention() and every pinned candidate alternate within each round; times are medians. Every
problem starts from an empty store. docs/benchmarks.md says how to read the tables. Exit code 1 when attention() is wrong.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from statistics import median

import gpu_rehearsal
import report
import torch
from machine import add_results, environment, in_one_line, open_console, results_folder
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rounds import interleave, peak_bytes, settle, spread
from workload import SMALL, Case, Inputs, cases, inputs

import fastattn
from fastattn.environment.errors import NoKernelError
from fastattn.environment.settings import current_settings
from fastattn.kernels import registry
from fastattn.problems.call_key import call_key
from fastattn.problems.call_options import CallOptions
from fastattn.problems.classify import classify
from fastattn.problems.layouts import to_bhsd
from fastattn.tuning.accuracy.judge_call import judge_of_call
from fastattn.tuning.accuracy.probes import stand_in_scale
from fastattn.tuning.tune import tune_problem
from fastattn.verdicts.verdict import Outcome, Trial, Verdict

SDPA, AGAIN, OURS = "F.sdpa", "F.sdpa again", "attention()"


@dataclass(frozen=True)
class Candidate:
    """A kernel pinned by name: its time, or why it has none."""

    name: str
    time_us: float | None = None
    reason: str | None = None
    forward: float | None = None
    backward: float | None = None
    temporary_bytes: int | None = None  # as the gate follows it; the profiler's number is in Result
    left_out: str | None = None  # why the first call did not time it, if for its time alone


@dataclass(frozen=True)
class Result:
    """All that was measured on one Case. Times in us."""

    case: Case
    served: str
    sdpa_us: float
    ours_us: float
    spread: float
    cold_us: float  # first call, with its tuning, on an empty store
    disk_us: float  # first call after fastattn.clear(): verdict read from disk, bound, run
    error: float  # in budgets: the worst of attention()'s own output and of the winner's probes
    peak_bytes: int
    sdpa_peak_bytes: int
    rounds: int
    took_s: float  # of this benchmark, for this problem
    candidates: list[Candidate] = field(default_factory=list)

    @property
    def speedup(self) -> float:
        return self.sdpa_us / self.ours_us

    @property
    def oracle(self) -> Candidate | None:
        """The fastest pinned candidate that passes the gate, whether or not the first call timed it."""
        timed = [c for c in self.candidates if c.time_us is not None]
        return min(timed, key=lambda c: c.time_us or 0.0, default=None)

    @property
    def regret(self) -> float:
        """attention()'s time over the oracle's."""
        return self.ours_us / self.oracle.time_us if self.oracle and self.oracle.time_us else 1.0


class GateOnly:
    """A stopwatch that runs nothing: a tuning with it checks every candidate and times none."""

    def time(self, call: Callable[[], object], repeats: int) -> float:
        return 1e-3 * repeats

    def now(self) -> float:
        return 0.0


def measure(
    case: Case,
    rounds: int,
    seconds: float,
    device: str = "cpu",
    *,
    compile_kernels: bool = False,
    store: str | None = None,
) -> Result:
    """One problem from an empty store to its medians. compile_kernels: also those. store: that one, which stays."""
    start = time.perf_counter()
    x = inputs(case, str(gpu_rehearsal.where(device)))
    options = case.options
    sdpa = x.run(x.sdpa())
    ours = x.run(lambda q, k, v, mask: fastattn.attention(q, k, v, mask, **options))
    sdpa_peak = peak_bytes(sdpa)
    with nullcontext(store) if store else tempfile.TemporaryDirectory() as directory:
        fastattn.options(cache_dir=directory)
        fastattn.clear()
        cold = _once(ours)
        disk = median(_once(ours, clear=True) for _ in range(3 if cold < 2 else 1))
        if compile_kernels:  # what `fastattn tune --compile` does
            fastattn.explain(x.q, x.k, x.v, x.mask, tune=True, compile_kernels=True, **options)
        why = fastattn.explain(x.q, x.k, x.v, x.mask, **options)
        candidates, runs = _pinned(x, why.verdict, why.rows)
        found = interleave(
            {SDPA: sdpa, OURS: ours, **runs, AGAIN: sdpa}, rounds=rounds, seconds=seconds, stay=(SDPA, OURS, AGAIN)
        )
        us = {name: median(samples) * 1e6 for name, samples in found.items()}
        winner = next((c for c in candidates if c.name == why.served_by), Candidate(why.served_by))
        errors = [_own_error(x), winner.forward, winner.backward]
        return Result(
            case=case,
            served=why.served_by,
            sdpa_us=us[SDPA],
            ours_us=us[OURS],
            spread=spread(found, SDPA, AGAIN),
            cold_us=cold * 1e6,
            disk_us=disk * 1e6,
            error=max(e for e in errors if e is not None),
            peak_bytes=peak_bytes(ours),
            sdpa_peak_bytes=sdpa_peak,
            rounds=len(found[SDPA]),
            took_s=time.perf_counter() - start,
            candidates=[replace(c, time_us=us.get(c.name)) for c in candidates],
        )


def _once(run: Callable[[], object], clear: bool = False) -> float:
    if clear:
        fastattn.clear()
    settle()
    start = time.perf_counter()
    run()
    settle()
    return time.perf_counter() - start


# What a first call leaves out for its time alone; whatever passes the gate may be the oracle all the same.
LEFT_OUT = (Outcome.NOT_TRIED, Outcome.TOO_SLOW)


def _pinned(
    x: Inputs, verdict: Verdict | None, rows: tuple[Trial, ...]
) -> tuple[list[Candidate], dict[str, Callable[[], object]]]:
    """Every candidate of this device, and a run of each that passes the gate."""
    device_type = x.q.device.type
    elsewhere = {k.name for k in registry.rows_for(device_type, with_plugins=True) if device_type not in k.devices}
    rows = tuple(t for t in rows if t.candidate.split("+")[0] not in elsewhere)
    found, runs = [], {}
    for before, trial in zip(rows, _judged(verdict, rows), strict=True):
        reason = trial.reason
        if trial.outcome in (Outcome.TIMED, Outcome.TOO_SLOW):
            try:
                run = x.run(fastattn.plan(x.q, x.k, x.v, x.mask, kernel=trial.candidate, **x.case.options))
                run()
                runs[trial.candidate], reason = run, None
            except (NoKernelError, RuntimeError, ValueError) as error:
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
        left_out = before.outcome.value if before.outcome in LEFT_OUT else None
        errors = (trial.forward, trial.backward, trial.temporary_bytes)
        found.append(Candidate(trial.candidate, None, reason, *errors, left_out))
    return found, runs


def _judged(verdict: Verdict | None, trials: tuple[Trial, ...]) -> list[Trial]:
    """The trials; those that were not tried are checked now, by the gate of any tuning. What was too slow had passed it."""
    if verdict is None or all(t.outcome is not Outcome.NOT_TRIED for t in trials):
        return list(trials)
    with torch.enable_grad() if verdict.problem.needs_grad else torch.no_grad():
        judged = tune_problem(verdict.problem, current_settings(), clock=GateOnly(), thorough=True)
    return [(judged.trial(t.candidate) or t) if t.outcome is Outcome.NOT_TRIED else t for t in trials]


def _own_error(x: Inputs) -> float:
    """Error of attention()'s real output: the heads of the first kv head, in budgets."""
    c = x.case
    q, k, v = (t.detach() for t in (x.q, x.k, x.v))
    key = call_key(q, k, v, x.mask, c.layout, CallOptions(is_causal=c.causal))
    problem, _ = classify(key)
    judge = judge_of_call(problem, q, k, v, x.mask, stand_in_scale(problem))
    out = fastattn.attention(x.q, x.k, x.v, x.mask, **c.options).detach()
    mine = to_bhsd(out, c.layout)[:1, : problem.group]
    return judge.errors(lambda *_: mine).forward


def chosen(args: argparse.Namespace) -> list[Case]:
    """The cases that the command line asks for."""
    found = [c for c in cases() if not args.dtype or c.dtype in args.dtype]
    if args.smoke and not args.only:
        found = [c for c in found if c.name in SMALL]
    if args.only:
        found = [c for c in found if re.search(args.only, report.title_of(c))]
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", metavar="REGEX", help="problems whose title matches, such as 'vit.*bfloat16 training'"
    )
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16", "float16"], help="may be repeated")
    parser.add_argument("--rounds", type=int, help="at most so many interleaved rounds (default 15, with --smoke 5)")
    parser.add_argument("--seconds", type=float, help="of rounds for one problem, 5 rounds at least (default 2)")
    parser.add_argument("--smoke", action="store_true", help="a few small problems, few rounds")
    parser.add_argument("--candidates", action="store_true", help="show every candidate of every problem")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--markdown", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE", help="bar chart as PNG; needs matplotlib")
    add_results(parser, "cpu.json, cpu.md and, with matplotlib, cpu.png")
    args = parser.parse_args()
    if args.plot and not report.can_plot():
        parser.error("--plot needs matplotlib, which is not installed: pip install matplotlib")
    if not chosen(args):
        parser.error(f"nothing matches; titles look like: {report.title_of(cases()[0])}")
    return args


def main() -> int:
    args, facts = parse(), environment()
    console = open_console()
    before = current_settings()
    fastattn.options(mode="auto", accuracy="exact", tune_budget=1e9)
    start = time.perf_counter()
    results = _run(chosen(args), args)
    facts["took"] = f"{time.perf_counter() - start:.0f} s"
    fastattn.options(cache_dir=before.cache_dir, tune_budget=before.tune_budget)
    for grid in report.grids(results, with_candidates=args.candidates or len(results) <= 6):
        console.print(grid.rich(), "")
    console.print(in_one_line(facts), style="dim")
    _write(args, facts, results)
    wrong = [report.title_of(r.case) for r in results if not r.error <= 1]
    if wrong:
        console.print(f"over their error budget: {', '.join(wrong)}", style="red")
    return 1 if wrong else 0


def _write(args: argparse.Namespace, facts: dict[str, str], results: list[Result]) -> None:
    """The files that the command line asks for."""
    folder = results_folder(args, facts)
    writers = {"json": report.write_json, "md": report.write_markdown, "png": report.plot}
    for (ending, write), path in zip(writers.items(), (args.json, args.markdown, args.plot), strict=True):
        if path:
            write(path, facts, results)
        if folder is not None and (ending != "png" or report.can_plot()):
            write(str(folder / f"cpu.{ending}"), facts, results)


def _run(todo: list[Case], args: argparse.Namespace) -> list[Result]:
    rounds = args.rounds or (5 if args.smoke else 15)
    seconds = args.seconds or (0.3 if args.smoke else 2.0)
    results: list[Result] = []
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   console=Console(stderr=True), transient=True)  # fmt: skip
    with tempfile.TemporaryDirectory() as directory, bar:
        fastattn.options(cache_dir=directory)
        q = torch.randn(1, 2, 24, 16)
        fastattn.attention(q, q, q)  # what only the process's very first tuning pays belongs to no problem
        task = bar.add_task("", total=len(todo))
        for case in todo:
            bar.update(task, description=report.title_of(case))
            results.append(measure(case, rounds, seconds))
            bar.advance(task)
    return results


if __name__ == "__main__":
    sys.exit(main())
