"""tune(): verdicts ahead of time, for listed problems or for what a model really calls."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from fastattn.dispatch import entries, tune_now
from fastattn.dispatch.session import session
from fastattn.environment.option_scope import options
from fastattn.environment.settings import Settings, current_settings
from fastattn.problems.problem import Problem
from fastattn.tuning.tune import Progress
from fastattn.verdicts.verdict import Verdict


def tune(
    what: Problem | Iterable[Problem] | torch.nn.Module,
    *inputs: Any,
    progress: Progress | None = None,
    force: bool = False,
    compile_kernels: bool = False,
    compiled: bool = False,
    **named_inputs: Any,
) -> list[Verdict]:
    """Tune problems thoroughly (every candidate is tried) and store the verdicts.

    what: a Problem, several, or a module, which is run once on `inputs` with F.scaled_dot_product_attention patched so that
    every problem it meets is tuned. progress(problem, candidate, index, count) is called before each candidate.
    force: tune again what has a complete verdict. compile_kernels: also try kernels that take seconds to compile first.
    compiled: for compiled code (torch.compile): each candidate is compiled, checked and timed in a graph: some seconds.
    What is found serves compiled code alone, before what was tuned for eager code.
    Returns the verdicts, in the order of the problems. Raises TypeError for anything else; ValueError for the caller's own
    function, and for dropout in compiled code.
    """
    if isinstance(what, torch.nn.Module):
        what = _problems_of(what, inputs, named_inputs)
    elif inputs or named_inputs:
        raise TypeError("fastattn.tune: inputs are only for a module")
    settings = current_settings()
    found: list[Verdict] = []
    for problem in what if isinstance(what, Iterable) and not isinstance(what, Problem) else [what]:
        if not isinstance(problem, Problem):
            raise TypeError(
                f"fastattn.tune: expected a Problem, several, or a torch.nn.Module, got {type(problem).__name__}"
            )
        if problem.is_custom:
            raise ValueError(f"fastattn.tune: {problem} has the caller's own function, which no verdict can stand for")
        in_regime = problem.replace(compiled=problem.compiled or compiled)
        if in_regime.compiled and problem.dropout:
            raise ValueError(f"fastattn.tune: {problem}: compiled code draws its own dropout, which cannot be checked")
        found.append(_tune_one(in_regime, settings, progress, force, compile_kernels))
    entries.drop_all()
    return found


def _tune_one(
    problem: Problem, settings: Settings, progress: Progress | None, force: bool, compile_kernels: bool
) -> Verdict:
    problem = session.lengths_to_tune(problem)
    known = None if force else session.complete_verdict(problem, settings, compile_kernels)
    return known or tune_now.tune_and_keep(
        problem, settings, thorough=True, compile_kernels=compile_kernels, progress=progress
    )


@contextmanager
def collect() -> Generator[dict[Problem, None]]:
    """Collect every problem that is resolved inside, in order."""
    met: dict[Problem, None] = {}
    session.collectors.append(met)
    try:
        yield met
    finally:
        session.collectors.remove(met)


def _problems_of(model: torch.nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> list[Problem]:
    """The problems that one run of a model misses on, collected without timing anything."""
    from fastattn.dispatch.patching import patch

    entries.drop_all()
    # a model that is compiled already does not come here: its graphs hold what they were traced with
    as_eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    with options.scope(mode="cached"), patch(), collect() as met, as_eager:
        model(*inputs, **named)
    return [problem for problem in met if not problem.is_custom]
