"""Candidates -> verified -> timed -> Verdict. Writes no file; the clock is an argument."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable, Sequence

import torch

from fastattn.environment.device import Device
from fastattn.environment.log import log
from fastattn.environment.settings import Settings
from fastattn.kernels.libraries import availability
from fastattn.planning import candidates, default_choice
from fastattn.planning.decision import Accepted, Rejected
from fastattn.problems.problem import Problem
from fastattn.tuning.accuracy.budgets import Errors
from fastattn.tuning.choose import choose
from fastattn.tuning.cpu_contention import CpuContention
from fastattn.tuning.freshness import RUN_BY_DEFAULT, settled
from fastattn.tuning.screening import NO_ROOM, Screening, TrialInProgress
from fastattn.tuning.stopwatch import Stopwatch, Timing, stopwatch, time_interleaved
from fastattn.verdicts.verdict import Trial, Verdict

BUDGET_S = (0.5, 5.0)
BUDGET_FACTOR = 40  # of the incumbent's own time
THOROUGH_ROUNDS = 10
DRIFT = 0.1  # a winner whose time moved by more while it was timed is not written to disk
CROWDED = 0.25  # cores lacking, beyond which a verdict is marked, and `fastattn tune` measures again
STEADY_TRIES = 3  # timings that a thorough tuning makes to see the machine steady
TRIED_ANYWAY = 2  # candidates: a slow default must not use up the time of those that would replace it
NOT_TRIED = "not tried: budget"
NOT_COMPILED = "not tried: it must be compiled first, which `fastattn tune --compile` does"

Progress = Callable[[Problem, str, int, int], None]  # (problem, candidate, index, count) before each candidate


def tune_problem(
    problem: Problem,
    config: Settings,
    *,
    device: torch.device | None = None,
    clock: Stopwatch | None = None,
    prior: Sequence[str] = (),
    look: Callable[[Accepted], Errors] | None = None,
    thorough: bool = False,
    compiling: bool = False,
    progress: Progress | None = None,
    known: Verdict | None = None,
) -> Verdict:
    """Check every candidate's numbers, time those that are right, and name the winner.

    prior: candidate names to try first. look: checks a candidate on a slice of the caller's tensors; the winner must pass it.
    thorough: no time limit (the CLI's way). compiling: also what takes seconds to compile first. known: an older Verdict, of
    which only what changed is tried again.
    """
    torch_device = torch.device(problem.device) if device is None else device
    silicon = Device.of(torch_device)
    clock = clock or stopwatch(torch_device)
    began = clock.now()
    found = candidates.decisions(problem, silicon, config)
    native = default_choice.default_runs(problem, silicon, found)
    race = Screening(problem, torch_device, clock, native)
    trials = [Trial(d.name, "; ".join(d.reasons)) for d in found if isinstance(d, Rejected)]
    kept = settled(known, found)
    entrants = [TrialInProgress(d) for d in found if isinstance(d, Accepted) and d.name not in kept]
    first = default_choice.fallbacks(problem, silicon, config, found)[0]
    incumbent = next(e for e in entrants if e.candidate == first)
    race.admit(incumbent, incumbent=True)
    budget = float("inf") if thorough else _budget(incumbent.first_run)
    start = max(began, clock.now() - 0.5 * budget)  # a slow default uses up half of the time at most
    tried, loaded = 0, availability.loading_s
    for index, entrant in enumerate(_in_order([e for e in entrants if e is not incumbent], prior), 1):
        if progress is not None:
            progress(problem, entrant.candidate.name, index, len(entrants))
        kernel = entrant.candidate.kernel.name
        if kernel == "default":
            entrant.reason = default_choice.why_not_default(problem, silicon, config, found)
        elif (
            first.kernel.name == "default"
            and incumbent.reason is None
            and default_choice.runs_natively(entrant.candidate, native)
        ):
            entrant.reason = RUN_BY_DEFAULT
        elif entrant.candidate.kernel.compiles and not compiling:
            entrant.reason = NOT_COMPILED
        elif kernel == "sdpa_math" and any(e.reason is None for e in entrants if e.first_call is not None):
            entrant.reason = "not tried: the last resort"
        elif tried >= TRIED_ANYWAY and clock.now() - start - (availability.loading_s - loaded) > 0.75 * budget:
            entrant.reason = NOT_TRIED
        else:
            race.admit(entrant)
            tried += 1
    alive = [e for e in entrants if e.reason is None]
    left = max(0.25 * budget, budget - (clock.now() - start - (availability.loading_s - loaded)))
    left = min(left, THOROUGH_ROUNDS * race.round_s(alive)) if thorough else left
    crowded = _time(alive, clock, left, torch.get_num_threads() if silicon.type == "cpu" else 1, thorough)
    winner = choose(entrants, incumbent, look)
    old = [t for t in known.trials if t.candidate in kept] if known is not None else []
    order = (*(e.trial() for e in entrants), *old, *trials)
    result = Verdict(problem, winner, order, incumbent=incumbent.candidate.name, created=_today(), crowded=crowded)
    _log(result, clock.now() - began)
    race.close()
    return result


def _time(alive: list[TrialInProgress], clock: Stopwatch, seconds: float, cores: int, thorough: bool) -> float:
    """Time those that passed, all together; cores that were lacking meanwhile."""
    if not alive:
        return 0.0
    timed: dict[str, Timing] = {}
    crowd = CpuContention(cores)
    for _ in range(STEADY_TRIES if thorough else 1):
        crowd = CpuContention(cores)
        timed = time_interleaved({e.candidate.name: e.run for e in alive}, clock, seconds)
        if all(t.drift <= DRIFT for t in timed.values()):
            break
    for entrant in alive:
        entrant.timing = timed[entrant.candidate.name]
    return round(crowd.lacking(), 2)


def is_lasting(verdict: Verdict) -> bool:
    """Whether another process may rely on it: the winner was tried, on a machine that kept its speed meanwhile."""
    trial = verdict.trial(verdict.winner)
    return trial is None or ((trial.drift or 0.0) <= DRIFT and not is_open(trial))


def is_open(trial: Trial) -> bool:
    """Whether a candidate was left out for want of time or memory, so that another tuning may try it."""
    return (trial.reason or "").startswith((NOT_TRIED, NO_ROOM))


def is_crowded(verdict: Verdict) -> bool:
    """Whether other programs used cores that the timing needed: its times say little."""
    return verdict.crowded > CROWDED


def _in_order(entrants: list[TrialInProgress], prior: Sequence[str]) -> list[TrialInProgress]:
    """The prior's winners first, then the fixed order; plainest conversions before combined ones."""
    rank = {name: i for i, name in enumerate(prior)}
    return sorted(
        entrants, key=lambda e: (rank.get(e.candidate.name, len(rank)), e.candidate.kernel.name == "sdpa_math")
    )


def _budget(incumbent_s: float) -> float:
    low, high = BUDGET_S
    return min(high, max(low, BUDGET_FACTOR * incumbent_s))


def _today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _log(verdict: Verdict, seconds: float) -> None:
    gain = verdict.speedup()
    log.info(
        "tuned in %.2f s: %s -> %s%s%s",
        seconds,
        verdict.problem,
        verdict.winner,
        f" ({gain:.2f}x)" if gain else "",
        "" if is_lasting(verdict) else "; for this process only: the machine was short of memory, or changed its speed",
    )
    if is_crowded(verdict):
        level = logging.INFO if "crowded" in _said else logging.WARNING
        _said.add("crowded")
        text = "other programs used %.1f of the cores timed on: verdicts may be wrong; `fastattn tune`, later, retakes them"
        log.log(level, text, verdict.crowded)


_said: set[str] = set()  # what is said once a process
