"""A miss from start to finish: circumstances, problem, memory, store, maybe a tuning, and the Call that serves."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn import (
    buckets,
    candidates,
    config,
    device,
    guards,
    inputs,
    kernels,
    masks,
    planning,
    store,
    traced,
    tuning,
    verifying,
)
from fastattn.config import Config, log
from fastattn.device import Device, has_torch_function, sdpa
from fastattn.errors import NoKernelError
from fastattn.inputs import CallKey, Options
from fastattn.kernel import Accepted, Decision, Rejected
from fastattn.layouts import TO_BHSD
from fastattn.problem import Problem, default_scale
from fastattn.verdict import Verdict


class Served(NamedTuple):
    """What a miss came to. reads: what a probe must compare; bucket: (k's length dimension, lowest, highest kv_len)."""

    call: planning.Call
    candidate: str
    why: str
    remember: bool = True
    reads: tuple[str, ...] = ()
    bucket: tuple[int, int, int] | None = None


@dataclass(slots=True)
class _Process:
    """What this process has learnt. Every change happens under the lock; a fork gets a new one."""

    lock: RLock = field(default_factory=RLock)
    verdicts: dict[tuple[str | None, Device, Problem], Verdict | None] = field(default_factory=dict)
    families: dict[Problem, set[tuple[int, int, int]]] = field(default_factory=dict)
    stores: dict[str | None, store.Store] = field(default_factory=dict)
    shared: dict[Problem, Verdict] | None = None  # the table all ranks share
    manifests: dict[str, dict[Problem, Verdict]] = field(default_factory=dict)
    tuning: set[Problem] = field(default_factory=set)
    misses: dict[Problem, int] = field(default_factory=dict)
    spent_s: float = 0.0
    warned: set[str] = field(default_factory=set)


_state = _Process()
_listeners: list[Callable[[], None]] = []


def on_forget(listener: Callable[[], None]) -> None:
    """Call `listener()` when published Calls are no longer to be trusted."""
    _listeners.append(listener)


def forget_calls() -> None:
    """Drop every published Call; verdicts stay."""
    for listener in _listeners:
        listener()


def clear() -> None:
    """Forget all that this process has learnt (not what is on disk): the next call of each kind is a miss again."""
    global _state
    _state = _Process(shared=_state.shared, spent_s=_state.spent_s)
    forget_calls()


_fork_listeners: list[Callable[[], None]] = []


def on_fork(listener: Callable[[], None]) -> None:
    """Call `listener()` in a forked child."""
    _fork_listeners.append(listener)


def _after_fork() -> None:
    """No other thread is left in the child: locks are new, and nobody is tuning."""
    _state.lock = RLock()
    _state.tuning.clear()
    for listener in _fork_listeners:
        listener()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def settings_store(settings: Config) -> store.Store:
    """The Store of a Config, one object per directory."""
    if settings.cache_dir not in _state.stores:
        _state.stores[settings.cache_dir] = store.of(settings)
    return _state.stores[settings.cache_dir]


# --- the two front doors


def attention(q: Any, k: Any, v: Any, mask: Any, layout: str, given: dict[str, Any]) -> Served:
    """Resolve a call of attention(). Raises what `fastattn.attention` documents."""
    options = inputs.parse(given)
    settings = config.current()
    inputs.check_layout(layout)
    if all(isinstance(x, Tensor) for x in (q, k, v)) or has_torch_function(q, k, v):
        is_bias = inputs.as_structured(mask) is not mask
        tensors = [q, k, v, *([mask] if isinstance(mask, Tensor) else [])]
        circumstances = guards.context([q, k, v] if is_bias else tensors, settings, is_spent(settings))
        if guards.decide(circumstances)[0] == guards.PASS and not (options.kernel and not circumstances.off):
            return _passed(guards.decide(circumstances)[1], layout, options)
    else:
        circumstances = guards.Context()
    key = inputs.call_key(q, k, v, mask, layout, options)
    return _resolve(key, settings, circumstances, (q, k, v, mask))


def drop_in(q: Any, k: Any, v: Any, mask: Any, dropout_p: Any, is_causal: Any, scale: Any, enable_gqa: Any) -> Served:
    """Resolve a call of sdpa(): what F.sdpa would take and we can serve, else F.sdpa itself."""
    settings = config.current()
    own = Served(
        lambda q, k, v, mask: sdpa(q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa),
        "default", "F.sdpa as it was called", remember=False,
    )  # fmt: skip
    tensors = [x for x in (q, k, v, mask) if x is not None]
    plain = (
        all(isinstance(x, Tensor) for x in tensors)
        and len(tensors) == 3 + (mask is not None)
        and type(is_causal) is bool and type(enable_gqa) is bool
        and type(dropout_p) in (float, int) and dropout_p == 0
        and (scale is None or type(scale) is float)
    )  # fmt: skip
    if not plain:
        return own
    circumstances = guards.context(tensors, settings, is_spent(settings))
    if guards.decide(circumstances)[0] == guards.PASS:
        return own
    if q.dim() != 4 or (q.shape[1] != k.shape[1] and not enable_gqa) or (mask is not None and is_causal):
        return own
    try:
        key = inputs.call_key(q, k, v, mask, "bhsd", Options(is_causal=is_causal, scale=scale))
    except (TypeError, ValueError, RuntimeError, IndexError):
        return own  # F.sdpa takes some of these, and says what is wrong with the others
    return _resolve(key, settings, circumstances, (q, k, v, mask))


def _passed(why: str, layout: str, options: Options) -> Served:
    def call(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        return traced.default(q, k, v, mask, layout, options.is_causal, options.scale)

    return Served(call, "default", why, remember=False)


def traced_winner(
    facts: Any, layout: str, is_causal: bool, scale: float | None, kernel: str | None, accuracy: Any
) -> str:
    """What traced.winner asks for: the name under which the stored winner's Call is left in traced.CALLS, or ""."""
    settings = config.current()
    q, k, v = (spec_of(f, layout) for f in facts[:3])
    mask = spec_of(facts[3], "bhsd") if facts[3] is not None else masks.Causal(facts[4]) if facts[4] else None
    kind = q.device.type
    circumstances = guards.Context(
        off=settings.mode == "off",
        other_device=kind not in ("cpu", "cuda"),
        restricted=not device.unrestricted(),
        empty=any(0 in s.shape for s in (q, k, v)),
        deterministic=device.deterministic(),
        distributed=guards.ranks() > 1,
        compiling=True,
    )
    options = Options(is_causal=is_causal, scale=scale, kernel=kernel, accuracy=accuracy)
    action, why = guards.decide(circumstances)
    if action == guards.PASS and not (kernel and not circumstances.off):
        return ""
    key = CallKey(q, k, v, mask, layout, options, device.state(kind))
    inputs.check(key)
    problem, silicon = Problem.from_key(key, settings.accuracy), Device.of(q.device)
    if kernel is not None:
        chosen = ordered(kernel, problem, silicon, settings)
    else:
        verdict = find(problem, silicon, settings, circumstances)
        if verdict is None:
            _record_miss(problem, why, circumstances)
            return ""
        order = chain(verdict, problem, silicon, settings, but=("chunks",))  # a loop would be unrolled into the graph
        chosen = order[0]
        if chosen.kernel.name == "default":
            return ""
    name = f"{problem.digest} {chosen.name} {scale}"
    traced.CALLS[name] = _bind(chosen, problem, key, isinstance(mask, masks.Causal))
    return name


traced.find = traced_winner


def spec_of(facts: tuple[Any, ...], layout: str) -> inputs.Spec:
    """A Spec of the (b, h, s, d) view from (shape, stride, dtype, device, requires_grad) in a layout."""
    shape, stride, dtype, on, requires_grad = facts
    order = TO_BHSD[layout] if len(shape) == 4 else range(len(shape))
    return inputs.Spec(tuple(shape[i] for i in order), tuple(stride[i] for i in order), dtype, on, requires_grad)


# --- one problem


def _resolve(key: CallKey, settings: Config, circumstances: guards.Context, given: tuple[Any, ...]) -> Served:
    problem = Problem.from_key(key, settings.accuracy)
    silicon = Device.of(key.q.device)
    structured = isinstance(key.mask, masks.Causal)
    for met in _collectors:
        met[problem] = None
    if key.options.kernel is not None:
        chosen = ordered(key.options.kernel, problem, silicon, settings)
        call = planning.bind(chosen, problem, key.options.scale, structured=structured)
        return Served(call, chosen.name, "ordered", guards.may_remember(circumstances), _reads(chosen, problem, settings))
    action, why = guards.decide(circumstances)
    verdict = find(problem, silicon, settings, circumstances)
    if action == guards.TUNE and not _is_complete(verdict, silicon, settings):
        verdict, why = _tune_once(lengths(problem), settings, key, given, verdict)
        if verdict is None:  # another thread is at it
            default = _default(problem, silicon, settings)
            return Served(_bind(default, problem, key, structured), default.name, why, remember=False)
    elif verdict is None:
        _record_miss(problem, why, circumstances)
    return _serve(verdict, problem, silicon, settings, key, structured, why, guards.may_remember(circumstances))


def lengths(problem: Problem, *, register: bool = True) -> Problem:
    """The problem that is tuned for this one: itself, or its bucket where lengths churn. register: count it as seen."""
    is_decode = problem.q_len <= buckets.DECODE_Q_LEN
    mine = (problem.batch, problem.q_len, 0 if is_decode else problem.kv_len)
    family = problem.family().replace(lengths="kv" if is_decode else "exact")
    with _state.lock:
        seen = _state.families.setdefault(family, set())
        if mine in seen or len(seen) < buckets.CHURN:
            if register:
                seen.add(mine)
            return problem.bucketed("kv") if is_decode else problem
    return problem.bucketed("all")


def find(
    problem: Problem, silicon: Device, settings: Config, circumstances: guards.Context, *, register: bool = True
) -> Verdict | None:
    """The verdict known for a problem: of the lengths it would be tuned with, or of any where nothing may be tuned."""
    if circumstances.deterministic:
        # Nothing is tuned in that mode; a winner found without it may serve if its kernel is deterministic.
        problem = problem.replace(deterministic=False)
    named_so = [problem, problem.bucketed("kv"), problem.bucketed("all")]
    named_so = named_so[1:] if problem.q_len <= buckets.DECODE_Q_LEN else named_so[::2]
    for table in _tables(settings, silicon):
        for named in named_so:
            if named in table:
                return table[named]
    if circumstances.distributed:
        return None  # a private store is not consulted: all ranks must choose alike
    names = [lengths(problem, register=register)] if guards.decide(circumstances)[0] == guards.TUNE else named_so
    return next((v for named in names if (v := _stored(named, silicon, settings)) is not None), None)


def _tables(settings: Config, silicon: Device) -> list[dict[Problem, Verdict]]:
    tables = [_state.shared] if _state.shared is not None else []
    if settings.manifest is not None:
        if settings.manifest not in _state.manifests:
            try:
                _state.manifests[settings.manifest] = store.read_manifest(settings.manifest, silicon)
            except (OSError, ValueError) as error:
                _state.manifests[settings.manifest] = {}
                log.warning("%s", error)
        tables.append(_state.manifests[settings.manifest])
    return tables


def _stored(problem: Problem, silicon: Device, settings: Config) -> Verdict | None:
    """From memory, else from disk; an absence is remembered too, until this process tunes the problem."""
    name = (settings.cache_dir, silicon, problem)
    if name not in _state.verdicts:
        verdict = settings_store(settings).get(problem, silicon)
        with _state.lock:
            _state.verdicts.setdefault(name, verdict)
    return _state.verdicts[name]


def _is_complete(verdict: Verdict | None, silicon: Device, settings: Config) -> bool:
    """Whether every candidate there is today was tried, in the version that is installed."""
    return verdict is not None and not tuning.changed(verdict, silicon, settings)


def is_spent(settings: Config) -> bool:
    """Whether the process's tuning budget is used up."""
    return _state.spent_s >= settings.tune_budget


def _tune_once(
    problem: Problem, settings: Config, key: CallKey, given: tuple[Any, ...], known: Verdict | None
) -> tuple[Verdict | None, str]:
    """Tune on this thread unless another one does; (verdict, why)."""
    with _state.lock:
        if problem in _state.tuning:
            return None, "another thread is tuning this problem"
        _state.tuning.add(problem)
    start = time.perf_counter()
    try:
        q, k, v, mask = given
        scale = key.options.scale if key.options.scale is not None else default_scale(key.q.shape[3])
        look = _look(problem, settings, key, q, k, v, mask, scale)
        prior = _winners_nearby(problem, settings)
        return tune(problem, settings, key.q.device, look=look, known=known, prior=prior), "tuned now"
    finally:
        with _state.lock:
            _state.tuning.discard(problem)
            _state.spent_s += time.perf_counter() - start


def _winners_nearby(problem: Problem, settings: Config) -> list[str]:
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


def _look(
    problem: Problem, settings: Config, key: CallKey, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float
) -> Callable[[Accepted], verifying.Errors]:
    """Check a candidate on a slice of the caller's own tensors."""
    exact = Problem.from_key(key, settings.accuracy)
    dense = mask if isinstance(mask, Tensor) and not isinstance(key.mask, masks.Causal) else None
    judge: list[verifying.Judge] = []

    def look(candidate: Accepted) -> verifying.Errors:
        if not judge:
            judge.append(verifying.judge_of_call(exact, q, k, v, dense, scale))
        return judge[0].errors(planning.bind(candidate, judge[0].sample.problem, scale))

    return look


def tune(problem: Problem, settings: Config, on: torch.device | None = None, **how: Any) -> Verdict:
    """Tune a problem and publish the verdict in memory and on disk. Keyword arguments as fastattn.tuning.tune."""
    on = on or torch.device(problem.device)
    with (
        torch.enable_grad() if problem.needs_grad else torch.no_grad(),
        torch.autocast(on.type, enabled=False),
        # not the caller's hooks (checkpointing, save_on_cpu): they would see, and pay for, our tensors
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
    ):
        verdict = tuning.tune(problem, settings, device=on, **how)
    keep(verdict, settings, Device.of(on))
    return verdict


def keep(verdict: Verdict, settings: Config, silicon: Device) -> None:
    """Publish a verdict in memory and on disk."""
    with _state.lock:
        _state.verdicts[(settings.cache_dir, silicon, verdict.problem)] = verdict
    settings_store(settings).put(verdict, silicon)


def complete(problem: Problem, settings: Config) -> Verdict | None:
    """The stored verdict of a problem if every candidate was tried, none left out for lack of time."""
    silicon = Device.of(torch.device(problem.device))
    verdict = _stored(problem, silicon, settings)
    if verdict is None or tuning.changed(verdict, silicon, settings):
        return None
    return None if any(t.reason == tuning.NOT_TRIED for t in verdict.trials) else verdict


@contextmanager
def collected() -> Generator[dict[Problem, None]]:
    """Collect every problem that is resolved inside, in order."""
    met: dict[Problem, None] = {}
    _collectors.append(met)
    try:
        yield met
    finally:
        _collectors.remove(met)


_collectors: list[dict[Problem, None]] = []


def _record_miss(problem: Problem, why: str, circumstances: guards.Context) -> None:
    with _state.lock:
        _state.misses[problem] = _state.misses.get(problem, 0) + 1
        first = why not in _state.warned
        _state.warned.add(why)
    if not first:
        return
    is_rank_0 = not circumstances.distributed or torch.distributed.get_rank() == 0
    if is_rank_0:
        log.warning(
            "not tuned, the default serves: %s. To tune it ahead: fastattn tune %s", why, command_line(problem)
        )


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
    words += ["--grad"] if p.needs_grad else []
    return " ".join(words)


def misses() -> dict[Problem, int]:
    """Problems that were served untuned in this process, and how often they missed."""
    return dict(_state.misses)


# --- choosing and binding


def ordered(name: str, problem: Problem, silicon: Device, settings: Config) -> Accepted:
    """The candidate that `kernel=name` means. Raises NoKernelError with the reasons, ValueError for an unknown name."""
    base = name.split("+", maxsplit=1)[0]
    if base not in kernels.names():
        raise ValueError(f"unknown kernel {name!r}; known: {', '.join(kernels.names())}")
    found = candidates.decisions(problem, silicon, settings)
    named = candidates.by_name(name, found)
    if named:
        return named[0]
    mine = [d for d in found if d.kernel.name == base]
    reasons = [r for d in mine if isinstance(d, Rejected) for r in d.reasons]
    reasons = reasons or [f"its candidates here are {', '.join(d.name for d in mine)}"]
    raise NoKernelError(f"kernel {name!r} cannot run {problem}: {'; '.join(reasons)}", found)


def _default(problem: Problem, silicon: Device, settings: Config) -> Accepted:
    found = candidates.decisions(problem, silicon, settings)
    return planning.fallbacks(problem, silicon, settings, found)[0]


def _serve(
    verdict: Verdict | None,
    problem: Problem,
    silicon: Device,
    settings: Config,
    key: CallKey,
    structured: bool,
    why: str,
    remember: bool,
) -> Served:
    order = chain(verdict, problem, silicon, settings)
    chosen = order[0]
    call = _bind(chosen, problem, key, structured)
    if chosen.kernel.name != "default":
        call = _rescued(call, chosen, verdict, problem, settings, key, structured)
    reads = _reads(chosen, problem, settings)
    return Served(call, chosen.name, why, remember, reads, _bucket(problem, key))


def chain(
    verdict: Verdict | None, problem: Problem, silicon: Device, settings: Config, but: Sequence[str] = ()
) -> Sequence[Accepted]:
    """What may run, in order: the verdict's candidates that can do this very problem, else the fallback chain.

    but: conversions that are out of question.
    """
    served: list[Accepted] = []
    rows = {kernel.name: kernel for kernel in kernels.rows_for(silicon.type)}
    for name in verdict.ranked() if verdict is not None else ():
        kernel = rows.get(name.split("+")[0])
        if kernel is None or set(name.split("+")[1:]) & set(but):
            continue
        served += candidates.by_name(name, candidates.decide(kernel, problem, silicon, settings))
        if served and served[0].kernel.name == "default":
            return served
        if served:
            break
    return served or _fallbacks(verdict, problem, silicon, settings)


def _fallbacks(verdict: Verdict | None, problem: Problem, silicon: Device, settings: Config) -> list[Accepted]:
    """planning.fallbacks, without a default that this problem's own tuning found wrong while others were right."""
    found = planning.fallbacks(problem, silicon, settings, candidates.decisions(problem, silicon, settings))
    incumbent = verdict.trial(verdict.incumbent) if verdict is not None else None
    is_wrong = incumbent is not None and incumbent.reason is not None and verdict and verdict.ranked()
    return [c for c in found if c.kernel.name != "default"] if is_wrong else found


def _bind(candidate: Accepted, problem: Problem, key: CallKey, structured: bool) -> planning.Call:
    return planning.bind(candidate, problem, key.options.scale, structured=structured)


def _reads(chosen: Accepted, problem: Problem, settings: Config) -> tuple[str, ...]:
    """The state that this Call depends on and TensorGuards does not see."""
    reads = ["deterministic"]
    if problem.asks_grad:
        reads.append("grad")
    if chosen.kernel.name != "default":
        reads += ["unrestricted", *([chosen.kernel.switch] if chosen.kernel.switch else []), *chosen.kernel.reads]
        if problem.device == "cpu":
            reads.append("threads")
    if problem.autocast:
        reads.append(f"autocast_{problem.device}")
    if config.scopes_used:
        reads.append("config")
    return tuple(reads)


def _bucket(problem: Problem, key: CallKey) -> tuple[int, int, int] | None:
    """A decode's entry serves its whole kv bucket; lengths up to 16 are exact, as there corners may coincide."""
    if problem.q_len > buckets.DECODE_Q_LEN or problem.kv_len <= buckets.DECODE_Q_LEN or key.mask is not None:
        return None
    low, high = buckets.bounds(problem.kv_len)
    return TO_BHSD[problem.layout][2], low, high


def _rescued(
    call: planning.Call,
    chosen: Accepted,
    verdict: Verdict | None,
    problem: Problem,
    settings: Config,
    key: CallKey,
    structured: bool,
) -> planning.Call:
    """The Call, with the fallback chain behind it: a winner that raises is answered in the same call and demoted."""

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        try:
            return call(q, k, v, mask)
        except Exception as error:
            if _is_not_its_own(error):
                raise
            return _rescue(error, chosen, verdict, problem, settings, key, structured, (q, k, v, mask))

    return run


def _is_not_its_own(error: Exception) -> bool:
    """Out of memory, a sticky CUDA error, or what a hook of the caller raises through the kernel (checkpoint, to stop early)."""
    is_hook = type(error).__module__.startswith("torch.utils.checkpoint")
    return is_hook or isinstance(error, torch.OutOfMemoryError) or "CUDA error" in str(error)


def _rescue(
    error: Exception,
    failed: Accepted,
    verdict: Verdict | None,
    problem: Problem,
    settings: Config,
    key: CallKey,
    structured: bool,
    given: tuple[Any, ...],
) -> Tensor:
    silicon = Device.of(given[0].device)
    cause = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    left = verdict.buried(failed.name, cause) if verdict is not None else None
    found = candidates.decisions(problem, silicon, settings)
    order: list[Decision] = [d for name in (left.ranked() if left else ()) for d in candidates.by_name(name, found)]
    order += _fallbacks(verdict, problem, silicon, settings)
    for candidate in order:
        if not isinstance(candidate, Accepted) or candidate == failed:
            continue
        try:
            out = _bind(candidate, problem, key, structured)(*given)
        except Exception:
            continue
        log.warning("kernel %s raised (%s) on %s; %s serves from now on", failed.name, cause, problem, candidate.name)
        if left is not None:
            keep(left, settings, silicon)
        forget_calls()
        return out
    raise error


# --- ranks


def share(table: dict[Problem, Verdict]) -> None:
    """Use this table, the same on every rank, before anything else."""
    _state.shared = table
    forget_calls()


def verdicts(settings: Config) -> list[Verdict]:
    """The verdicts that this process holds in memory under these settings."""
    return [v for (directory, _, _), v in _state.verdicts.items() if v is not None and directory == settings.cache_dir]
