"""Candidates -> verified -> timed -> Verdict. Writes no file; the clock is an argument."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable, Sequence

import torch

from fastattn.environment.device import Device
from fastattn.environment.settings import Settings, log
from fastattn.kernels.kernel import Accepted, Decision, Rejected
from fastattn.planning import binding, candidates
from fastattn.problems.problem import Problem
from fastattn.tuning import stopwatch as timing
from fastattn.tuning.accuracy.judge import Errors
from fastattn.tuning.cpu_contention import Crowd
from fastattn.tuning.screening import NO_ROOM, Entrant, Race, first_line, inaccurate, library_of
from fastattn.tuning.stopwatch import Stopwatch, stopwatch
from fastattn.verdicts.verdict import Trial, Verdict

MARGIN = 0.03  # the incumbent is replaced only by more than this, or twice the noise
ONE_LOOK = 0.25  # the margin where time allowed for fewer than three rounds
BUDGET_S = (0.5, 5.0)
BUDGET_FACTOR = 40  # of the incumbent's own time
THOROUGH_ROUNDS = 10
DRIFT = 0.1  # a winner whose time moved by more while it was timed is not written to disk
CROWDED = 0.25  # cores lacking, beyond which a verdict is marked, and `fastattn tune` measures again
STEADY_TRIES = 3  # timings that a thorough tuning makes to see the machine steady
TRIED_ANYWAY = 2  # candidates: a slow default must not use up the time of those that would replace it
NATIVE = "the default runs this kernel"
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
    native = binding.default_runs(problem, silicon, found)
    race = Race(problem, torch_device, clock, native)
    trials = [Trial(d.name, "; ".join(d.reasons)) for d in found if isinstance(d, Rejected)]
    settled = _settled(known, found)
    entrants = [Entrant(d) for d in found if isinstance(d, Accepted) and d.name not in settled]
    first = binding.fallbacks(problem, silicon, config, found)[0]
    incumbent = next(e for e in entrants if e.candidate == first)
    race.admit(incumbent, incumbent=True)
    budget = float("inf") if thorough else _budget(incumbent.first_run)
    start = max(began, clock.now() - 0.5 * budget)  # a slow default uses up half of the time at most
    tried, loaded = 0, candidates.loading_s
    for index, entrant in enumerate(_in_order([e for e in entrants if e is not incumbent], prior), 1):
        if progress is not None:
            progress(problem, entrant.candidate.name, index, len(entrants))
        kernel = entrant.candidate.kernel.name
        if kernel == "default":
            entrant.reason = binding.why_not_default(problem, silicon, config, found)
        elif (
            first.kernel.name == "default" and incumbent.reason is None and binding.is_native(entrant.candidate, native)
        ):
            entrant.reason = NATIVE
        elif entrant.candidate.kernel.compiles and not compiling:
            entrant.reason = NOT_COMPILED
        elif kernel == "sdpa_math" and any(e.reason is None for e in entrants if e.first_call is not None):
            entrant.reason = "not tried: the last resort"
        elif tried >= TRIED_ANYWAY and clock.now() - start - (candidates.loading_s - loaded) > 0.75 * budget:
            entrant.reason = NOT_TRIED
        else:
            race.admit(entrant)
            tried += 1
    alive = [e for e in entrants if e.reason is None]
    left = max(0.25 * budget, budget - (clock.now() - start - (candidates.loading_s - loaded)))
    left = min(left, THOROUGH_ROUNDS * race.round_s(alive)) if thorough else left
    crowded = _time(alive, clock, left, torch.get_num_threads() if silicon.type == "cpu" else 1, thorough)
    winner = _choose(entrants, incumbent, look)
    old = [t for t in known.trials if t.candidate in settled] if known is not None else []
    order = (*(e.trial() for e in entrants), *old, *trials)
    result = Verdict(problem, winner, order, incumbent=incumbent.candidate.name, created=_today(), crowded=crowded)
    _log(result, clock.now() - began)
    race.close()
    return result


def _time(alive: list[Entrant], clock: Stopwatch, seconds: float, cores: int, thorough: bool) -> float:
    """Time those that passed, all together; cores that were lacking meanwhile."""
    if not alive:
        return 0.0
    timed: dict[str, timing.Timing] = {}
    crowd = Crowd(cores)
    for _ in range(STEADY_TRIES if thorough else 1):
        crowd = Crowd(cores)
        timed = timing.compare({e.candidate.name: e.run for e in alive}, clock, seconds)
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


def _settled(known: Verdict | None, found: Sequence[Decision]) -> set[str]:
    """Candidates that need no new trial: tried in the version that is installed, and neither incumbent nor winner."""
    if known is None:
        return set()
    accepted = [d for d in found if isinstance(d, Accepted)]
    names = {d.name for d in accepted if _is_tried(known, d)} - {known.incumbent, known.winner, "default"}
    names -= {t.candidate for t in known.trials if t.reason == NATIVE}  # what F.sdpa runs may be another kernel by now
    if all(d.name != known.winner for d in accepted):  # it is gone: whoever had a time races for its place
        names -= {t.candidate for t in known.trials if t.time_us is not None}
    return names


def _is_tried(verdict: Verdict, candidate: Accepted) -> bool:
    trial = verdict.trial(candidate.name)
    return trial is not None and trial.library == library_of(candidate)


def changed(verdict: Verdict, silicon: Device, config: Settings) -> bool:
    """Whether a kernel library appeared, changed or vanished since; then its candidates race the winner again."""
    found = candidates.decisions(verdict.problem, silicon, config)
    accepted = [d for d in found if isinstance(d, Accepted)]
    is_winner_here = any(d.name == verdict.winner for d in accepted)
    return not is_winner_here or any(not _is_tried(verdict, d) for d in accepted)


def _in_order(entrants: list[Entrant], prior: Sequence[str]) -> list[Entrant]:
    """The prior's winners first, then the fixed order; plainest conversions before combined ones."""
    rank = {name: i for i, name in enumerate(prior)}
    return sorted(
        entrants, key=lambda e: (rank.get(e.candidate.name, len(rank)), e.candidate.kernel.name == "sdpa_math")
    )


def _budget(incumbent_s: float) -> float:
    low, high = BUDGET_S
    return min(high, max(low, BUDGET_FACTOR * incumbent_s))


def _choose(entrants: list[Entrant], default: Entrant, look: Callable[[Accepted], Errors] | None) -> str:
    """The winner's name; a candidate that fails on the caller's own tensors is out."""
    while True:
        winner = _pick(entrants, default)
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


def _pick(entrants: list[Entrant], default: Entrant | None) -> Entrant | None:
    alive = [e for e in entrants if e.reason is None and e.timing.samples]
    if not alive:
        return None
    incumbent = default if default in alive else None
    best = min(alive, key=lambda e: e.timing.median)
    noise = max(best.timing.noise, incumbent.timing.noise if incumbent else 0.0)
    margin = max(MARGIN, 2 * noise, ONE_LOOK if len(best.timing.samples) < timing.MIN_ROUNDS else 0.0)
    if incumbent is not None and best.timing.median * (1 + margin) >= incumbent.timing.median:
        return incumbent
    # Within the margin of the best a fixed order decides, so that runs agree; never one that ties with the incumbent.
    limit = best.timing.median * (1 + margin)
    if incumbent is not None:
        limit = min(limit, incumbent.timing.median / (1 + margin))
    return next(e for e in alive if e.timing.median <= limit)


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
