"""A miss of attention() from start to finish: what is asked, the decision, a tuning if it comes first, and the Call."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastattn.dispatch import fallback, service, validity
from fastattn.dispatch.circumstances import (
    SEEN_BY_GUARDS,
    TUNE,
    Circumstances,
    may_remember,
    read_circumstances,
    what_is_allowed,
    what_passes_on,
)
from fastattn.dispatch.service import Action, Asked, decide_service
from fastattn.dispatch.session import session
from fastattn.environment.device import Device
from fastattn.environment.settings import Settings, current_settings
from fastattn.environment.torch_private import has_torch_function
from fastattn.environment.torch_state import torch_state
from fastattn.planning import binding, default_choice
from fastattn.planning.decision import Accepted
from fastattn.problems import masks
from fastattn.problems.call_key import CallKey, as_structured, call_key, is_block_mask, tensors_of
from fastattn.problems.call_options import CallOptions, check_layout, is_ordinary, parse_options
from fastattn.problems.classify import classify

if TYPE_CHECKING:
    from fastattn.dispatch.guard import LeadsTo
    from fastattn.problems.rewriting import Rewritten
    from fastattn.verdicts.verdict import Verdict


class Resolved(NamedTuple):
    """What a miss came to. reads: the state that a guard must compare; kv_lens: (k's length dimension, lowest, highest)."""

    call: binding.Call
    candidate: str
    why: str
    remember: bool = True
    reads: tuple[str, ...] = ()
    kv_lens: tuple[int, int, int] | None = None
    is_tuned: bool = False  # a verdict says so
    passed_on: str = ""  # why F.sdpa answers the call as it was made
    any_sizes: bool = False  # nothing was decided by a size
    reads_alignment: bool = False  # its Call is for tensors that start as these do
    saves_us: float = 0.0  # a call, by the Verdict's own times
    otherwise: tuple["LeadsTo", Iterator[int]] | None = (
        None  # who else serves calls, as their masks decide, and how many
    )


# --- the front doors


def attention(q: Any, k: Any, v: Any, mask: Any, layout: str, given: dict[str, Any], door: Any = None) -> Resolved:
    """Resolve a call of attention(), or of compiled code's door to it. Raises what `fastattn.attention` documents."""
    if not is_ordinary(q, mask, layout, given):
        from fastattn.problems.rewriting import rewrite

        ordinary = rewrite(q, k, v, mask, layout, given)
        if ordinary is not None:
            return _rewritten(ordinary, door)
    options = parse_options(given)
    settings = current_settings()
    check_layout(layout)
    circumstances = Circumstances()
    if all(isinstance(x, Tensor) for x in (q, k, v)) or has_torch_function(q, k, v):
        circumstances = read_circumstances(tensors_of(q, k, v, mask), settings, session.is_spent(settings))
        if circumstances.foreign:
            from fastattn.dispatch.dtensors import local_attention  # here, as no other call needs it

            if (local := local_attention(circumstances, q, k, v, mask, layout, given)) is not None:
                return Resolved(local, "", "", remember=False)  # its own call is counted, and has an entry
        if service.is_passed_on(circumstances, options.kernel):
            return _if_guarded(_passed_on(circumstances, layout, options, mask), mask, given)
    key = call_key(q, k, v, mask, layout, options)
    asked = asked_of(key, settings, circumstances)
    asked = service.of_regime(asked) if door is not None else asked
    return _if_guarded(resolve_key(key, asked, (q, k, v, mask)), mask, given)


def _rewritten(ordinary: "Rewritten", door: Any) -> Resolved:
    """The ordinary call, which has an entry of its own. What made it another one is looked at in each call."""
    from fastattn.dispatch.attention import attention

    serve = door or attention

    def call(q: Any, k: Any, v: Any, mask: Any) -> Any:
        return ordinary.back(serve(*ordinary[:5], **ordinary.options))

    return Resolved(call, "", "", remember=False)


def _if_guarded(resolved: Resolved, mask: Any, given: dict[str, Any]) -> Resolved:
    """The same, not remembered where no guard could match such a call."""
    # torch's causal biases are a Tensor subclass
    is_guarded = not isinstance(mask, Tensor) or as_structured(mask) is mask
    is_guarded = is_guarded and not any(hasattr(value, "ndim") for value in given.values())  # may be changed in place
    return resolved if is_guarded else resolved._replace(remember=False)


def without_tensors(key: CallKey) -> tuple[Resolved, Asked]:
    """Resolve a call of attention() of which only the key is left, as things are now (a plan that was pickled).

    The modes of q's gradients and of autocast are the key's: they made the plan what it is.
    """
    settings = current_settings()
    now = torch_state(key.q.device.type)._replace(grad=key.state.grad, autocast=key.state.autocast)
    key = key._replace(state=now)
    like_them = torch.empty(int(math.prod(key.q.shape + key.k.shape) > 0), dtype=key.q.dtype, device=key.q.device)
    circumstances = read_circumstances([like_them], settings, session.is_spent(settings))
    asked = asked_of(key, settings, circumstances)
    if service.is_passed_on(circumstances, asked.kernel):
        return _passed_on(circumstances, key.layout, key.options, key.mask), asked
    return resolve_key(key, asked, None), asked


def _passed_on(circumstances: Circumstances, layout: str, options: CallOptions, mask: Any) -> Resolved:
    from fastattn.dispatch import passed_on  # here, as no other call needs it

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Any:
        return passed_on.attend(q, k, v, mask, layout, options)

    why = what_is_allowed(circumstances)[1]
    session.counts.pass_on(why)
    is_custom = options.score_mod is not None or is_block_mask(mask)
    name = default_choice.untuned_name(options.softcap > 0 or options.return_lse, is_custom)
    remember, any_sizes, reads = what_guards_see(circumstances)
    return Resolved(call, name, why, remember, reads, passed_on=why, any_sizes=any_sizes)


def what_guards_see(circumstances: Circumstances) -> tuple[bool, bool, tuple[str, ...]]:
    """(whether a guard can see why the call is passed on, whether it is for every size, what it must read)."""
    name = what_passes_on(circumstances)
    return name in SEEN_BY_GUARDS, name != "empty", SEEN_BY_GUARDS.get(name, ())


def asked_of(key: CallKey, settings: Settings, circumstances: Circumstances) -> Asked:
    """A call as decisions see it."""
    problem, facts = classify(key, settings.accuracy)
    device, options = Device.of(key.q.device), key.options
    asked = Asked(problem, facts, device, settings, circumstances, options.kernel, options.dropout_p == 1)
    if settings.same_kernel_in_training:
        in_training = asked._replace(problem=problem.as_in_training())
        return asked if options.kernel and not fallback.can_be_ordered(in_training) else in_training
    return asked


# --- from the decision to the Call


def resolve_key(key: CallKey, asked: Asked, given: tuple[Any, ...] | None) -> Resolved:
    """What a call of this key comes to. given: its tensors, None where only the key is left."""
    session.note_process_group_change(asked.circumstances)
    for met in session.collectors:
        met[asked.problem] = None
    decision = decide_service(asked)
    if decision.action is Action.TUNE:
        from fastattn.dispatch.tune_now import tune_now  # most processes find what they need in the store

        tune_now(key, asked, given, decision.verdict)
        decision = decide_service(asked)
    candidate = decision.candidate
    assert candidate is not None, "calls that are passed on do not come here"
    session.counts.miss(candidate.name)
    if decision.is_untuned:
        session.record_miss(asked.problem, what_is_allowed(asked.circumstances)[1], asked.circumstances)
    pair = None
    if asked.problem.mask is not None:
        from fastattn.dispatch.by_share import by_share  # elsewhere calls of a problem hide all alike

        pair = by_share(candidate, asked, decision.verdict)
    may_serve, otherwise = (candidate,), None
    if pair is not None:
        may_serve = pair.in_tiles, pair.plain
        other = pair.plain if candidate is pair.in_tiles else pair.in_tiles
        otherwise = (other.name, "", _saves_us(decision.verdict, other)), pair.by_other
    call = bind(candidate, asked, key, pair)
    if asked.problem.is_custom and given is not None:
        _check_custom(call, candidate, asked, key, given)
    elif (
        asked.kernel is None
        and not asked.problem.is_custom
        and any(one.kernel.name != "default" for one in may_serve)
        and not asked.drops_all
    ):
        from fastattn.dispatch.rescue import rescued  # the default needs nobody behind it

        call = rescued(call, may_serve, asked, decision.verdict, lambda other: bind(other, asked, key))
    return Resolved(
        call,
        candidate.name,
        "tuned now" if decision.action is Action.TUNE else decision.why,
        decision.remember and decision.action is Action.SERVE and may_remember(asked.circumstances),
        validity.state_read_by(may_serve, asked),
        None if asked.problem.is_custom else validity.kv_lens_served(may_serve, asked, key),
        decision.verdict is not None,
        reads_alignment=any(validity.reads_alignment(one, asked) for one in may_serve),
        saves_us=_saves_us(decision.verdict, candidate),
        otherwise=otherwise,
    )


def _saves_us(verdict: "Verdict | None", candidate: Accepted) -> float:
    return verdict.saves_us(candidate.name) if verdict is not None else 0.0


def bind(candidate: Accepted, asked: Asked, key: CallKey, pair: binding.ByShare | None = None) -> binding.Call:
    """The Call of a candidate for a call with these options; of one of the two that a mask decides between, in each call."""
    options = key.options
    return binding.bind(
        candidate,
        asked.problem,
        options.scale,
        asked.facts,
        structured=key.mask is not None and isinstance(key.mask, masks.Causal),
        dropout_p=options.dropout_p,
        score_mod=options.score_mod,
        by_share=pair,
    )


def _check_custom(call: binding.Call, candidate: Accepted, asked: Asked, key: CallKey, given: tuple[Any, ...]) -> None:
    """A caller's own function is checked where it is new, as no verdict can stand for it."""
    is_ordinary = what_is_allowed(asked.circumstances)[0] == TUNE
    if is_ordinary and session.is_first_look(asked.problem, candidate.name, key.options.score_mod, key.mask):
        from fastattn.dispatch.custom_check import check_first_output

        check_first_output(call, candidate.name, asked.problem, key, given)
