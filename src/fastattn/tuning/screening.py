"""One candidate's way through a tuning: verified, then run once for its memory and a first time, or out with a reason."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn.environment.blame import Cause, cause_of
from fastattn.environment.cache_files import cache_layers
from fastattn.environment.device import Device
from fastattn.environment.log import log
from fastattn.environment.settings import Settings
from fastattn.kernels.libraries import availability, crash_notes
from fastattn.planning import binding, candidates
from fastattn.planning.conversions import IN_BLOCKS
from fastattn.planning.conversions.tiles import tiling_with
from fastattn.planning.decision import Accepted
from fastattn.problems.problem import Problem
from fastattn.tuning import memory_use
from fastattn.tuning.accuracy import dropout
from fastattn.tuning.accuracy.budgets import Errors
from fastattn.tuning.accuracy.full_size import FullSize
from fastattn.tuning.accuracy.judge import Judge, judge_of_tiles, judges_of_problem, worst_errors
from fastattn.tuning.accuracy.probes import plain_sample, probe_problem, stand_in_scale
from fastattn.tuning.accuracy.sample import Sample
from fastattn.tuning.new_lengths import new_length_s
from fastattn.tuning.reasons import failure, inaccurate, out_as_slow
from fastattn.tuning.stopwatch import KEEP_WITHIN, MIN_ROUNDS, SAMPLE_S, ClockError, Stopwatch
from fastattn.tuning.too_large import why_too_large
from fastattn.tuning.trial_in_progress import TrialInProgress
from fastattn.verdicts.verdict import Outcome

TOO_SLOW = 3.0  # a first run this many times slower than the fastest so far ends a candidate
TOO_SLOW_FOR_ROUNDS = 2.0  # the same where there is no time for rounds of all
ONE_RUN_S = 0.25  # a run this long is enough to go by
TOO_SLOW_ON_PROBES = 6.0  # the same, of runs on the probes, which are smaller than the problem

# region(candidate, problem, scale, its Call) -> the same in a region of torch.compile
Region = Callable[[Accepted, Problem, "float | None", binding.Call], binding.Call]


class Screening:
    """Checks the candidates of one problem one by one: they share its tensors and its reference."""

    def __init__(
        self,
        problem: Problem,
        device: torch.device,
        clock: Stopwatch,
        default_runs: str,
        settings: Settings,
        room: float = float("inf"),
        region: Region | None = None,
    ) -> None:
        """room: bytes that a candidate may take beside the sample. region: what is judged and timed in place of its Call."""
        self.room, self._settings, self._region = room, settings, region
        self.problem, self.device, self.clock, self.default_runs = problem, device, clock, default_runs
        self.reduced = probe_problem(problem)
        self.scale = None if problem.scale == "positive" else stand_in_scale(problem)
        self.judges = judges_of_problem(problem, device)
        self.sample = plain_sample(problem, device)
        is_whole = (self.reduced.q_len, self.reduced.kv_len) == (problem.q_len, problem.kv_len)
        self.full_size = None if is_whole else FullSize(self.sample, stand_in_scale(problem))
        self._rate = dropout.RATE if problem.dropout else 0.0
        self._cache = next(iter(cache_layers(settings.cache_dir)[0]), None)
        self._in_tiles: Judge | None = None
        self._fastest: tuple[float, str] | None = None  # (seconds, name) of the fastest first run so far
        self._on_probes: tuple[float, str] | None = None  # the same of the runs on the probes

    def screen(self, trial: TrialInProgress, incumbent: bool = False) -> None:
        """Verify, then run once for memory and a first time; whatever goes wrong becomes the outcome."""
        candidate, what = trial.candidate, None
        why = availability.why_unavailable(candidate.kernel) or availability.why_unprepared(candidate.kernel)
        if why is not None:
            return trial.out(Outcome.REFUSED, why)
        too_large = why_too_large(self.problem, candidate, self.default_runs, self.device, incumbent)
        if too_large is not None:
            return trial.out(*too_large)
        if candidate.kernel.library != "torch":
            what = f"{candidate.name} of {availability.library_tag(candidate.kernel)}: {self.problem.digest}"
            why = crash_notes.crashed_before(self._cache, what)
            if why is not None:
                return trial.out(Outcome.FAILED, why)
        try:
            with crash_notes.leave_note(self._cache, what) if what else contextlib.nullcontext():
                self._try(trial, incumbent)
        except ClockError:
            raise  # no candidate is to blame
        except Exception as error:
            cause = cause_of(error, availability.modules_of(candidate.kernel))
            if cause is Cause.DEVICE:
                log.error("kernel %s broke the CUDA context on %s", candidate.name, self.problem)
            if cause in (Cause.DEVICE, Cause.CALLER):
                raise
            trial.out(*failure(error, cause))
        else:
            return None
        if cause is Cause.MEMORY:  # only now: the exception held what the kernel had made
            memory_use.release_memory(self.device)
        return None

    def _try(self, trial: TrialInProgress, incumbent: bool) -> None:
        candidate, s = trial.candidate, self.sample
        trial.errors = worst_errors(self._judges_of(candidate), self._measured_once(trial))
        if self.problem.dropout:
            trial.errors = self._with_dropout(candidate).worst(trial.errors)
        if not trial.errors.passed:
            return trial.out(Outcome.INACCURATE, inaccurate(trial.errors))
        if self._is_slow_on_probes(trial):
            return None
        if not incumbent and (most := self._may_take(trial)) > self.room:
            why = f"not tried: it may take {most:.0f} bytes, a first call {self.room:.0f}; `fastattn tune` tries it"
            return trial.out(Outcome.NOT_TRIED, why)
        if candidate.is_in_tiles:
            trial.tiling = tiling_with(self.problem, s.mask)
        call = binding.bind(candidate, self.problem, self.scale, dropout_p=self._rate)
        inside = self._region(candidate, self.problem, self.scale, call) if self._region else call
        run = self._whole(inside, s)
        if candidate.kernel.compiles or self._region:  # for these sizes too
            start = self.clock.now()
            run()
            trial.first_call = self.clock.now() - start
        start = self.clock.now()
        found, trial.temporary, trial.saved = memory_use.measure_memory(
            self._whole(call, s), s.tensors, candidate.kernel.compiles is not None
        )
        trial.first_run = self.clock.now() - start
        found = run() if self._region else found
        if self.full_size is not None and not self._rate:
            trial.errors = self.full_size.errors(found).worst(trial.errors)
            if not trial.errors.passed:
                return trial.out(Outcome.INACCURATE, inaccurate(trial.errors))
        del found
        used, limit = max(trial.temporary, trial.saved), self.problem.memory_limit
        if not incumbent and used > limit:
            why = f"memory: {used} bytes beyond its inputs and output > {limit}"
            return trial.out(Outcome.TOO_MUCH_MEMORY, why)
        trial.run = run
        most, fastest = (TOO_SLOW * self._fastest[0], self._fastest[1]) if self._fastest else (float("inf"), "")
        is_churning = self.problem.lengths != "exact"  # then a plan in that run must not pass for its usual time
        if self._region or trial.first_run < ONE_RUN_S or (is_churning and trial.first_run <= most):
            trial.first_run = self.clock.time(run, 1)
        # what is kept is kept anew for each sample; where it is too slow it cannot win
        if "kept" not in candidate.conversions and TOO_SLOW * trial.first_run <= KEEP_WITHIN * most:
            trial.new_length = new_length_s(
                s, lambda short: self._whole(call, short), partial(self._can_do, candidate), self.clock
            )
        took = trial.first_run + trial.new_length
        if took > most:
            return out_as_slow(trial, TOO_SLOW, fastest)
        if TOO_SLOW * took < most:
            self._fastest = (took, candidate.name)
        return None

    def _is_slow_on_probes(self, trial: TrialInProgress) -> bool:
        """Rule out what was so slow on the probes that it need not run at the problem's size."""
        kernel, took = trial.candidate.kernel, trial.first_call
        if took is None or kernel.compiles or kernel.library != "torch":  # it compiles, or loads its code, in that run
            return False
        if self._on_probes is None or took < self._on_probes[0]:
            self._on_probes = (took, trial.candidate.name)
        most = max(ONE_RUN_S, TOO_SLOW_ON_PROBES * self._on_probes[0])
        if took > most:
            s, call = self.judges[0].sample, binding.bind(trial.candidate, self.reduced, self.scale)
            # once more: what is paid once a process was in the first run
            if self.clock.time(lambda: call(*s.given), 1) > most:
                out_as_slow(trial, TOO_SLOW_ON_PROBES, self._on_probes[1])
        return not trial.is_alive

    def leave_slow(self, challengers: list[TrialInProgress], seconds: float) -> None:
        """Rule out the slower ones where the fewest rounds of all would take longer than `seconds`."""
        if self._fastest is None or MIN_ROUNDS * self.round_s(challengers) <= seconds:
            return
        for trial in challengers:
            if trial.first_run + trial.new_length > TOO_SLOW_FOR_ROUNDS * self._fastest[0]:
                out_as_slow(trial, TOO_SLOW_FOR_ROUNDS, self._fastest[1])

    def _judges_of(self, candidate: Accepted) -> list[Judge]:
        """What a candidate's numbers are compared with; tiles on a mask with a structure as well."""
        if not (candidate.is_in_tiles and isinstance(self.sample.mask, Tensor)):
            return self.judges
        if self._in_tiles is None:
            self._in_tiles = judge_of_tiles(self.problem, self.device)
        return [*self.judges, self._in_tiles]

    def _can_do(self, candidate: Accepted, problem: Problem) -> bool:
        found = candidates.decide(candidate.kernel, problem, Device.of(self.device), self._settings)
        return any(d.name == candidate.name for d in found if isinstance(d, Accepted))

    def _with_dropout(self, candidate: Accepted) -> Errors:
        small = dropout.dropout_problem(self.problem)
        call, without = (binding.bind(candidate, small, self.scale, dropout_p=p) for p in (dropout.RATE, 0.0))
        return dropout.check_dropout(call, without, small, self.device)

    def _measured_once(self, trial: TrialInProgress) -> binding.Call:
        """Its Call for the probes; the time of its very first run is kept, and the bytes that it took beside them."""
        call = binding.bind(trial.candidate, self.reduced, self.scale)
        inside = self._region(trial.candidate, self.reduced, self.scale, call) if self._region else call

        def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Any:
            if trial.first_call is not None:
                return inside(q, k, v, mask)
            start = self.clock.now()
            if trial.candidate.kernel.compiles:
                out = call(q, k, v, mask)
            else:
                inputs = [x for x in (q, k, v, mask) if isinstance(x, Tensor)]
                out, trial.temporary, _ = memory_use.measure_memory(lambda: call(q, k, v, mask), inputs)
            trial.first_call = self.clock.now() - start
            return inside(q, k, v, mask) if self._region else out

        return run

    def _may_take(self, trial: TrialInProgress) -> float:
        """Bytes that it may take at the problem's own size, by what the probes took; blocks bound what is not cast before."""
        done = set(trial.candidate.conversions)
        is_bounded = "by_heads" in done or (IN_BLOCKS & done and "fp32" not in done)
        if trial.temporary is None or is_bounded:
            return 0.0
        return trial.temporary * self.problem.io_bytes / max(1, self.reduced.io_bytes)

    @staticmethod
    def _whole(call: binding.Call, s: Sample) -> Callable[[], Any]:
        if s.grad is None:
            return lambda: call(*s.given)
        wanted = [x for x in s.tensors if x.requires_grad]

        def run() -> Any:
            found = call(*s.given)
            torch.autograd.grad(found[0] if s.problem.lse else found, wanted, s.grad)
            return found

        return run

    @staticmethod
    def round_s(alive: list[TrialInProgress]) -> float:
        """About how long one round of all takes."""
        return sum(max(e.first_run, SAMPLE_S) for e in alive)

    def close(self) -> None:
        self.judges.clear()
