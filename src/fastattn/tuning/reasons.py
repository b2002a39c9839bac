"""Why a candidate is out, in words for people."""

from __future__ import annotations

from fastattn.environment.blame import Cause
from fastattn.environment.text import first_line
from fastattn.tuning.accuracy.budgets import Errors
from fastattn.tuning.trial_in_progress import TrialInProgress
from fastattn.verdicts.verdict import Outcome


def failure(error: Exception, cause: Cause) -> tuple[Outcome, str]:
    """What a candidate that raised comes to."""
    what = f"{'out of memory' if cause is Cause.MEMORY else type(error).__name__}: {first_line(error)}"
    if cause is Cause.CIRCUMSTANCE:
        return Outcome.NOT_TRIED, f"not tried: {cause.value} did not allow it: {what}"
    return Outcome.FAILED, what


def out_as_slow(trial: TrialInProgress, times: float, fastest: str) -> None:
    """Rule out a candidate that is so many times slower than the fastest so far."""
    why = f"more than {times:g} x slower than {fastest} at the first run"
    trial.out(Outcome.TOO_SLOW, "; ".join(filter(None, (why, trial.what_is_new))))


def inaccurate(errors: Errors) -> str:
    """Which errors are larger than allowed."""
    parts = [f"forward error {errors.forward:.3g} budgets > 1"] if not errors.forward <= 1 else []
    if errors.backward is not None and not errors.backward <= 1:
        parts.append(f"backward error {errors.backward:.3g} budgets > 1")
    return "inaccurate: " + ", ".join(parts)
