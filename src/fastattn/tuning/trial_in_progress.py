"""A candidate on its way through a tuning: what was found so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from fastattn.environment.text import format_duration
from fastattn.kernels.libraries import availability
from fastattn.planning.decision import Accepted
from fastattn.problems.tilings.tile import Tiling
from fastattn.tuning.accuracy.budgets import Errors
from fastattn.tuning.stopwatch import MIN_ROUNDS, Timing
from fastattn.verdicts.verdict import Outcome, Trial


@dataclass(slots=True)
class TrialInProgress:
    """A candidate on its way through a tuning; `outcome` is None as long as it may still win."""

    candidate: Accepted
    run: Callable[[], Any] = lambda: torch.empty(0, dtype=torch.float32, device="cpu")
    outcome: Outcome | None = None
    reason: str | None = None
    errors: Errors | None = None
    temporary: int | None = None
    saved: int | None = None
    tiling: Tiling | None = None  # of the sample, where it runs in tiles
    first_call: float | None = None  # seconds of its very first run: plan building and compiling are in it
    first_run: float = 0.0  # seconds of the first timed run at the problem's own size
    new_length: float = 0.0  # seconds that a run costs more where its length is new, as most are where lengths churn
    timing: Timing = field(default_factory=Timing)

    @property
    def is_alive(self) -> bool:
        """Whether nothing has ruled it out yet."""
        return self.outcome is None

    @property
    def what_is_new(self) -> str | None:
        """What of its time a length that is new takes, for people."""
        if not self.new_length:
            return None
        return f"{format_duration(self.new_length * 1e6)} of it for a length that it has not run before"

    def out(self, outcome: Outcome, reason: str) -> None:
        """Rule it out."""
        self.outcome, self.reason = outcome, reason

    def trial(self) -> Trial:
        """The Trial that is stored in the Verdict."""
        timed = self.is_alive and bool(self.timing.samples)
        return Trial(
            self.candidate.name,
            self.outcome or Outcome.TIMED,
            self.reason or self.what_is_new,
            time_us=round(self.timing.median * 1e6, 2) if timed else None,
            noise=round(self.timing.spread, 4) if timed and len(self.timing.samples) >= MIN_ROUNDS else None,
            drift=round(self.timing.drift, 4) if timed else None,
            forward=_rounded(self.errors.forward) if self.errors else None,
            backward=_rounded(self.errors.backward) if self.errors else None,
            temporary_bytes=self.temporary,
            saved_bytes=self.saved,
            first_call_us=round(self.first_call * 1e6, 1) if self.first_call is not None else None,
            share=_rounded(self.tiling.share) if self.tiling else None,
            masked_share=_rounded(self.tiling.masked_share) if self.tiling else None,
            library=availability.library_tag(self.candidate.kernel),
        )


def _rounded(error: float | None) -> float | None:
    return None if error is None else round(min(error, 1e9), 4)
