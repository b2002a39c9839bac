"""`fastattn tune`: verdicts ahead of time."""

from __future__ import annotations

from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastattn.cli.encoding import say
from fastattn.cli.shape_words import asking, problems
from fastattn.cli.tables import console, print_json, print_tuned
from fastattn.dispatch import ahead
from fastattn.dispatch.session import session
from fastattn.environment.device import Device
from fastattn.environment.settings import current_settings
from fastattn.problems.problem import Problem
from fastattn.problems.spelling import briefly
from fastattn.verdicts import store
from fastattn.verdicts.verdict import Verdict


@click.command()
@asking
@click.option("--force", is_flag=True, help="Tune again what has a verdict already.")
@click.option(
    "--compile", "compile_kernels", is_flag=True, help="Also kernels that compile first (flex: 5 to 20 s a problem)."
)
@click.option(
    "--bucket", is_flag=True, help="Each stands for its bucket of lengths, for compiled models whose lengths change."
)
def tune(as_json: bool, force: bool, compile_kernels: bool, bucket: bool, **asked: Any) -> None:
    """Tune problems now and store the verdicts.

    A problem takes as long as its candidates need for a run or two, and some five seconds of rounds. Where verdicts cannot be
    stored, the table is all there is, and a line says why.
    """
    wanted = problems(**asked)
    if bucket:
        wanted = {problem.bucketed("all"): name for problem, name in wanted.items()}
    found: list[tuple[str, Verdict]] = []
    err = Console(stderr=True)
    spinner = SpinnerColumn("line" if err.options.ascii_only else "dots")
    counts = (spinner, BarColumn(20), TextColumn("{task.completed}/{task.total}"))
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    what = TextColumn("{task.description}", markup=False)
    with Progress(*counts, *times, what, console=err, transient=True, disable=as_json) as bar:
        task = bar.add_task("", total=len(wanted))

        def step(problem: Problem, candidate: str, index: int, count: int) -> None:
            bar.update(task, description=f"{briefly(problem)} {problem.dtype}: {candidate} ({index}/{count})")

        for problem, name in wanted.items():
            bar.update(task, description=f"{briefly(problem)} {problem.dtype}")
            found.append((name, ahead.tune(problem, progress=step, force=force, compile_kernels=compile_kernels)[0]))
            bar.advance(task)
    device = Device.of(torch.device(asked["device"]))
    if as_json:
        print_json([{**v.to_json(), "preset": name or None, "speedup": v.speedup()} for name, v in found])
    else:
        print_tuned(
            found,
            console(),
            f"speed against F.scaled_dot_product_attention on {device.name}, {torch.get_num_threads()} threads",
            f"error of what serves, 1.00 is the most allowed{' (forward / backward)' if asked['grad'] else ''};"
            " ~ stands for its bucket of lengths",
        )
    _say_what_is_not_stored([v for _, v in found], device)


def _say_what_is_not_stored(found: list[Verdict], device: Device) -> None:
    """Say which verdicts the next process will not have, and why."""
    kept = session.store(current_settings())
    lost = [v for v in found if kept.get(v.problem, device) != v]
    if not lost:
        return
    if any(v.is_lasting for v in lost):  # it should have been written
        why = f"{kept.why_none}; {store.SET_ONE}" if kept.root is None else f"cannot write {kept.root}"
    else:
        reasons = dict.fromkeys(v.why_not_lasting or "" for v in lost)
        why = "; ".join((*reasons, "run again when it is quiet"))
    count = "no verdict was" if len(lost) == len(found) else f"{len(lost)} of {len(found)} verdicts were not"
    say(f"{count} stored: {why}", err=True)
