"""`fastattn tune` and `fastattn explain`: verdicts ahead of time, and why a problem is served as it is."""

from __future__ import annotations

from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from fastattn import config, explanation, guards, prewarming
from fastattn.cli.asking import asking, problems
from fastattn.cli.tables import console, explained, print_json, short, tuned_table
from fastattn.device import Device
from fastattn.problem import Problem
from fastattn.verdict import Verdict


@click.command()
@asking
@click.option("--force", is_flag=True, help="Tune again what has a verdict already.")
@click.option("--compile", "compiling", is_flag=True, help="Also kernels that compile first (flex: 5 to 20 s a problem).")
def tune(as_json: bool, force: bool, compiling: bool, **asked: Any) -> None:
    """Tune problems now, without a time limit, and store the verdicts.

    SHAPES are words: 8x16x196x64 is batch x heads x length x head_dim; 1x32/8x1x1024x128 is batch x q_heads/kv_heads x q_len x
    kv_len x head_dim; head_dim may be head_dim/head_dim_v.
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
            found.append((name, prewarming.tune(problem, progress=step, force=force, compiling=compiling)[0]))
            bar.advance(task)
    if as_json:
        print_json([{**v.to_json(), "preset": name or None, "speedup": v.speedup()} for name, v in found])
        return
    out = console()
    out.print(tuned_table(found))
    out.print(
        Text(f"\nspeed against F.scaled_dot_product_attention on {Device.of(torch.device(asked['device'])).name}, "
             f"{torch.get_num_threads()} threads; error of what serves, 1.00 is the most allowed"
             f"{' (forward / backward)' if asked['grad'] else ''}; ~ stands for its bucket of lengths", "dim")
    )  # fmt: skip


@click.command()
@asking
@click.option("--tune", "tune_first", is_flag=True, help="Measure now.")
def explain(as_json: bool, tune_first: bool, **asked: Any) -> None:
    """Show which kernel serves a problem, and why: every known kernel with its numbers or its reason."""
    wanted = problems(**asked)
    if tune_first:
        for problem in wanted:
            prewarming.tune(problem)
    settings = config.current()
    now = guards.Context(off=settings.mode == "off", cached=settings.mode == "cached")
    found = [explanation.of_problem(problem, None, now) for problem in wanted]
    if as_json:
        print_json([e.to_json() for e in found])
        return
    out = console()
    for index, e in enumerate(found):
        if index:
            out.print()
        out.print(Text(str(e.problem), "bold"))
        out.print(Text.assemble("served by ", (e.served_by, "bold green"), f": {e.why}"))
        out.print(explained(e), soft_wrap=False)
