"""One candidate's way through a tuning: verified, then run once for its memory and a first time, or out with a reason."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastattn.environment.cache_files import cache_layers
from fastattn.environment.errors import is_sticky
from fastattn.environment.log import log
from fastattn.environment.settings import current_settings
from fastattn.kernels.libraries import availability, crash_notes
from fastattn.planning import binding
from fastattn.planning.decision import Accepted
from fastattn.problems.problem import Problem
from fastattn.tuning import memory_use
from fastattn.tuning.accuracy import dropout
from fastattn.tuning.accuracy.budgets import Errors
from fastattn.tuning.accuracy.judge import judges_of_problem, worst_errors
from fastattn.tuning.accuracy.probes import plain_sample, probe_problem, stand_in_scale
from fastattn.tuning.stopwatch import SAMPLE_S, Stopwatch, Timing
from fastattn.verdicts.verdict import Trial

TOO_SLOW = 3.0  # a first run this many times slower than the incumbent ends a candidate
ONE_RUN_S = 0.25  # a run this long is enough to go by
FREE_SHARE = 0.5  # of the free memory that scores may take while trying a kernel
NO_ROOM = "not tried: too little memory is free"


@dataclass(slots=True)
class TrialInProgress:
    """A candidate on its way through a tuning."""

    candidate: Accepted
    run: Callable[[], Any] = lambda: torch.empty(0)
    reason: str | None = None
    errors: Errors | None = None
    temporary: int | None = None
    saved: int | None = None
    first_call: float | None = None  # seconds of its very first run: plan building and compiling are in it
    first_run: float = 0.0  # seconds of the first timed run at the problem's own size
    timing: Timing = field(default_factory=Timing)

    def trial(self) -> Trial:
        timed = bool(self.timing.samples) and self.reason is None
        return Trial(
            self.candidate.name,
            self.reason,
            time_us=round(self.timing.median * 1e6, 2) if timed else None,
            noise=round(self.timing.noise, 4) if timed else None,
            drift=round(self.timing.drift, 4) if timed else None,
            forward=_rounded(self.errors.forward) if self.errors else None,
            backward=_rounded(self.errors.backward) if self.errors else None,
            temporary_bytes=self.temporary,
            saved_bytes=self.saved,
            first_call_us=round(self.first_call * 1e6, 1) if self.first_call is not None else None,
            library=library_tag(self.candidate),
        )


def _rounded(error: float | None) -> float | None:
    return None if error is None else round(min(error, 1e9), 4)


def library_tag(candidate: Accepted) -> str:
    """The name and version a trial is filed under."""
    kernel = candidate.kernel
    told = [
        f"{name}={value}"
        for name, value in sorted(os.environ.items())
        if name.startswith(kernel.environment or ("\0",))
    ]
    return " ".join([kernel.library, str(availability.library_version(kernel.library)), *told])


class Screening:
    """The tensors and the reference that all candidates of one problem share."""

    def __init__(self, problem: Problem, device: torch.device, clock: Stopwatch, default_runs: str) -> None:
        self.problem, self.device, self.clock, self.default_runs = problem, device, clock, default_runs
        self.reduced = probe_problem(problem)
        self.scale = None if problem.scale == "positive" else stand_in_scale(problem)
        self.judged = judges_of_problem(problem, device)
        self.sample = plain_sample(problem, device)
        self._rate = dropout.RATE if problem.dropout else 0.0
        self._cache = next(iter(cache_layers(current_settings().cache_dir)[0]), None)
        self._fastest: tuple[float, str] | None = None  # (seconds, name) of the fastest first run so far

    def admit(self, entrant: TrialInProgress, incumbent: bool = False) -> None:
        """Verify, then run once for memory and a first time; whatever goes wrong becomes the reason."""
        candidate, what = entrant.candidate, None
        entrant.reason = availability.why_unavailable(candidate.kernel) or self._too_large(candidate, incumbent)
        if candidate.kernel.library != "torch":
            what = f"{candidate.name} of {library_tag(candidate)}: {self.problem.digest}"
            entrant.reason = entrant.reason or crash_notes.crashed_before(self._cache, what)
        if entrant.reason is not None:
            return
        try:
            with crash_notes.leave_note(self._cache, what) if what else contextlib.nullcontext():
                self._admit(entrant, incumbent)
        except Exception as error:
            if is_sticky(error):
                log.error("kernel %s broke the CUDA context on %s", entrant.candidate.name, self.problem)
                raise
            is_memory = memory_use.is_out_of_memory(error)
            entrant.reason = f"{'out of memory' if is_memory else type(error).__name__}: {first_line(error)}"
        else:
            return
        if is_memory:  # only now: the exception held what the kernel had made
            memory_use.release_memory(self.device)

    def _too_large(self, candidate: Accepted, incumbent: bool) -> str | None:
        """Why a kernel that writes the scores down is not even tried: to find out may be what breaks the process."""
        p, kernel = self.problem, candidate.kernel
        is_unfused = kernel.unfused or (kernel.chunks and not {"chunks", "recompute"} & set(candidate.conversions))
        if not (is_unfused or (kernel.name == "default" and self.default_runs == "torch_math")):
            return None
        if p.unfused_bytes > p.memory_limit and not incumbent:
            return f"memory: {p.unfused_bytes} temporary bytes > {p.memory_limit}"
        room = FREE_SHARE * memory_use.free_bytes(self.device)
        return f"{NO_ROOM}: {p.unfused_bytes} temporary bytes > {room:.0f}" if p.unfused_bytes > room else None

    def _admit(self, entrant: TrialInProgress, incumbent: bool) -> None:
        candidate, s = entrant.candidate, self.sample
        entrant.errors = worst_errors(self.judged, self._timed_once(entrant))
        if self.problem.dropout:
            entrant.errors = self._dropped(candidate).worst(entrant.errors)
        if not entrant.errors.passed:
            entrant.reason = inaccurate(entrant.errors)
            return
        run = self._whole(binding.bind(candidate, self.problem, self.scale, dropout_p=self._rate))
        inputs = [x for x in (s.q, s.k, s.v, s.mask) if x is not None]
        if candidate.kernel.compiles:  # for these sizes too
            start = self.clock.now()
            run()
            entrant.first_call = self.clock.now() - start
        start = self.clock.now()
        _, entrant.temporary, entrant.saved = memory_use.measure_memory(
            run, inputs, candidate.kernel.compiles is not None
        )
        entrant.first_run = self.clock.now() - start
        used, limit = max(entrant.temporary, entrant.saved), self.problem.memory_limit
        if not incumbent and used > limit:
            entrant.reason = f"memory: {used} bytes beyond its inputs and output > {limit}"
            return
        entrant.run = run
        if entrant.first_run < ONE_RUN_S:
            entrant.first_run = self.clock.time(run, 1)
        if self._fastest is None or entrant.first_run < self._fastest[0]:
            self._fastest = (entrant.first_run, candidate.name)
        elif entrant.first_run > TOO_SLOW * self._fastest[0]:
            entrant.reason = f"more than {TOO_SLOW:g} x slower than {self._fastest[1]} at the first run"

    def _dropped(self, candidate: Accepted) -> Errors:
        small = dropout.dropout_problem(self.problem)
        call, without = (binding.bind(candidate, small, self.scale, dropout_p=p) for p in (dropout.RATE, 0.0))
        return dropout.check_dropout(call, without, small, self.device)

    def _timed_once(self, entrant: TrialInProgress) -> binding.Call:
        call = binding.bind(entrant.candidate, self.reduced, self.scale)

        def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Any:
            if entrant.first_call is not None:
                return call(q, k, v, mask)
            start = self.clock.now()
            out = call(q, k, v, mask)
            entrant.first_call = self.clock.now() - start
            return out

        return run

    def _whole(self, call: binding.Call) -> Callable[[], Any]:
        s = self.sample
        if s.grad is None:
            return lambda: call(s.q, s.k, s.v, s.mask)
        wanted = [x for x in (s.q, s.k, s.v, s.mask) if x is not None and x.requires_grad]

        def run() -> Any:
            found = call(s.q, s.k, s.v, s.mask)
            torch.autograd.grad(found[0] if s.problem.lse else found, wanted, s.grad)
            return found

        return run

    @staticmethod
    def round_s(alive: list[TrialInProgress]) -> float:
        """About how long one round of all takes."""
        return sum(max(e.first_run, SAMPLE_S) for e in alive)

    def close(self) -> None:
        self.judged.clear()


def inaccurate(errors: Errors) -> str:
    parts = [f"forward error {errors.forward:.3g} budgets > 1"] if not errors.forward <= 1 else []
    if errors.backward is not None and not errors.backward <= 1:
        parts.append(f"backward error {errors.backward:.3g} budgets > 1")
    return "inaccurate: " + ", ".join(parts)


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]
