"""A miss from start to finish: circumstances, problem, what is known, maybe a tuning, and the Call that serves."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.dispatch import compiled, fallback, session
from fastattn.dispatch.circumstances import PASS, TUNE, Circumstances, decide, may_remember, ranks, read_circumstances
from fastattn.environment import torch_private, torch_state
from fastattn.environment.device import Device
from fastattn.environment.log import log
from fastattn.environment.settings import Settings, current_settings, scopes_used
from fastattn.environment.torch_private import has_torch_function, sdpa
from fastattn.kernels.libraries import availability
from fastattn.planning import binding, candidates, default_choice
from fastattn.planning.conversions import blocks
from fastattn.planning.decision import Accepted
from fastattn.problems import call_key, call_options, length_buckets, masks
from fastattn.problems.call_key import CallKey
from fastattn.problems.call_options import CallOptions
from fastattn.problems.layouts import TO_BHSD
from fastattn.problems.problem import INT32, Problem, default_scale
from fastattn.tuning.accuracy import dropout
from fastattn.tuning.accuracy.budgets import Errors
from fastattn.tuning.accuracy.judge import Judge, errors_of_custom, judge_of_call
from fastattn.tuning.tune import is_lasting, tune_problem
from fastattn.verdicts.verdict import Verdict


class Served(NamedTuple):
    """What a miss came to. reads: what a probe must compare; bucket: (k's length dimension, lowest, highest kv_len)."""

    call: binding.Call
    candidate: str
    why: str
    remember: bool = True
    reads: tuple[str, ...] = ()
    bucket: tuple[int, int, int] | None = None


def attention(q: Any, k: Any, v: Any, mask: Any, layout: str, given: dict[str, Any]) -> Served:
    """Resolve a call of attention(). Raises what `fastattn.attention` documents."""
    options = call_options.parse_options(given)
    settings = current_settings()
    call_options.check_layout(layout)
    if all(isinstance(x, Tensor) for x in (q, k, v)) or has_torch_function(q, k, v):
        circumstances = read_circumstances(call_key.tensors_of(q, k, v, mask), settings, session.is_spent(settings))
        if decide(circumstances)[0] == PASS and not (options.kernel and not circumstances.off):
            is_custom = options.score_mod is not None or call_key.is_block_mask(mask)
            return _passed(decide(circumstances)[1], layout, options, is_custom)
    else:
        circumstances = Circumstances()
    key = call_key.call_key(q, k, v, mask, layout, options)
    served = _resolve(key, settings, circumstances, (q, k, v, mask))
    # torch's causal biases are a Tensor subclass: no probe could match one
    is_probed = not isinstance(mask, Tensor) or call_key.as_structured(mask) is mask
    return served if is_probed else served._replace(remember=False)


def drop_in(q: Any, k: Any, v: Any, mask: Any, dropout_p: Any, is_causal: Any, scale: Any, enable_gqa: Any) -> Served:
    """Resolve a call of sdpa(): what F.sdpa would take and we can serve, else F.sdpa itself."""
    settings = current_settings()
    own = Served(
        lambda q, k, v, mask: sdpa(q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa),
        "default", "F.sdpa as it was called", remember=False,
    )  # fmt: skip
    tensors = [x for x in (q, k, v, mask) if x is not None]
    plain = (
        all(isinstance(x, Tensor) for x in tensors)
        and len(tensors) == 3 + (mask is not None)
        and type(is_causal) is bool and type(enable_gqa) is bool
        and type(dropout_p) in (float, int) and 0 <= dropout_p <= 1
        and (scale is None or type(scale) is float)
    )  # fmt: skip
    if not plain:
        return own
    circumstances = read_circumstances(tensors, settings, session.is_spent(settings))
    if decide(circumstances)[0] == PASS:
        return own
    if not q.dim() == k.dim() == v.dim() == 4 or (mask is not None and is_causal):
        return own
    if q.shape[1] != k.shape[1] and not enable_gqa:
        return own
    try:
        key = call_key.call_key(
            q, k, v, mask, "bhsd", CallOptions(is_causal=is_causal, scale=scale, dropout_p=dropout_p)
        )
    except (TypeError, ValueError, RuntimeError, IndexError):
        return own  # F.sdpa takes some of these, and says what is wrong with the others
    return _resolve(key, settings, circumstances, (q, k, v, mask))


def _passed(why: str, layout: str, options: CallOptions, is_custom: bool) -> Served:
    def call(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        return compiled.default(q, k, v, mask, layout, options)

    return Served(
        call, default_choice.untuned_name(options.softcap > 0 or options.return_lse, is_custom), why, remember=False
    )


def traced_winner(facts: Any, layout: str, asked: tuple[Any, ...]) -> str:
    """What traced.winner asks for: the name under which the stored winner's Call is left in traced.CALLS, or ""."""
    settings = current_settings()
    q, k, v = (spec_of(f, layout) for f in facts[:3])
    mask = spec_of(facts[3], "bhsd") if facts[3] is not None else masks.Causal(facts[4]) if facts[4] else None
    kind = q.device.type
    circumstances = Circumstances(
        off=settings.mode == "off",
        other_device=kind not in ("cpu", "cuda"),
        restricted=not torch_private.not_inside_sdpa_kernel(),
        empty=any(0 in s.shape for s in (q, k, v)),
        deterministic=torch_private.deterministic(),
        distributed=ranks() > 1,
        compiling=True,
    )
    options = CallOptions(**dict(zip(compiled.ASKED, asked, strict=True)))
    kernel = options.kernel
    action, why = decide(circumstances)
    if action == PASS and not (kernel and not circumstances.off):
        return ""
    key = CallKey(q, k, v, mask, layout, options, torch_state.torch_state(kind))
    call_key.check_call(key)
    problem, silicon = Problem.from_key(key, settings.accuracy), Device.of(q.device)
    if kernel is not None:
        chosen = fallback.ordered(kernel, problem, silicon, settings)
    else:
        verdict = session.find(problem, silicon, settings, circumstances)
        if verdict is None:
            session.record_miss(problem, why, circumstances)
            return ""
        order = fallback.chain(verdict, problem, silicon, settings, tracing=True)
        chosen = order[0]
        if chosen.kernel.name == "default" or blocks.IN_BLOCKS & set(chosen.conversions):
            return ""
    name = f"{problem.digest} {chosen.name} {options.scale} {options.dropout_p} {problem.cut}"
    compiled.CALLS[name] = fallback.bind(chosen, problem, key, isinstance(mask, masks.Causal))
    return name


def spec_of(facts: tuple[Any, ...], layout: str) -> call_key.TensorSpec:
    """A Spec of the (b, h, s, d) view from (shape, stride, dtype, device, requires_grad) in a layout."""
    shape, stride, dtype, on, requires_grad = facts
    order = TO_BHSD[layout] if len(shape) == 4 else range(len(shape))
    return call_key.TensorSpec(
        tuple(shape[i] for i in order), tuple(stride[i] for i in order), dtype, on, requires_grad
    )


def _resolve(key: CallKey, settings: Settings, circumstances: Circumstances, given: tuple[Any, ...]) -> Served:
    session.notice(circumstances)
    problem = Problem.from_key(key, settings.accuracy)
    silicon = Device.of(key.q.device)
    structured = isinstance(key.mask, masks.Causal)
    for met in session.collectors:
        met[problem] = None
    if key.options.kernel is not None:
        chosen = fallback.ordered(key.options.kernel, problem, silicon, settings)
        call = fallback.bind(chosen, problem, key, structured)
        reads, bucket = _reads(chosen, problem, settings), _bucket(problem, key, chosen, silicon, settings)
        return Served(call, chosen.name, "ordered", may_remember(circumstances), reads, bucket)
    action, why = decide(circumstances)
    if problem.is_custom:
        chosen = fallback.last_resorts(None, problem, silicon, settings)[0]
        call = fallback.bind(chosen, problem, key, structured)
        if action == TUNE and session.is_first_look(problem, key.options.score_mod, key.mask):
            _check_custom(call, chosen, problem, key, given)
        remember = may_remember(circumstances)
        return Served(call, chosen.name, "nothing else can", remember, _reads(chosen, problem, settings))
    if key.options.dropout_p == 1:  # everything is dropped, which some libraries refuse to do
        chosen = fallback.last_resorts(None, problem, silicon, settings)[0]
        call = fallback.bind(chosen, problem, key, structured)
        return Served(call, chosen.name, "dropout_p 1 leaves nothing", remember=False)
    verdict = session.find(problem, silicon, settings, circumstances)
    if action == TUNE and not session.is_complete(verdict, silicon, settings, problem):
        verdict, why = _tune_once(session.lengths(problem), settings, key, given, verdict)
        if verdict is None:  # another thread is at it
            default = fallback.last_resorts(None, problem, silicon, settings)[0]
            return Served(fallback.bind(default, problem, key, structured), default.name, why, remember=False)
    elif verdict is None:
        session.record_miss(problem, why, circumstances)
    return _serve(verdict, problem, silicon, settings, key, structured, why, circumstances)


def _check_custom(call: binding.Call, chosen: Accepted, problem: Problem, key: CallKey, given: tuple[Any, ...]) -> None:
    """A caller's own function cannot be checked ahead: the kernel's first output is, on the caller's tensors."""
    heads, keys = (torch.arange(n, device=key.q.device) for n in (problem.group, problem.kv_len))
    first = heads.new_zeros(())
    score_mod = key.options.score_mod

    def change(scores: Tensor, rows: Tensor) -> Tensor:
        if score_mod is not None:
            scores = _for_each(score_mod, scores)(scores, first, heads, rows, keys)
        if call_key.is_block_mask(key.mask):
            seen = _for_each(key.mask.mask_mod)(first, heads, rows, keys)
            scores = scores.masked_fill(seen.logical_not(), float("-inf"))
        lower, upper = masks.band(problem.causal, problem.window, problem.q_len, problem.kv_len)
        if problem.is_banded:
            seen = masks.visible(scores, problem.q_len, problem.kv_len, lower, upper)[rows]
            scores = scores.masked_fill(seen.logical_not(), float("-inf"))
        return scores

    scale = key.options.scale if key.options.scale is not None else default_scale(key.q.shape[3])
    try:  # in the caller's grad mode: what is compiled here is what the call runs
        errors = errors_of_custom(call, problem, given, scale, change)
    except Exception as error:
        log.warning("kernel %s could not be checked on %s: %s: %s", chosen.name, problem, type(error).__name__, error)
        return
    if errors is not None and not errors.passed:
        log.warning(
            "kernel %s is off by %.3g budgets on %s; nothing else can do it", chosen.name, errors.forward, problem
        )


def _for_each(function: Callable[..., Tensor], *scores: Tensor) -> Callable[..., Tensor]:
    """A function of (score,) b, h, i, j, which are scalars, over all heads, rows and keys."""
    for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None)):
        function = torch.vmap(function, in_dims=(*(0 for _ in scores), *dims))
    return function


def _tune_once(
    problem: Problem, settings: Settings, key: CallKey, given: tuple[Any, ...], known: Verdict | None
) -> tuple[Verdict | None, str]:
    """Tune on this thread unless another one does; (verdict, why)."""
    with session.state.lock:
        if problem in session.state.tuning:
            return None, "another thread is tuning this problem"
        if problem in session.state.untunable:
            return None, session.state.untunable[problem]
        now_known = session.state.verdicts.get((settings.cache_dir, Device.of(key.q.device), problem))
        if now_known is not None and now_known is not known:
            return now_known, "another thread has just tuned it"
        session.state.tuning.add(problem)
    start, loaded = time.perf_counter(), availability.loading_s
    try:
        q, k, v, mask = _visible_part(key, given)
        scale = key.options.scale if key.options.scale is not None else default_scale(key.q.shape[3])
        look = _look(problem, settings, key, q, k, v, mask, scale)
        prior = session.winners_nearby(problem, settings)
        return tune(problem, settings, key.q.device, look=look, known=known, prior=prior), "tuned now"
    except Exception as error:
        why = f"tuning failed: {type(error).__name__}: {error}"
        log.warning("%s on %s; the default serves", why, problem)
        session.state.untunable[problem] = why
        return None, why
    finally:
        with session.state.lock:
            session.state.tuning.discard(problem)
            session.state.spent_s += time.perf_counter() - start - (availability.loading_s - loaded)


def _visible_part(key: CallKey, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The caller's tensors, keys and values as far as the problem's one query sees them."""
    cut = Problem.from_key(key).cut
    if cut is None:
        return given
    q, k, v, _ = given
    dim = TO_BHSD[key.layout][2]
    first, last = cut.keys(k.shape[dim])
    return q, k.narrow(dim, first, last - first), v.narrow(dim, first, last - first), None


def _look(
    problem: Problem, settings: Settings, key: CallKey, q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float
) -> Callable[[Accepted], Errors]:
    """Check a candidate on a slice of the caller's own tensors."""
    exact = Problem.from_key(key, settings.accuracy).replace(cut=None)
    dense = mask if isinstance(mask, Tensor) and not isinstance(key.mask, masks.Causal) else None
    judges: list[Judge | None] = []

    def look(candidate: Accepted) -> Errors:
        if not judges:
            judges.append(judge_of_call(exact, q, k, v, dense, scale))
        judge = judges[0]
        return judge.errors(binding.bind(candidate, judge.sample.problem, scale)) if judge else Errors(0.0)

    return look


def tune(problem: Problem, settings: Settings, on: torch.device | None = None, **how: Any) -> Verdict:
    """Tune a problem and publish the verdict in memory and on disk. Keyword arguments as fastattn.tuning.tune."""
    problem = problem.replace(cut=None)  # what is tuned is the slice itself
    on = on or torch.device(problem.device)
    with (
        torch.cuda.device(on) if on.type == "cuda" else contextlib.nullcontext(),  # its streams and events are meant
        torch.enable_grad() if problem.needs_grad else torch.no_grad(),
        torch.autocast(on.type, enabled=False),
        dropout.preserve_rng(on) if problem.dropout else contextlib.nullcontext(),
        # not the caller's hooks (checkpointing, save_on_cpu): they would see, and pay for, our tensors
        torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
    ):
        verdict = tune_problem(problem, settings, device=on, **how)
    session.keep(verdict, settings, Device.of(on), on_disk=is_lasting(verdict))
    return verdict


def _serve(
    verdict: Verdict | None,
    problem: Problem,
    silicon: Device,
    settings: Settings,
    key: CallKey,
    structured: bool,
    why: str,
    circumstances: Circumstances,
) -> Served:
    chosen = fallback.chain(verdict, problem, silicon, settings, capturing=circumstances.capturing)[0]
    call = fallback.bind(chosen, problem, key, structured)
    if chosen.kernel.name != "default":
        call = fallback.rescued(call, chosen, verdict, problem, settings, key, structured)
    reads = _reads(chosen, problem, settings)
    remember = may_remember(circumstances)
    return Served(call, chosen.name, why, remember, reads, _bucket(problem, key, chosen, silicon, settings))


def _reads(chosen: Accepted, problem: Problem, settings: Settings) -> tuple[str, ...]:
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
    if scopes_used:
        reads.append("config")
    return tuple(reads)


def _longest(problem: Problem, key: CallKey) -> int:
    """The longest kv_len at which offsets into the tensors, which grow with it, have 32 bits on CUDA."""
    return 2**40 if problem.device != "cuda" else INT32 * key.k.shape[2] // max(1, problem.extent)


def _bucket(
    problem: Problem, key: CallKey, chosen: Accepted, silicon: Device, settings: Settings
) -> tuple[int, int, int] | None:
    """A decode's entry serves its whole kv bucket where its kernel can; lengths up to 16 are exact: corners may coincide."""
    dim = TO_BHSD[problem.layout][2]
    left = None
    if problem.cut is not None:
        left = problem.cut.window[0]
        if problem.cut.corner != "bottom_right" or left < 0:
            return None
        if problem.kv_len == left + 1:  # a window that is full stays so: every longer cache is the same problem
            return dim, left + 1, _longest(problem, key)
    if problem.q_len > length_buckets.DECODE_Q_LEN or problem.kv_len <= length_buckets.DECODE_Q_LEN:
        return None
    if not (key.mask is None or isinstance(key.mask, masks.Causal)):
        return None
    low, high = length_buckets.bucket_bounds(problem.kv_len)
    high = min(high, _longest(problem, key), high if left is None else left)
    return (dim, low, high) if candidates.serves_kv_lens(chosen, problem, silicon, settings, low, high) else None
