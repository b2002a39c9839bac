"""Which candidates to try first: what won for problems like this one."""

from __future__ import annotations

from collections.abc import Sequence

from fastattn.problems.problem import Problem
from fastattn.verdicts.verdict import Verdict


def winners_nearby(problem: Problem, verdicts: Sequence[Verdict]) -> list[str]:
    """Winners of the same family, then of the same dtype and direction, latest first."""
    family = problem.family()
    close: list[str] = []
    far: list[str] = []
    for verdict in reversed(verdicts):
        other = verdict.problem
        if other.family() == family:
            close.append(verdict.winner)
        elif (other.dtype, other.needs_grad) == (problem.dtype, problem.needs_grad):
            far.append(verdict.winner)
    return list(dict.fromkeys([*close, *far]))
