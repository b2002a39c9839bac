"""Candidates -> verified -> timed -> Verdict. Writes no file; the clock is an argument."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable, Sequence

import torch

from fastattn.environment.device import Device
from fastattn.environment.log import log
from fastattn.environment.settings import Settings
from fastattn.environment.version import __version__
from fastattn.kernels.libraries import availability
from fastattn.planning import candidates, default_choice
from fastattn.planning.decision import Accepted, Decision, Rejected
from fastattn.problems.problem import Problem
from fastattn.tuning.choose import CheckOnCallersTensors, choose
from fastattn.tuning.cpu_contention import CpuContention
from fastattn.tuning.freshness import libraries_now, settled
from fastattn.tuning.screening import Region, Screening
from fastattn.tuning.stopwatch import MIN_ROUNDS, ClockError, Stopwatch, Watched, stopwatch, time_interleaved
from fastattn.tuning.trial_in_progress import TrialInProgress
from fastattn.verdicts.verdict import CROWDED, DRIFT, Outcome, Trial, Verdict

BUDGET_S = {"cpu": (0.5, 5.0), "cuda": (2.0, 10.0)}  # where libraries are tried, and a first run loads its code
BUDGET_FACTOR = 25  # of the incumbent's own time: what comes before and after makes a first call of at most 60
THOROUGH_ROUNDS = 10
THOROUGH_S = 5.0  # of rounds, where the fewest take no longer: ten rounds of calls of a second tell no more than five
STEADY_TRIES = 3  # timings that a thorough tuning makes to see the machine steady
ROOM = 192 * 2**20  # bytes beyond the problem's own that a candidate may take in a first call: 256 MiB less the probes
TRIED_ANYWAY = 2  # candidates: a slow default must not use up the time of those that would replace it
MUST_COMPILE = "not tried: it must be compiled first, which `fastattn tune --compile` does"

Progress = Callable[[Problem, str, int, int], None]  # (problem, candidate, index, count) before each candidate


def tune_problem(
    problem: Problem,
    settings: Settings,
    *,
    device: torch.device | None = None,
    clock: Stopwatch | None = None,
    prior: Sequence[str] = (),
    check: CheckOnCallersTensors | None = None,
    thorough: bool = False,
    compile_kernels: bool = False,
    progress: Progress | None = None,
    known: Verdict | None = None,
    region: Region | None = None,
) -> Verdict:
    """Check every candidate's numbers, time those that are right, and name the winner.

    prior: candidate names to try first. check: checks a candidate on a slice of the caller's tensors; the winner must pass it.
    thorough: all are tried (the CLI's way). compile_kernels: also what takes seconds to compile first. known: an older Verdict,
    of which only what changed is tried again. region: for a problem of compiled code, what is timed in place of a Call.
    """
    on = torch.device(problem.device) if device is None else device
    device_kind = Device.of(on)
    clock = Watched(clock or stopwatch(on))
    began = clock.now()
    contention = CpuContention(torch.get_num_threads() if device_kind.type == "cpu" else 1)
    found = candidates.decisions(problem, device_kind, settings)
    native = default_choice.default_runs(problem, device_kind)
    room = float("inf") if thorough else problem.io_bytes + ROOM
    screening = Screening(problem, on, clock, native, settings, room, region)
    first = default_choice.fallbacks(problem, device_kind, settings, found)[0]
    kept = settled(known, found) - {first.name}  # what always can run is tried anew
    trials = [TrialInProgress(d) for d in found if isinstance(d, Accepted) and d.name not in kept]
    incumbent = next(t for t in trials if t.candidate == first)
    tried, cores_missing, took = 0, 0.0, 0.0
    try:
        screening.screen(incumbent, incumbent=True)
        budget = _Budget(clock, began, float("inf") if thorough else _budget(incumbent.first_run, device_kind.type))
        for index, trial in enumerate(_in_order([t for t in trials if t is not incumbent], prior), 1):
            if progress is not None:
                progress(problem, trial.candidate.name, index, len(trials))
            outcome = _left_out(trial, incumbent, native, trials, compile_kernels, problem)
            if trial.candidate.kernel.name == "default":
                trial.out(Outcome.REFUSED, default_choice.why_not_default(problem, device_kind, settings, found) or "")
            elif outcome is not None:
                trial.out(*outcome)
            elif tried >= TRIED_ANYWAY and budget.spent() > 0.75 * budget.seconds:
                trial.out(Outcome.NOT_TRIED, "not tried: budget")
            else:
                screening.screen(trial)
                budget.leave_out(trial)
                tried += 1
        left = max(0.25 * budget.seconds, budget.seconds - budget.spent())
        screening.leave_slow([t for t in trials if t.is_alive and t is not incumbent], left)
        alive = [t for t in trials if t.is_alive]
        left = _thorough_s(screening.round_s(alive)) if thorough else left
        cores_missing = _time(alive, clock, left, contention, STEADY_TRIES if thorough else 1)
        took = clock.now() - began
    except ClockError as error:
        for trial in trials:
            if trial.is_alive:
                trial.out(Outcome.NO_CLOCK, f"not timed: {error}")
    winner = choose(trials, incumbent, check)
    verdict = Verdict(
        problem,
        winner,
        (*(t.trial() for t in trials), *_not_tried_again(known, kept), *_refused(found)),
        incumbent=incumbent.candidate.name,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        cores_missing=cores_missing,
        made_by=__version__,
        kernels=settings.kernels,
        libraries=libraries_now(problem.device),
    )
    if verdict.is_crowded and incumbent.is_alive:  # such times crown nobody
        verdict = verdict._replace(winner=incumbent.candidate.name)
    _log(verdict, took)
    screening.close()
    return verdict


class _Budget:
    """The time that candidates may take. What importing libraries takes is not counted, nor a library's very first run."""

    def __init__(self, clock: Stopwatch, began: float, seconds: float) -> None:
        self.seconds = seconds
        self._clock = clock
        self._start = max(began, clock.now() - 0.5 * seconds)  # a slow default uses up half of it at most
        self._imports = availability.import_seconds()

    def leave_out(self, trial: TrialInProgress) -> None:
        """Do not count the very first run of a library's kernel: its code is loaded in it, or compiled."""
        if trial.candidate.kernel.library != "torch":
            self._start += trial.first_call or 0.0

    def spent(self) -> float:
        """Seconds since the start."""
        return self._clock.now() - self._start - (availability.import_seconds() - self._imports)


def _thorough_s(round_s: float) -> float:
    return max(MIN_ROUNDS * round_s, min(THOROUGH_ROUNDS * round_s, THOROUGH_S))


def _budget(incumbent_s: float, device_type: str) -> float:
    low, high = BUDGET_S[device_type]
    return min(high, max(low, BUDGET_FACTOR * incumbent_s))


def _left_out(
    trial: TrialInProgress,
    incumbent: TrialInProgress,
    native: str,
    trials: Sequence[TrialInProgress],
    compile_kernels: bool,
    problem: Problem,
) -> tuple[Outcome, str] | None:
    """Why a candidate need not be tried."""
    kernel = trial.candidate.kernel
    is_default = incumbent.candidate.kernel.name == "default" and incumbent.is_alive
    if is_default and default_choice.runs_natively(trial.candidate, native, in_tiles=incumbent.candidate.is_in_tiles):
        return Outcome.RUN_BY_DEFAULT, "the default runs this kernel"
    if kernel.compiles and not compile_kernels and not availability.is_built(kernel, problem):
        why = availability.why_broken(kernel)
        return (Outcome.REFUSED, why) if why is not None else (Outcome.NOT_COMPILED, MUST_COMPILE)
    if kernel.name == "sdpa_math" and any(t.is_alive for t in trials if t.first_call is not None):
        return Outcome.NOT_NEEDED, "not tried: the last resort"
    return None


def _in_order(trials: list[TrialInProgress], prior: Sequence[str]) -> list[TrialInProgress]:
    """The prior's winners first, then installed libraries, then torch's own, each in the fixed order; the last resort last.

    Whoever installed a library did so for its speed. Between equals the fixed order alone decides, whoever was tried first.
    """
    rank = {name: i for i, name in enumerate(prior)}

    def place(trial: TrialInProgress) -> tuple[int, bool, bool]:
        kernel = trial.candidate.kernel
        return rank.get(trial.candidate.name, len(rank)), kernel.name == "sdpa_math", kernel.library == "torch"

    return sorted(trials, key=place)


def _not_tried_again(known: Verdict | None, kept: set[str]) -> list[Trial]:
    return [t for t in known.trials if t.candidate in kept] if known is not None else []


def _refused(found: Sequence[Decision]) -> list[Trial]:
    return [Trial(d.name, Outcome.REFUSED, "; ".join(d.reasons)) for d in found if isinstance(d, Rejected)]


def _time(
    alive: list[TrialInProgress], clock: Stopwatch, seconds: float, since_start: CpuContention, tries: int
) -> float:
    """Time those that passed, all together, until the machine is steady and quiet; returns how many cores were missing."""
    missing = 0.0
    for _ in range(tries if alive else 0):
        contention = since_start.anew()
        charges = {t.candidate.name: t.new_length for t in alive}
        timed = time_interleaved({t.candidate.name: t.run for t in alive}, clock, seconds, charges)
        missing = round(contention.cores_missing(), 2)
        for trial in alive:
            trial.timing = timed[trial.candidate.name]
        if missing <= CROWDED and all(timing.drift <= DRIFT for timing in timed.values()):
            break
    return missing


_said: set[str] = set()  # what is said once a process


def _log(verdict: Verdict, seconds: float) -> None:
    gain = verdict.speedup()
    log.info(
        "tuned in %.2f s: %s -> %s%s%s",
        seconds,
        verdict.problem,
        verdict.winner,
        f" ({gain:.2f}x)" if gain else "",
        f"; for this process only: {verdict.why_not_lasting}" if verdict.why_not_lasting else "",
    )
    if verdict.is_crowded:
        level = logging.INFO if "crowded" in _said else logging.WARNING
        _said.add("crowded")
        text = (
            "%s: %s serves this process, and the next one tunes again; or run `fastattn tune` when the machine is quiet"
        )
        log.log(level, text, verdict.why_not_lasting, verdict.winner)
