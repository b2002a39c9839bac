"""Who wins: the incumbent is replaced only by more than the noise, and a fixed order decides between equals."""

from __future__ import annotations

from collections.abc import Callable

from fastattn.planning.decision import Accepted
from fastattn.tuning.accuracy.budgets import Errors
from fastattn.tuning.screening import TrialInProgress, first_line, inaccurate
from fastattn.tuning.stopwatch import MIN_ROUNDS

MARGIN = 0.03  # the incumbent is replaced only by more than this, or twice the noise
ONE_LOOK = 0.25  # the margin where time allowed for fewer than three rounds


def choose(entrants: list[TrialInProgress], default: TrialInProgress, look: Callable[[Accepted], Errors] | None) -> str:
    """The winner's name; a candidate that fails on the caller's own tensors is out."""
    while True:
        winner = pick(entrants, default)
        if winner is None or winner is default or look is None:
            break
        try:
            errors = look(winner.candidate)
            winner.reason = None if errors.passed else f"on the caller's tensors {inaccurate(errors)}"
        except Exception as error:
            winner.reason = f"on the caller's tensors {type(error).__name__}: {first_line(error)}"
        if winner.reason is None:
            break
    return winner.candidate.name if winner is not None else default.candidate.name


def pick(entrants: list[TrialInProgress], default: TrialInProgress | None) -> TrialInProgress | None:
    alive = [e for e in entrants if e.reason is None and e.timing.samples]
    if not alive:
        return None
    incumbent = default if default in alive else None
    best = min(alive, key=lambda e: e.timing.median)
    noise = max(best.timing.noise, incumbent.timing.noise if incumbent else 0.0)
    margin = max(MARGIN, 2 * noise, ONE_LOOK if len(best.timing.samples) < MIN_ROUNDS else 0.0)
    if incumbent is not None and best.timing.median * (1 + margin) >= incumbent.timing.median:
        return incumbent
    # Within the margin of the best a fixed order decides, so that runs agree; never one that ties with the incumbent.
    limit = best.timing.median * (1 + margin)
    if incumbent is not None:
        limit = min(limit, incumbent.timing.median / (1 + margin))
    return next(e for e in alive if e.timing.median <= limit)
