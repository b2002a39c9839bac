"""What this process has learnt: verdicts in memory over the store, lengths seen, misses, demotions, and counts of all that.

Everything is changed under one lock, which is new after a fork. What is read on a hit is not here (entries.py).
"""

from __future__ import annotations

import os
from collections import Counter
from threading import RLock
from typing import Any

import torch

from fastattn.dispatch import entries
from fastattn.dispatch.circumstances import TUNE, Circumstances, ranks, what_is_allowed
from fastattn.dispatch.counts import Counts
from fastattn.dispatch.lengths_seen import LengthsSeen
from fastattn.dispatch.shared_tables import SharedTables
from fastattn.environment.device import Device
from fastattn.environment.log import log
from fastattn.environment.settings import Settings
from fastattn.problems import length_buckets
from fastattn.problems.problem import Problem
from fastattn.tuning.freshness import is_fresh
from fastattn.verdicts.store import Store, store_of
from fastattn.verdicts.verdict import Verdict

Key = tuple[str | None, Device, Problem]  # (cache_dir, device, problem)


class Session:
    """All that one process has learnt, and the lock around it."""

    def __init__(self) -> None:
        self.lock = RLock()
        self.tables = SharedTables()
        self.tuning_s = 0.0  # of the process's tuning budget
        self.collectors: list[dict[Problem, None]] = []  # each notes every problem that is resolved, in order
        self.counts = Counts()
        self._forget()

    def _forget(self) -> None:
        self.verdicts: dict[Key, Verdict | None] = {}
        self.being_tuned: set[Problem] = set()
        self.not_tunable: dict[Problem, str] = {}  # problems whose tuning raised, and what
        self.demotions: dict[tuple[Problem, str], str] = {}  # candidates that raised after they had won, and what
        self.misses: Counter[Problem] = Counter()  # problems that were served untuned
        self._lengths_seen = LengthsSeen()
        self._stores: dict[str | None, Store] = {}
        self.tables.forget_manifests()
        self._fresh: dict[Key, Verdict] = {}  # verdicts for which there is nothing new to try
        self._checked: set[tuple[Any, ...]] = set()  # callers' own functions whose first output was checked
        self._said: set[str] = set()
        self._is_distributed = False  # at the last miss

    def clear(self) -> None:
        """See clear() below."""
        with self.lock:
            self._forget()
        entries.drop_all()

    def after_fork(self) -> None:
        """No other thread is left in the child: the lock is new, and nobody is tuning."""
        self.lock = RLock()
        self.being_tuned.clear()
        self.counts.renew_lock()

    # --- the verdict of a problem

    def store(self, settings: Settings) -> Store:
        """The Store of these Settings, one object per directory."""
        if settings.cache_dir not in self._stores:
            self._stores[settings.cache_dir] = store_of(settings)
        return self._stores[settings.cache_dir]

    def lengths_to_tune(self, problem: Problem, *, count_lengths: bool = True) -> Problem:
        """What is tuned for this problem: itself, or its bucket where lengths churn. count_lengths: note it as seen."""
        with self.lock:
            return self._lengths_seen.to_tune(problem, count_lengths)

    def find(
        self,
        problem: Problem,
        device: Device,
        settings: Settings,
        circumstances: Circumstances,
        *,
        count_lengths: bool = True,
    ) -> Verdict | None:
        """The verdict known for a problem: of the lengths it would be tuned with, or of any where nothing may be tuned."""
        if circumstances.deterministic:
            problem = problem.replace(deterministic=False)  # a winner found without that mode may serve
        lengths = ("kv", "all") if problem.q_len <= length_buckets.DECODE_Q_LEN else ("exact", "all")
        lengths = lengths[problem.lengths == "all" :]  # a graph that is for a bucket of each length
        may_tune = what_is_allowed(circumstances)[0] == TUNE and not problem.compiled  # which is tuned ahead alone
        may_read = not circumstances.capturing
        tables = self.tables.all(settings, device, may_read)
        names = [problem.bucketed(how) for how in lengths] if tables or not may_tune else []
        for table in tables:
            for name in names:
                if name in table and (not may_tune or self.is_complete(table[name], device, settings)):
                    return table[name]
        if circumstances.distributed:
            return None  # a private store is not consulted: all ranks must choose alike
        if may_tune:
            names = [self.lengths_to_tune(problem, count_lengths=count_lengths)]
        return next((v for name in names if (v := self._stored(name, device, settings, may_read)) is not None), None)

    def _stored(self, problem: Problem, device: Device, settings: Settings, may_read: bool = True) -> Verdict | None:
        """From memory, else from disk; an absence is remembered too, until this process tunes the problem."""
        name = (settings.cache_dir, device, problem)
        if name not in self.verdicts and may_read:
            verdict = self.store(settings).get(problem, device)
            with self.lock:
                self.verdicts.setdefault(name, verdict)
        return self.verdicts.get(name)

    def is_complete(self, verdict: Verdict | None, device: Device, settings: Settings) -> bool:
        """Whether every candidate there is today was tried, in the version that is installed.

        Where the caller chose the kernels, what is excluded for now is no reason to tune again.
        """
        if verdict is None:
            return False
        name = (settings.cache_dir, device, verdict.problem)
        if self._fresh.get(name) is verdict or (settings.kernels and verdict.is_lasting):
            return True  # installed libraries do not change while a process runs
        if not is_fresh(verdict, device, settings):
            return False
        with self.lock:
            self._fresh[name] = verdict
        return True

    def complete_verdict(self, problem: Problem, settings: Settings, compile_kernels: bool = False) -> Verdict | None:
        """The stored verdict of a problem, if every candidate was tried and timed in peace.

        compile_kernels: and none was left out because it must be compiled first.
        """
        device = Device.of(torch.device(problem.device))
        verdict = self._stored(problem, device, settings)
        is_done = verdict is not None and is_fresh(verdict, device, settings) and not verdict.is_open(compile_kernels)
        return verdict if is_done else None

    def keep(self, verdict: Verdict, settings: Settings, device: Device, on_disk: bool = True) -> None:
        """Publish a verdict in memory and, unless it is for this process only, on disk."""
        with self.lock:
            name = (settings.cache_dir, device, verdict.problem)
            # what is for another process to do again, or to finish, serves as long as this one
            if not on_disk or verdict.is_unfinished or name in self._fresh:
                self._fresh[name] = verdict
            self.verdicts[name] = verdict
        if on_disk and ranks() == 1:
            self.store(settings).put(verdict, device)

    def latest(self, verdict: Verdict, settings: Settings, device: Device) -> Verdict:
        """The newest Verdict of the same problem; an older Call may still hold an older one."""
        return self.verdicts.get((settings.cache_dir, device, verdict.problem)) or verdict

    def demote(self, verdict: Verdict, candidate: str, cause: str, settings: Settings, device: Device) -> bool:
        """Demote a candidate that raised, in memory and on disk; False if another call has done so already."""
        with self.lock:
            if (verdict.problem, candidate) in self.demotions:
                return False
            self.demotions[(verdict.problem, candidate)] = cause
            self.keep(self.latest(verdict, settings, device).demoted(candidate, cause), settings, device)
        entries.drop_all()
        return True

    def share(self, table: dict[Problem, Verdict]) -> None:
        """Use this table, the same on every rank, before anything else."""
        self.tables.of_ranks = table
        entries.drop_all()

    def held(self, settings: Settings) -> list[Verdict]:
        """The verdicts that this process holds in memory under these Settings."""
        with self.lock:
            found = list(self.verdicts.items())
        return [v for (directory, _, _), v in found if v is not None and directory == settings.cache_dir]

    # --- tuning

    def begin_tuning(self, problem: Problem, device: Device, settings: Settings, known: Verdict | None) -> bool:
        """Whether this thread is to tune: not where another one does, or has just done so."""
        with self.lock:
            now_known = self.verdicts.get((settings.cache_dir, device, problem))
            if problem in self.being_tuned or (now_known is not None and now_known is not known):
                return False
            self.being_tuned.add(problem)
            return True

    def end_tuning(self, problem: Problem, seconds: float) -> None:
        """The other side of begin_tuning(); seconds of the process's budget."""
        with self.lock:
            self.being_tuned.discard(problem)
            self.tuning_s += seconds
            self.counts.tunings += 1
            self.counts.tuning_s += seconds

    def is_spent(self, settings: Settings) -> bool:
        """Whether the process's tuning budget is used up."""
        return self.tuning_s >= settings.tune_budget

    # --- misses

    def record_miss(self, problem: Problem, why: str, circumstances: Circumstances) -> None:
        """Note a problem that is served untuned; the first of each reason is said, once, by one rank."""
        with self.lock:
            self.misses[problem] += 1
            is_first = why not in self._said
            self._said.add(why)
        if is_first and not (circumstances.distributed and torch.distributed.get_rank()):
            from fastattn.problems.spelling import command_line

            text = "not tuned, the default serves: %s. To tune it ahead: fastattn tune %s"
            log.warning(text, why, command_line(problem))

    def is_first_look(self, problem: Problem, candidate: str, score_mod: Any, mask: Any) -> bool:
        """Whether a caller's own function is new to a candidate: by its code, as a closure may be made anew for each call."""
        functions = (score_mod, getattr(mask, "mask_mod", None))
        name = (problem, candidate, *(getattr(f, "__code__", type(f)) for f in functions))
        with self.lock:
            is_new = name not in self._checked
            self._checked.add(name)
        return is_new

    def note_process_group_change(self, circumstances: Circumstances) -> None:
        """A process group that came or went since the last miss: the Calls published before it chose by other rules."""
        if circumstances.distributed != self._is_distributed:
            self._is_distributed = circumstances.distributed
            entries.drop_all()


session = Session()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=session.after_fork)


def clear() -> None:
    """Forget all that this process has learnt (not what is on disk): the next call of each kind is a miss again."""
    from fastattn.environment.remembered import forget  # here, as whoever remembers has it imported

    session.clear()
    forget()
