"""Who wins: the incumbent is replaced only by more than the noise, and a fixed order decides between equals."""

from __future__ import annotations

from collections.abc import Callable

from fastattn.environment.blame import raise_callers
from fastattn.environment.text import first_line
from fastattn.kernels.libraries import availability
from fastattn.planning.decision import Accepted
from fastattn.tuning.accuracy.budgets import Errors
from fastattn.tuning.reasons import inaccurate
from fastattn.tuning.stopwatch import MIN_ROUNDS
from fastattn.tuning.trial_in_progress import TrialInProgress
from fastattn.verdicts.verdict import MARGIN, ONE_LOOK, Outcome

CheckOnCallersTensors = Callable[[Accepted], Errors]


def choose(trials: list[TrialInProgress], default: TrialInProgress, check: CheckOnCallersTensors | None) -> str:
    """The winner's name. check: a candidate that fails it, on the caller's own tensors, is out."""
    while True:
        winner = pick(trials, default)
        if winner is None or winner is default or check is None:
            break
        try:
            errors = check(winner.candidate)
            if errors.passed:
                break
            winner.out(Outcome.INACCURATE, f"on the caller's tensors {inaccurate(errors)}")
        except Exception as error:
            raise_callers(error, availability.modules_of(winner.candidate.kernel))
            winner.out(Outcome.FAILED, f"on the caller's tensors {type(error).__name__}: {first_line(error)}")
    return (winner or default).candidate.name


def pick(trials: list[TrialInProgress], default: TrialInProgress | None) -> TrialInProgress | None:
    """Which of the trials wins, None where none has a time."""
    alive = [t for t in trials if t.is_alive and t.timing.samples]
    if not alive:
        return None
    incumbent = default if default in alive else None
    best = min(alive, key=lambda t: t.timing.median)
    noise = max(best.timing.noise, incumbent.timing.noise if incumbent else 0.0)
    margin = max(MARGIN, 2 * noise, ONE_LOOK if len(best.timing.samples) < MIN_ROUNDS else 0.0)
    if incumbent is not None and best.timing.median * (1 + margin) >= incumbent.timing.median:
        return incumbent
    # Within the margin of the best a fixed order decides, so that runs agree; never one that ties with the incumbent.
    limit = best.timing.median * (1 + margin)
    if incumbent is not None:
        limit = min(limit, incumbent.timing.median / (1 + margin))
    return next(t for t in alive if t.timing.median <= limit)
