"""`fastattn explain`: why a problem is served as it is."""

from __future__ import annotations

from typing import Any

import click

from fastattn.cli.shape_words import asking, problems
from fastattn.cli.tables import console, print_explained, print_json
from fastattn.dispatch import ahead
from fastattn.dispatch.circumstances import Circumstances
from fastattn.dispatch.explain import explain_problem
from fastattn.environment.settings import current_settings


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
    found = [explain_problem(problem, now) for problem in wanted]
    if as_json:
        print_json([e.to_json() for e in found])
        return
    out = console()
    for index, e in enumerate(found):
        if index:
            out.print()
        print_explained(e, out)
