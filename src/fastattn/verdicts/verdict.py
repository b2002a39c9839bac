"""Verdict: what tuning one problem found, with every time, error and reason, so that explain works from the file alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from fastattn.problems.problem import Problem

SCHEMA = 2


@dataclass(frozen=True, slots=True)
class Trial:
    """One candidate. `reason` says why it is out of the race, None if it was timed."""

    candidate: str
    reason: str | None = None
    time_us: float | None = None  # median of one run, backward included where gradients are wanted
    noise: float | None = None  # median absolute deviation over the median
    drift: float | None = None  # how far its later times lie apart from its earlier ones
    forward: float | None = None  # largest error, in budgets
    backward: float | None = None
    temporary_bytes: int | None = None
    saved_bytes: int | None = None
    first_call_us: float | None = None
    library: str = ""  # "name version" it was tried with
    tombstone: str | None = None  # the exception it raised after it had won


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome for a problem. `order` is the fixed order of the trials; `winner` one of their names."""

    problem: Problem
    winner: str
    trials: tuple[Trial, ...]
    incumbent: str = "default"
    created: str = ""
    crowded: float = 0.0  # cores that it lacked while it was timed, as other programs used them

    def trial(self, candidate: str) -> Trial | None:
        """The trial of a candidate, if it had one."""
        return next((t for t in self.trials if t.candidate == candidate), None)

    def ranked(self) -> list[str]:
        """Names that may serve, the winner first, then by time; none that is tombstoned."""
        timed = [t for t in self.trials if t.time_us is not None and t.tombstone is None]
        timed.sort(key=lambda t: (t.candidate != self.winner, t.time_us))
        return [t.candidate for t in timed]

    def speedup(self) -> float | None:
        """The incumbent's time over the winner's."""
        before, after = self.trial(self.incumbent), self.trial(self.winner)
        if before is None or after is None or not before.time_us or not after.time_us:
            return None
        return before.time_us / after.time_us

    def buried(self, candidate: str, cause: str) -> Verdict:
        """The same with a candidate tombstoned, and the next one as winner."""
        trials = tuple(replace(t, tombstone=cause) if t.candidate == candidate else t for t in self.trials)
        left = replace(self, trials=trials).ranked()
        return replace(self, trials=trials, winner=left[0] if left else self.incumbent)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "problem": self.problem.to_json(),
            "winner": self.winner,
            "incumbent": self.incumbent,
            "created": self.created,
            "crowded": self.crowded,
            "trials": [{k: v for k, v in asdict(t).items() if v is not None} for t in self.trials],
        }

    @staticmethod
    def from_json(data: Any) -> Verdict:
        """Inverse of to_json. Raises ValueError, TypeError or KeyError on anything else."""
        if not isinstance(data, dict) or type(data.get("schema")) is not int or data["schema"] != SCHEMA:
            raise ValueError("another schema")
        trials = tuple(_trial(t) for t in data["trials"])
        verdict = Verdict(
            problem=Problem.from_json(data["problem"]),
            winner=_text(data["winner"]),
            trials=trials,
            incumbent=_text(data["incumbent"]),
            created=_text(data["created"]),
            crowded=_number("crowded", data.get("crowded", 0.0)),
        )
        if verdict.trial(verdict.winner) is None:
            raise ValueError("its winner was not tried")
        return verdict


_TEXTS = ("candidate", "reason", "library", "tombstone")


def _trial(data: Any) -> Trial:
    for name, value in data.items():
        if name in _TEXTS:
            _text(value)
        else:
            _number(name, value)
    return Trial(**data)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} is {value!r}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
