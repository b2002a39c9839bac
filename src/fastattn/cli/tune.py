"""`fastattn tune` and `fastattn explain`: verdicts ahead of time, and why a problem is served as it is."""

from __future__ import annotations

from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastattn.cli.shape_words import asking, problems
from fastattn.cli.tables import console, print_explained, print_json, print_tuned, short
from fastattn.dispatch import ahead, session
from fastattn.dispatch.circumstances import Circumstances
from fastattn.dispatch.explain import of_problem
from fastattn.environment.device import Device
from fastattn.environment.settings import current_settings
from fastattn.problems.problem import Problem
from fastattn.tuning.tune import is_lasting
from fastattn.verdicts import store
from fastattn.verdicts.verdict import Verdict


@click.command()
@asking
@click.option("--force", is_flag=True, help="Tune again what has a verdict already.")
@click.option(
    "--compile", "compiling", is_flag=True, help="Also kernels that compile first (flex: 5 to 20 s a problem)."
)
def tune(as_json: bool, force: bool, compiling: bool, **asked: Any) -> None:
    """Tune problems now and store the verdicts.

    There is no time limit. Exit code 1 where no verdict could be stored.
    """
    wanted = problems(**asked)
    found: list[tuple[str, Verdict]] = []
    counts = (SpinnerColumn(), BarColumn(20), TextColumn("{task.completed}/{task.total}"))
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    what = TextColumn("{task.description}", markup=False)
    with Progress(*counts, *times, what, console=Console(stderr=True), transient=True, disable=as_json) as bar:
        task = bar.add_task("", total=len(wanted))

        def step(problem: Problem, candidate: str, index: int, count: int) -> None:
            bar.update(task, description=f"{short(problem)} {problem.dtype}: {candidate} ({index}/{count})")

        for problem, name in wanted.items():
            bar.update(task, description=f"{short(problem)} {problem.dtype}")
            found.append((name, ahead.tune(problem, progress=step, force=force, compiling=compiling)[0]))
            bar.advance(task)
    silicon = Device.of(torch.device(asked["device"]))
    if as_json:
        print_json([{**v.to_json(), "preset": name or None, "speedup": v.speedup()} for name, v in found])
    else:
        print_tuned(
            found,
            console(),
            f"speed against F.scaled_dot_product_attention on {silicon.name}, {torch.get_num_threads()} threads",
            f"error of what serves, 1.00 is the most allowed{' (forward / backward)' if asked['grad'] else ''};"
            " ~ stands for its bucket of lengths",
        )
    _tell_what_is_not_stored([v for _, v in found], silicon)


def _tell_what_is_not_stored(found: list[Verdict], silicon: Device) -> None:
    """Raises click.ClickException where nothing is: then the next process tunes again."""
    verdicts = session.settings_store(current_settings())
    lost = [v for v in found if verdicts.get(v.problem, silicon) != v]
    if not lost:
        return
    if any(is_lasting(v) for v in lost):  # it should have been written
        why = f"{verdicts.why_none}; {store.SET_ONE}" if verdicts.root is None else f"cannot write {verdicts.root}"
    else:
        why = "the machine changed its speed, or was short of memory, while it was timed; run again when it is quiet"
    what = (
        "no verdict was stored" if len(lost) == len(found) else f"{len(lost)} of {len(found)} verdicts were not stored"
    )
    if len(lost) == len(found):
        raise click.ClickException(f"{what}: {why}")
    click.echo(f"{what}: {why}", err=True)


@click.command()
@asking
@click.option("--tune", "tune_first", is_flag=True, help="Measure now, whatever is stored.")
def explain(as_json: bool, tune_first: bool, **asked: Any) -> None:
    """Show what serves a problem, and why.

    Every known kernel is named, with its numbers or its reason.
    """
    wanted = problems(**asked)
    if tune_first:
        for problem in wanted:
            ahead.tune(problem, force=True)
    settings = current_settings()
    now = Circumstances(off=settings.mode == "off", cached=settings.mode == "cached")
    found = [of_problem(problem, None, now) for problem in wanted]
    if as_json:
        print_json([e.to_json() for e in found])
        return
    out = console()
    for index, e in enumerate(found):
        if index:
            out.print()
        print_explained(e, out)
