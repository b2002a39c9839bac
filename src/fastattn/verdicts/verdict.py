"""Verdict: what tuning one problem found, with every time, error and reason, so that explain works from the file alone."""

import sys
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

from fastattn.problems.problem import Problem

if TYPE_CHECKING:
    from fastattn.problems.tilings.worth import Worth

SCHEMA = 9
MARGIN = 0.03  # the incumbent is replaced only by more than this, or twice the noise
ONE_LOOK = 0.25  # the margin where time allowed for fewer than three rounds
DRIFT = 0.1  # a winner whose time moved by more while it was timed is not written to disk
CROWDED = 0.25  # cores that were missing while it was timed, beyond which its times say little
NOISY = 0.25  # so does a spread beyond this: on a machine that is quiet times spread by a few percent


class Outcome(str, Enum):
    """What became of a candidate in a tuning. Decisions read this; the reason beside it is for people."""

    TIMED = "timed"
    REFUSED = "refused"  # a limit, an option, or a library that is not there
    INACCURATE = "inaccurate"
    FAILED = "failed"  # it raised while it was tried
    TOO_MUCH_MEMORY = "too much memory"
    TOO_SLOW = "too slow"  # at its first run already
    RUN_BY_DEFAULT = "run by the default"  # F.sdpa runs this very kernel
    NOT_TRIED = "not tried"  # the time was used up
    NO_MEMORY_FREE = "no memory free"  # too little to try it
    NOT_COMPILED = "not compiled"  # it takes seconds to compile first
    NO_CLOCK = "no clock"  # the clock stood, went back or jumped: nothing could be timed
    NOT_NEEDED = "not needed"  # the last resort, where something else passed
    DEMOTED = "demoted"  # it raised after it had won


OPEN = (
    Outcome.NOT_TRIED,
    Outcome.NO_MEMORY_FREE,
    Outcome.NO_CLOCK,
)  # left out for lack of time, memory or a clock: another tuning may try them


class Trial(NamedTuple):
    """One candidate in a tuning. time_us is the median of one run, backward included where gradients are wanted.

    Where lengths churn it is that of a run at a length that is new to the kernel.
    """

    candidate: str
    outcome: Outcome = Outcome.TIMED
    reason: str | None = None  # why it has no time, what it raised, or what is in its time; for people
    time_us: float | None = None
    noise: float | None = None  # how far its times lie apart, over the median; None of fewer than three
    drift: float | None = None  # how far its later times lie apart from its earlier ones
    forward: float | None = None  # largest error, in budgets
    backward: float | None = None
    temporary_bytes: int | None = None
    saved_bytes: int | None = None
    first_call_us: float | None = None
    share: float | None = None  # in tiles: of all pairs of the mask it was timed with, those that lay in tiles,
    masked_share: float | None = None  # and those in tiles with a mask
    library: str = ""  # "name version" it was tried with

    @property
    def is_timed(self) -> bool:
        """Whether it passed and has a time: it may serve."""
        return self.outcome is Outcome.TIMED and self.time_us is not None


class Verdict(NamedTuple):
    """The outcome for a problem. The trials stand in their fixed order; `winner` and `incumbent` are names of theirs."""

    problem: Problem
    winner: str
    trials: tuple[Trial, ...]
    incumbent: str = "default"
    created: str = ""
    cores_missing: float = 0.0  # cores that other programs used while it was timed, of those that it needed
    made_by: str = ""  # the version of fastattn
    kernels: tuple[str, ...] = ()  # the option `kernels` that it was tuned under
    libraries: dict[str, str] = {}  # kernel libraries that were installed, and their versions

    def trial(self, candidate: str) -> Trial | None:
        """The trial of a candidate, if it had one."""
        return next((t for t in self.trials if t.candidate == candidate), None)

    def timed(self) -> list[Trial]:
        """The trials that may serve, the fastest first."""
        return sorted((t for t in self.trials if t.is_timed), key=lambda t: t.time_us or 0.0)

    def ranked(self) -> list[str]:
        """Names that may serve: the winner first, then by time."""
        return sorted((t.candidate for t in self.timed()), key=lambda name: name != self.winner)

    def speedup(self) -> float | None:
        """The incumbent's time over the winner's."""
        before, after = self.trial(self.incumbent), self.trial(self.winner)
        if before is None or after is None or not before.time_us or not after.time_us:
            return None
        return before.time_us / after.time_us

    def saves_us(self, candidate: str) -> float:
        """The incumbent's time less a candidate's; 0.0 where one has none, or they are of a bucket's canonical lengths."""
        before, after = self.trial(self.incumbent), self.trial(candidate)
        if self.problem.lengths != "exact" or before is None or after is None or not (before.time_us and after.time_us):
            return 0.0
        return before.time_us - after.time_us

    @staticmethod
    def worth_of_tiles(tiles: Trial, plain: Trial, *, is_to_gain: bool = False) -> "Worth | None":
        """When tiles cost no more than another candidate, which computes all pairs; None where the times do not tell.

        is_to_gain: the other one serves with the mask that was timed, and tiles must gain more than the times are sure of.
        """
        if not (tiles.time_us and plain.time_us and tiles.share):
            return None
        from fastattn.problems.tilings.worth import MOST_IN_TILES, worth_of  # here, as no call without a mask needs it

        worth = worth_of(tiles.share, tiles.masked_share or 0.0, tiles.time_us / plain.time_us)
        if not is_to_gain:
            return worth
        sure = (ONE_LOOK if t.noise is None else 2 * t.noise for t in (tiles, plain))
        most_share = min(MOST_IN_TILES, tiles.share / (1 + MARGIN))
        return worth._replace(most=1 / (1 + max(MARGIN, *sure)), most_share=most_share)

    def is_open(self, compile_kernels: bool = False) -> bool:
        """Whether another tuning may try candidates that this one left out; compile_kernels: those to compile too."""
        left_out = (*OPEN, Outcome.NOT_COMPILED) if compile_kernels else OPEN
        return any(t.outcome in left_out for t in self.trials)

    @property
    def is_unfinished(self) -> bool:
        """Whether the time was up before a library that is installed ran once: the next process goes on."""
        left = (t for t in self.trials if t.outcome is Outcome.NOT_TRIED and t.first_call_us is None)
        return any(t.library.split(" ")[0] not in ("", "torch") for t in left)

    @property
    def is_crowded(self) -> bool:
        """Whether other programs used cores that the timing needed: it was seen, or the times that decide are that noisy."""
        deciding = (self.trial(self.incumbent), *self.timed()[:1])
        noise = max((t.noise or 0.0 for t in deciding if t is not None and t.is_timed), default=0.0)
        return self.cores_missing > CROWDED or noise > NOISY

    @property
    def is_lasting(self) -> bool:
        """Whether another process may rely on it: the winner was tried, on a quiet machine that kept its speed meanwhile.

        What is not lasting serves its process, and the next one tunes again. Provisional says more: not even its times hold.
        """
        trial = self.trial(self.winner)
        was_tried = trial is None or ((trial.drift or 0.0) <= DRIFT and trial.outcome not in OPEN)
        return was_tried and not self.is_provisional

    @property
    def has_no_clock(self) -> bool:
        """Whether the clock failed the tuning: no time was had."""
        return any(t.outcome is Outcome.NO_CLOCK for t in self.trials)

    @property
    def is_provisional(self) -> bool:
        """Whether its times say nothing: the incumbent serves until a process on a quiet machine has timed the others."""
        return self.has_no_clock or self.is_crowded

    @property
    def why_not_lasting(self) -> str | None:
        """What was wrong while it was timed, for people; None where another process may rely on it."""
        if self.is_lasting:
            return None
        if self.has_no_clock:
            return next(t.reason for t in self.trials if t.outcome is Outcome.NO_CLOCK)
        if self.is_crowded:
            seen = f"{self.cores_missing:.1f} of the cores" if self.cores_missing > CROWDED else "the cores"
            return f"other programs used {seen} while it was timed"
        return "the machine changed its speed, or was short of memory, while it was timed"

    def demoted(self, candidate: str, cause: str) -> "Verdict":
        """The same without a candidate that raised: the next one wins."""
        out = {"outcome": Outcome.DEMOTED, "reason": cause}
        trials = tuple(t._replace(**out) if t.candidate == candidate else t for t in self.trials)
        left = self._replace(trials=trials).ranked()
        return self._replace(trials=trials, winner=left[0] if left else self.incumbent)

    def to_json(self) -> dict[str, Any]:
        """Plain data; from_json is the inverse."""
        data = {
            name: getattr(self, name)
            for name in ("winner", "incumbent", "created", "cores_missing", "made_by", "kernels", "libraries")
        }
        trials = [{name: value for name, value in t._asdict().items() if value not in (None, "")} for t in self.trials]
        return {"schema": SCHEMA, "problem": self.problem.to_json(), **data, "trials": trials}

    @staticmethod
    def from_json(data: Any) -> "Verdict":
        """Inverse of to_json. Raises ValueError, TypeError or KeyError on anything else."""
        if not isinstance(data, dict) or type(data.get("schema")) is not int or data["schema"] != SCHEMA:
            raise ValueError("another schema")
        verdict = Verdict(
            problem=Problem.from_json(data["problem"]),
            winner=_text(data["winner"]),
            trials=tuple(_trial(t) for t in data["trials"]),
            incumbent=_text(data["incumbent"]),
            created=_text(data["created"]),
            cores_missing=_number("cores_missing", data["cores_missing"]),
            made_by=_text(data["made_by"]),
            kernels=tuple(_text(name) for name in data["kernels"]),
            libraries={_text(name): _text(version) for name, version in data["libraries"].items()},
        )
        if verdict.trial(verdict.winner) is None:
            raise ValueError("its winner was not tried")
        return verdict


_TEXTS = ("candidate", "reason", "library")


def _trial(data: dict[str, Any]) -> Trial:
    for name, value in data.items():
        if name in _TEXTS:
            _text(value)
        elif name != "outcome":
            _number(name, value)
    values: dict[str, Any] = {**data, "outcome": Outcome(_text(data["outcome"]))}
    return Trial(**values)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= sys.float_info.max:
        raise ValueError(f"{name} is {value!r}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
