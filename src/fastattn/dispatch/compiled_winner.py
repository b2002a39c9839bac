"""The stored winner of a call that is being traced: found by its sizes, and bound under a name that is constant in the graph.

Runs as plain Python while torch.compile is tracing. compiled_buckets.py asks the same where lengths are symbols.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

from fastattn.dispatch import fallback
from fastattn.dispatch.circumstances import Circumstances, is_inside_sdpa_kernel, ranks, what_is_allowed
from fastattn.dispatch.graph_op import NAME as OPERATOR
from fastattn.dispatch.resolve import asked_of, bind
from fastattn.dispatch.service import Asked, decide_service, is_passed_on, of_regime
from fastattn.dispatch.session import session
from fastattn.environment import torch_private
from fastattn.environment.settings import current_settings
from fastattn.environment.torch_state import torch_state
from fastattn.planning.decision import Accepted
from fastattn.problems import masks
from fastattn.problems.call_key import CallKey, TensorSpec, check_call
from fastattn.problems.call_options import CallOptions
from fastattn.problems.layouts import TO_BHSD

Lengths = tuple[int, int, int]  # of the batch, queries and keys


class TracedCall(NamedTuple):
    """A call that is traced, without its tensors.

    tensors: (shape, stride, dtype, device, requires_grad) of q, k, v and a mask or (); and a causal corner or "". With letters
    and products of compiled_lengths.py they are those of the (b, h, s, d) view. may_be_operator: fastattn::attend may serve.
    """

    tensors: Any
    layout: str  # "sdpa" is the drop-in's
    options: CallOptions
    may_be_operator: bool


def bind_winner(call: TracedCall, calls: object) -> str:
    """Make the winner's Call an attribute of `calls` and return its name; OPERATOR; or "" where the default is to serve."""
    found = ask(call)
    if found is None:
        return ""
    key, asked = found
    asked = of_regime(asked)
    chosen = choose(call, asked)
    if chosen is None:
        return ""
    if not fallback.stands_in_graph(chosen.kernel, chosen.name, asked.problem):
        return OPERATOR
    return keep(chosen, key, asked, asked.problem.replace(compiled=False).digest, calls)


def ask(call: TracedCall, at: Lengths | None = None) -> tuple[CallKey, Asked] | None:
    """The call as decisions see it, None where it is passed on. at: with these numbers for its letters."""
    layout, settings = "bhsd" if call.layout == "sdpa" else call.layout, current_settings()
    order = TO_BHSD[layout] if at is None else (0, 1, 2, 3)
    q, k, v = (_spec(_numbers(facts, at), order) for facts in call.tensors[:3])
    dense, corner = _numbers(call.tensors[3], at), call.tensors[4]
    mask = _spec(dense, range(len(dense[0]))) if dense else masks.Causal(corner) if corner else None
    key = CallKey(q, k, v, mask, layout, call.options, torch_state(q.device.type))
    circumstances = _circumstances(q.device.type, any(0 in s.shape for s in (q, k, v)))
    if is_passed_on(circumstances, call.options.kernel):
        return None
    try:
        check_call(key)
    except (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError):
        if call.layout == "sdpa":
            return None  # F.sdpa takes some of these, and says what is wrong with the others
        raise
    return key, asked_of(key, settings, circumstances)


def choose(call: TracedCall, asked: Asked) -> Accepted | None:
    """The stored winner, or what is ordered; None where the default serves. A miss is recorded."""
    decision = decide_service(asked, in_graph=not call.may_be_operator, certain=not call.may_be_operator)
    if decision.is_untuned:
        session.record_miss(asked.problem, what_is_allowed(asked.circumstances)[1], asked.circumstances)
    chosen = decision.candidate
    is_default = decision.is_untuned or chosen is None or chosen.kernel.name == "default"
    if is_default and call.options.kernel is None:
        return None
    return chosen


def keep(chosen: Accepted, key: CallKey, asked: Asked, digest: str, calls: object) -> str:
    """The name of a candidate's Call, which is made once: Dynamo guards that it is the one that was traced."""
    is_told = isinstance(key.mask, masks.Mask)
    facts = asked.facts._replace(extent=0)
    text = f"{digest} {chosen.name} {is_told} {key.options.scale} {key.options.dropout_p} {facts}"
    name = f"call_{hashlib.sha256(text.encode()).hexdigest()[:24]}"
    if not hasattr(calls, name):
        setattr(calls, name, bind(chosen, asked, key))
    return name


def may_serve(device: str) -> bool:
    """Whether anything of ours may serve a call on such a device now."""
    return not is_passed_on(_circumstances(device), None)


def _circumstances(device: str, empty: bool = False) -> Circumstances:
    return Circumstances(
        off=current_settings().mode == "off",
        other_device=device not in ("cpu", "cuda"),
        functorch=torch_private.functorch_level() is not None,
        restricted=is_inside_sdpa_kernel(),  # no guard of a graph tells one such scope from another
        empty=empty,
        deterministic=torch_private.deterministic(),
        distributed=ranks() > 1,
        in_graph=True,
    )


def _spec(facts: tuple[Any, ...], order: Any) -> TensorSpec:
    """The TensorSpec of the (b, h, s, d) view of a tensor in a layout."""
    shape, stride, dtype, device, requires_grad = facts
    order = order if len(shape) == len(order) else range(len(shape))
    return TensorSpec(tuple(shape[i] for i in order), tuple(stride[i] for i in order), dtype, device, requires_grad)


def _numbers(facts: tuple[Any, ...], at: Lengths | None) -> tuple[Any, ...]:
    """A tensor's facts with numbers in the place of letters and products."""
    if at is None or not facts:
        return facts
    shape = tuple(at["bqk".index(n)] if isinstance(n, str) else n for n in facts[0])

    def step(i: int) -> int:
        given = facts[1][i]
        return given if isinstance(given, int) else shape[given[0]] * step(given[0])

    return shape, tuple(step(i) for i in range(len(shape))), *facts[2:]
