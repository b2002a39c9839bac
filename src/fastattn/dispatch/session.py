"""What this process has learnt: verdicts in memory over the store, lengths seen, misses, and who must forget when.

Every change happens under one lock, which is new after a fork. What is read on a hit is not here (api.py).
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import RLock
from typing import Any

import torch

from fastattn.dispatch.circumstances import TUNE, Circumstances, decide, ranks
from fastattn.environment.device import Device
from fastattn.environment.log import log
from fastattn.environment.settings import Settings, forget_calls
from fastattn.problems import length_buckets
from fastattn.problems.problem import Problem
from fastattn.tuning.freshness import is_stale
from fastattn.tuning.tune import NOT_COMPILED, is_crowded, is_open
from fastattn.verdicts import store
from fastattn.verdicts.verdict import Verdict


@dataclass(slots=True)
class _Process:
    """What this process has learnt. Every change happens under the lock; a fork gets a new one."""

    lock: RLock = field(default_factory=RLock)
    verdicts: dict[tuple[str | None, Device, Problem], Verdict | None] = field(default_factory=dict)
    families: dict[Problem, set[tuple[int, int, int]]] = field(default_factory=dict)
    stores: dict[str | None, store.Store] = field(default_factory=dict)
    shared: dict[Problem, Verdict] | None = None  # the table all ranks share
    manifests: dict[tuple[str, Device], dict[Problem, Verdict]] = field(default_factory=dict)
    tuning: set[Problem] = field(default_factory=set)
    untunable: dict[Problem, str] = field(default_factory=dict)  # problems whose tuning raised, and what
    buried: dict[tuple[Problem, str], str] = field(
        default_factory=dict
    )  # candidates that raised here, whoever chose them
    misses: dict[Problem, int] = field(default_factory=dict)
    spent_s: float = 0.0
    warned: set[str] = field(default_factory=set)
    looked: set[tuple[Any, ...]] = field(default_factory=set)  # a caller's own functions that were checked
    whole: dict[tuple[str | None, Device, Problem], Verdict] = field(
        default_factory=dict
    )  # nothing new to try for them
    distributed: bool = False  # at the last miss


state = _Process()


def clear() -> None:
    """Forget all that this process has learnt (not what is on disk): the next call of each kind is a miss again."""
    global state
    state = _Process(shared=state.shared, spent_s=state.spent_s)
    forget_calls()


def _after_fork() -> None:
    """No other thread is left in the child: locks are new, and nobody is tuning."""
    state.lock = RLock()
    state.tuning.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def settings_store(settings: Settings) -> store.Store:
    """The Store of a Config, one object per directory."""
    if settings.cache_dir not in state.stores:
        state.stores[settings.cache_dir] = store.of(settings)
    return state.stores[settings.cache_dir]


def lengths(problem: Problem, *, register: bool = True) -> Problem:
    """The problem that is tuned for this one: itself, or its bucket where lengths churn. register: count it as seen."""
    is_decode = problem.q_len <= length_buckets.DECODE_Q_LEN
    mine = (problem.batch, problem.q_len, 0 if is_decode else problem.kv_len)
    family = problem.family().replace(lengths="kv" if is_decode else "exact")
    with state.lock:
        seen = state.families.setdefault(family, set())
        if mine in seen or len(seen) < length_buckets.CHURN:
            if register:
                seen.add(mine)
            return problem.bucketed("kv") if is_decode else problem
    return problem.bucketed("all")


def find(
    problem: Problem, silicon: Device, settings: Settings, circumstances: Circumstances, *, register: bool = True
) -> Verdict | None:
    """The verdict known for a problem: of the lengths it would be tuned with, or of any where nothing may be tuned."""
    if circumstances.deterministic:
        # Nothing is tuned in that mode; a winner found without it may serve if its kernel is deterministic.
        problem = problem.replace(deterministic=False)
    named_so = [problem, problem.bucketed("kv"), problem.bucketed("all")]
    named_so = named_so[1:] if problem.q_len <= length_buckets.DECODE_Q_LEN else named_so[::2]
    may_read = not circumstances.capturing  # what was met before the capture serves; no file is opened in it
    for table in _tables(settings, silicon, may_read):
        for named in named_so:
            if named in table:
                return table[named]
    if circumstances.distributed:
        return None  # a private store is not consulted: all ranks must choose alike
    names = [lengths(problem, register=register)] if decide(circumstances)[0] == TUNE else named_so
    return next((v for named in names if (v := _stored(named, silicon, settings, may_read)) is not None), None)


def _tables(settings: Settings, silicon: Device, may_read: bool = True) -> list[dict[Problem, Verdict]]:
    tables = [state.shared] if state.shared is not None else []
    if settings.manifest is not None:
        name = (settings.manifest, silicon)
        if name not in state.manifests and may_read:
            try:
                state.manifests[name] = store.read_manifest(settings.manifest, silicon)
            except (OSError, ValueError) as error:
                state.manifests[name] = {}
                log.warning("%s", error)
        tables.append(state.manifests.get(name, {}))
    return tables


def _stored(problem: Problem, silicon: Device, settings: Settings, may_read: bool = True) -> Verdict | None:
    """From memory, else from disk; an absence is remembered too, until this process tunes the problem."""
    name = (settings.cache_dir, silicon, problem)
    if name not in state.verdicts and may_read:
        verdict = settings_store(settings).get(problem, silicon)
        with state.lock:
            state.verdicts.setdefault(name, verdict)
    return state.verdicts.get(name)


def is_complete(verdict: Verdict | None, silicon: Device, settings: Settings, problem: Problem) -> bool:
    """Whether every candidate there is today was tried, in the version that is installed.

    What the user has switched off for now is no reason to tune again: the next candidate of the verdict serves.
    """
    if verdict is None:
        return False
    if problem.off or settings.kernels:
        return True
    name = (settings.cache_dir, silicon, verdict.problem)
    if state.whole.get(name) is not verdict:  # installed libraries do not change while a process runs
        if is_stale(verdict, silicon, settings):
            return False
        state.whole[name] = verdict
    return True


def is_first_look(problem: Problem, score_mod: Any, mask: Any) -> bool:
    """Whether a caller's own function is new for this problem: by its code, as a closure may be made anew for each call."""
    functions = (score_mod, getattr(mask, "mask_mod", None))
    name = (problem, *(getattr(f, "__code__", type(f)) for f in functions))
    with state.lock:
        is_new = name not in state.looked
        state.looked.add(name)
    return is_new


def notice(circumstances: Circumstances) -> None:
    """A process group that came or went since the last miss: the Calls published before it chose by other rules."""
    if circumstances.distributed != state.distributed:
        state.distributed = circumstances.distributed
        forget_calls()


def is_spent(settings: Settings) -> bool:
    """Whether the process's tuning budget is used up."""
    return state.spent_s >= settings.tune_budget


def winners_nearby(problem: Problem, settings: Settings) -> list[str]:
    """Winners of the same family, then of the same dtype and direction, latest first: worth trying before the others."""
    family = problem.family()
    close, far = [], []
    for verdict in reversed(verdicts(settings)):
        other = verdict.problem
        if other.family() == family:
            close.append(verdict.winner)
        elif (other.dtype, other.needs_grad) == (problem.dtype, problem.needs_grad):
            far.append(verdict.winner)
    return list(dict.fromkeys([*close, *far]))


def keep(verdict: Verdict, settings: Settings, silicon: Device, on_disk: bool = True) -> None:
    """Publish a verdict in memory and, unless it is for this process only, on disk."""
    with state.lock:
        state.verdicts[(settings.cache_dir, silicon, verdict.problem)] = verdict
    if on_disk and ranks() == 1:
        settings_store(settings).put(verdict, silicon)


def latest(verdict: Verdict, settings: Settings, silicon: Device) -> Verdict:
    """What is held by now in place of a verdict that an older Call was made by."""
    return state.verdicts.get((settings.cache_dir, silicon, verdict.problem)) or verdict


def bury(verdict: Verdict, candidate: str, cause: str, settings: Settings, silicon: Device) -> bool:
    """Demote a candidate that raised, in memory and on disk; False if another call has done so already."""
    with state.lock:
        if (verdict.problem, candidate) in state.buried:
            return False
        state.buried[(verdict.problem, candidate)] = cause
        left = latest(verdict, settings, silicon).buried(candidate, cause)
    keep(left, settings, silicon)
    forget_calls()
    return True


def complete(problem: Problem, settings: Settings, compiling: bool = False) -> Verdict | None:
    """The stored verdict of a problem if every candidate was tried and timed in peace, none left out for lack of time.

    compiling: nor because it would have to compile.
    """
    silicon = Device.of(torch.device(problem.device))
    verdict = _stored(problem, silicon, settings)
    if verdict is None or is_stale(verdict, silicon, settings):
        return None
    left_open = any(is_open(t) or (compiling and t.reason == NOT_COMPILED) for t in verdict.trials)
    return None if left_open or is_crowded(verdict) else verdict


@contextmanager
def collected() -> Generator[dict[Problem, None]]:
    """Collect every problem that is resolved inside, in order."""
    met: dict[Problem, None] = {}
    collectors.append(met)
    try:
        yield met
    finally:
        collectors.remove(met)


collectors: list[dict[Problem, None]] = []


def record_miss(problem: Problem, why: str, circumstances: Circumstances) -> None:
    with state.lock:
        state.misses[problem] = state.misses.get(problem, 0) + 1
        first = why not in state.warned
        state.warned.add(why)
    if not first:
        return
    is_rank_0 = not circumstances.distributed or torch.distributed.get_rank() == 0
    if is_rank_0:
        log.warning("not tuned, the default serves: %s. To tune it ahead: fastattn tune %s", why, command_line(problem))


def command_line(p: Problem) -> str:
    """Arguments of `fastattn tune` that tune this problem."""
    heads = f"{p.q_heads}" if p.q_heads == p.kv_heads else f"{p.q_heads}/{p.kv_heads}"
    dims = f"{p.head_dim}" if p.head_dim == p.head_dim_v else f"{p.head_dim}/{p.head_dim_v}"
    words = [f"{p.batch}x{heads}x{p.q_len}x{p.kv_len}x{dims}", f"--dtype {p.dtype}"]
    words += [f"--causal {p.causal}"] if p.causal else []
    words += [f"--mask {p.mask}:{p.mask_shape}" + (":grad" if p.mask_grad else "")] if p.mask else []
    words += [f"--layout {p.layout}"] if p.layout != "bhsd" else []
    if p.layout != "bhsd" or set(p.strides) != {"contiguous"}:
        words += ["--strides " + ",".join(p.strides)]
    words += [f"--window {p.window[0]},{p.window[1]}"] if p.window else []
    words += [f"--softcap {p.softcap!r}"] if p.softcap else []
    words += ["--dropout"] if p.dropout else []
    words += ["--lse"] if p.lse else []
    words += [f"--cast-from {','.join(p.cast_from)}"] if p.cast_from else []
    words += [f"--device {p.device}"] if p.device != "cpu" else []
    words += [f"--accuracy {p.accuracy}"] if p.accuracy != "exact" else []
    words += ["--grad"] if p.needs_grad else []
    return " ".join(words)


def misses() -> dict[Problem, int]:
    """Problems that were served untuned in this process, and how often they missed."""
    return dict(state.misses)


def share(table: dict[Problem, Verdict]) -> None:
    """Use this table, the same on every rank, before anything else."""
    state.shared = table
    forget_calls()


def verdicts(settings: Settings) -> list[Verdict]:
    """The verdicts that this process holds in memory under these settings."""
    with state.lock:
        held = list(state.verdicts.items())
    return [v for (directory, _, _), v in held if v is not None and directory == settings.cache_dir]
