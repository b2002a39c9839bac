"""Candidates -> verified -> timed -> Verdict. Writes no file; the clock is an argument."""

from __future__ import annotations

import datetime
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastattn import candidates, memory, planning, samples, timing, verifying
from fastattn.config import Config, log
from fastattn.device import Device
from fastattn.kernel import Accepted, Decision, Rejected
from fastattn.problem import Problem
from fastattn.timing import Stopwatch
from fastattn.verdict import Trial, Verdict
from fastattn.verifying import Errors

MARGIN = 0.03  # the incumbent is replaced only by more than this, or twice the noise
ONE_LOOK = 0.25  # the margin where time allowed for fewer than three rounds
HOPELESS = 3.0  # a first run this many times slower than the incumbent ends a candidate
BUDGET_S = (0.5, 5.0)
BUDGET_FACTOR = 40  # of the incumbent's own time
SLOW_S = 0.25
TRIED_ANYWAY = 2  # candidates: a slow default must not use up the time of those that would replace it
NOT_TRIED = "not tried: budget"

Progress = Callable[[str, int, int], None]


@dataclass(slots=True)
class Entrant:
    """A candidate on its way through a tuning."""

    candidate: Accepted
    run: Callable[[], Tensor] = lambda: torch.empty(0)
    reason: str | None = None
    errors: Errors | None = None
    temporary: int | None = None
    saved: int | None = None
    first_call: float | None = None  # seconds of its very first run: plan building and compiling are in it
    first_run: float = 0.0  # seconds of the first timed run at the problem's own size
    timing: timing.Timing = field(default_factory=timing.Timing)

    def trial(self) -> Trial:
        timed = bool(self.timing.samples) and self.reason is None
        return Trial(
            self.candidate.name,
            self.reason,
            time_us=round(self.timing.median * 1e6, 2) if timed else None,
            noise=round(self.timing.noise, 4) if timed else None,
            forward=_rounded(self.errors.forward) if self.errors else None,
            backward=_rounded(self.errors.backward) if self.errors else None,
            temporary_bytes=self.temporary,
            saved_bytes=self.saved,
            first_call_us=round(self.first_call * 1e6, 1) if self.first_call is not None else None,
            library=library_of(self.candidate),
        )


def _rounded(error: float | None) -> float | None:
    return None if error is None else round(min(error, 1e9), 4)


def tune(
    problem: Problem,
    config: Config,
    *,
    device: torch.device | None = None,
    clock: Stopwatch | None = None,
    prior: Sequence[str] = (),
    look: Callable[[Accepted], Errors] | None = None,
    thorough: bool = False,
    progress: Progress | None = None,
    known: Verdict | None = None,
) -> Verdict:
    """Check every candidate's numbers, time those that are right, and name the winner.

    prior: candidate names to try first. look: checks a candidate on a slice of the caller's tensors; the winner must pass it.
    thorough: no time limit (the CLI's way). known: an older Verdict, of which only what changed is tried again.
    """
    torch_device = torch.device(problem.device) if device is None else device
    silicon = Device.of(torch_device)
    clock = clock or timing.stopwatch(torch_device)
    began = clock.now()
    race = _Race(problem, torch_device, clock)
    found = candidates.decisions(problem, silicon, config)
    trials = [Trial(d.name, "; ".join(d.reasons)) for d in found if isinstance(d, Rejected)]
    settled = _settled(known, found)
    entrants = [Entrant(d) for d in found if isinstance(d, Accepted) and d.name not in settled]
    native = planning.default_runs(problem, silicon, found)
    race.admit(entrants[0])
    incumbent = entrants[0]
    budget = float("inf") if thorough else _budget(incumbent.first_run)
    start = max(began, clock.now() - 0.5 * budget)  # a slow default uses up half of the time at most
    tried = 0
    for index, entrant in enumerate(_in_order(entrants[1:], prior), 1):
        if progress is not None:
            progress(entrant.candidate.name, index, len(entrants))
        kernel = entrant.candidate.kernel.name
        if incumbent.reason is None and planning.is_native(entrant.candidate, native):
            entrant.reason = "the default runs this kernel"
        elif kernel == "sdpa_math" and any(e.reason is None for e in entrants if e.first_call is not None):
            entrant.reason = "not tried: the last resort"
        elif tried >= TRIED_ANYWAY and clock.now() - start > 0.75 * budget:
            entrant.reason = NOT_TRIED
        else:
            race.admit(entrant, against=incumbent)
            tried += 1
    alive = [e for e in entrants if e.reason is None]
    if alive:
        left = max(0.25 * budget, budget - (clock.now() - start)) if budget < float("inf") else 40 * race.longest(alive)
        timed = timing.compare({e.candidate.name: e.run for e in alive}, clock, left)
        for entrant in alive:
            entrant.timing = timed[entrant.candidate.name]
    winner = _choose(entrants, look)
    old = [t for t in known.trials if t.candidate in settled] if known is not None else []
    order = (*(e.trial() for e in entrants), *old, *trials)
    result = Verdict(problem, winner, order, incumbent=incumbent.candidate.name, created=_today())
    _log(result, clock.now() - began)
    race.close()
    return result


def library_of(candidate: Accepted) -> str:
    """The name and version a trial is filed under."""
    return f"{candidate.kernel.library} {candidates.version(candidate.kernel.library)}"


def _settled(known: Verdict | None, found: Sequence[Decision]) -> set[str]:
    """Candidates that need no new trial: tried in the version that is installed, and neither incumbent nor winner."""
    if known is None:
        return set()
    accepted = [d for d in found if isinstance(d, Accepted)]
    names = {d.name for d in accepted if _is_tried(known, d)} - {known.incumbent, known.winner, "default"}
    if all(d.name != known.winner for d in accepted):  # it is gone: whoever had a time races for its place
        names -= {t.candidate for t in known.trials if t.time_us is not None}
    return names


def _is_tried(verdict: Verdict, candidate: Accepted) -> bool:
    trial = verdict.trial(candidate.name)
    return trial is not None and trial.library == library_of(candidate)


def changed(verdict: Verdict, silicon: Device, config: Config) -> bool:
    """Whether a kernel library appeared, changed or vanished since; then its candidates race the winner again."""
    found = candidates.decisions(verdict.problem, silicon, config)
    accepted = [d for d in found if isinstance(d, Accepted)]
    is_winner_here = any(d.name == verdict.winner for d in accepted)
    return not is_winner_here or any(not _is_tried(verdict, d) for d in accepted)


def _in_order(entrants: list[Entrant], prior: Sequence[str]) -> list[Entrant]:
    """The prior's winners first, then the fixed order; plainest conversions before combined ones."""
    rank = {name: i for i, name in enumerate(prior)}
    return sorted(entrants, key=lambda e: (rank.get(e.candidate.name, len(rank)), e.candidate.kernel.name == "sdpa_math"))


def _budget(incumbent_s: float) -> float:
    low, high = BUDGET_S
    return min(high, max(low, BUDGET_FACTOR * incumbent_s))


class _Race:
    """The tensors and the reference that all candidates of one problem share."""

    def __init__(self, problem: Problem, device: torch.device, clock: Stopwatch) -> None:
        self.problem, self.device, self.clock = problem, device, clock
        self.reduced = samples.reduced(problem)
        self.scale = None if problem.scale == "positive" else samples.scale_of(problem)
        self.judged = verifying.judges(problem, device)
        self.sample = samples.plain(problem, device)

    def admit(self, entrant: Entrant, against: Entrant | None = None) -> None:
        """Verify, then run once for memory and a first time; whatever goes wrong becomes the reason."""
        candidate, s = entrant.candidate, self.sample
        p = self.problem
        if against is not None and candidate.kernel.unfused and p.unfused_bytes > p.memory_limit:
            entrant.reason = f"memory: {p.unfused_bytes} temporary bytes > {p.memory_limit}"
            return
        try:
            entrant.errors = verifying.summary(self.judged, self._timed_once(entrant))
            if not entrant.errors.passed:
                entrant.reason = _inaccurate(entrant.errors)
                return
            call = planning.bind(candidate, self.problem, self.scale)
            run = self._whole(call)
            inputs = [x for x in (s.q, s.k, s.v, s.mask) if x is not None]
            start = self.clock.now()
            _, entrant.temporary, entrant.saved = memory.measure(run, inputs)
            entrant.first_run = self.clock.now() - start
            limit = self.problem.memory_limit
            if against is not None and max(entrant.temporary, entrant.saved) > limit:
                used = max(entrant.temporary, entrant.saved)
                entrant.reason = f"memory: {used} bytes beyond its inputs and output > {limit}"
                return
            entrant.run = run
            if entrant.first_run < SLOW_S:  # else one run is enough to go by
                entrant.first_run = self.clock.time(run, 1)
            if against is not None and entrant.first_run > HOPELESS * against.first_run > 0:
                entrant.reason = f"more than {HOPELESS:g} x slower than the default at the first run"
        except torch.OutOfMemoryError as error:
            entrant.reason = f"out of memory: {_first_line(error)}"
            gc.collect()
        except Exception as error:
            entrant.reason = f"{type(error).__name__}: {_first_line(error)}"

    def _timed_once(self, entrant: Entrant) -> planning.Call:
        call = planning.bind(entrant.candidate, self.reduced, self.scale)

        def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            if entrant.first_call is not None:
                return call(q, k, v, mask)
            start = self.clock.now()
            out = call(q, k, v, mask)
            entrant.first_call = self.clock.now() - start
            return out

        return run

    def _whole(self, call: planning.Call) -> Callable[[], Tensor]:
        s = self.sample
        if s.grad is None:
            return lambda: call(s.q, s.k, s.v, s.mask)
        wanted = [x for x in (s.q, s.k, s.v, s.mask) if x is not None and x.requires_grad]

        def run() -> Tensor:
            out = call(s.q, s.k, s.v, s.mask)
            torch.autograd.grad(out, wanted, s.grad)
            return out

        return run

    def longest(self, alive: list[Entrant]) -> float:
        return max(self.clock.time(e.run, 1) for e in alive) * len(alive)

    def close(self) -> None:
        self.judged.clear()


def _inaccurate(errors: Errors) -> str:
    parts = [f"forward error {errors.forward:.3g} budgets > 1"] if not errors.forward <= 1 else []
    if errors.backward is not None and not errors.backward <= 1:
        parts.append(f"backward error {errors.backward:.3g} budgets > 1")
    return "inaccurate: " + ", ".join(parts)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _choose(entrants: list[Entrant], look: Callable[[Accepted], Errors] | None) -> str:
    """The winner's name; a candidate that fails on the caller's own tensors is out."""
    while True:
        winner = _pick(entrants)
        if winner is None or winner.candidate.kernel.name == "default" or look is None:
            break
        try:
            errors = look(winner.candidate)
            winner.reason = None if errors.passed else f"on the caller's tensors {_inaccurate(errors)}"
        except Exception as error:
            winner.reason = f"on the caller's tensors {type(error).__name__}: {_first_line(error)}"
        if winner.reason is None:
            break
    return winner.candidate.name if winner is not None else entrants[0].candidate.name


def _pick(entrants: list[Entrant]) -> Entrant | None:
    alive = [e for e in entrants if e.reason is None and e.timing.samples]
    if not alive:
        return None
    incumbent = next((e for e in alive if e.candidate.kernel.name == "default"), None)
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
        "tuned in %.2f s: %s -> %s%s", seconds, verdict.problem, verdict.winner, f" ({gain:.2f}x)" if gain else ""
    )


