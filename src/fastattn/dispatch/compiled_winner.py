"""The stored winner of a call that is being traced: found by its sizes, and bound under a name that its graph can hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastattn.dispatch.circumstances import Circumstances, ranks, what_is_allowed
from fastattn.dispatch.resolve import asked_of, bind
from fastattn.dispatch.service import Action, decide_service, is_passed_on
from fastattn.dispatch.session import session
from fastattn.environment import torch_private
from fastattn.environment.settings import current_settings
from fastattn.environment.torch_state import torch_state
from fastattn.planning.conversions.blocks import IN_BLOCKS
from fastattn.problems import masks
from fastattn.problems.call_key import CallKey, TensorSpec, check_call
from fastattn.problems.call_options import CallOptions
from fastattn.problems.layouts import TO_BHSD


def bind_winner(tensors: Any, layout: str, options: dict[str, Any], calls: dict[str, Callable[..., Any]]) -> str:
    """Leave the winner's Call in `calls` and return its name there, "" where the default is to serve.

    tensors: (shape, stride, dtype, device, requires_grad) of q, k, v and a mask or None; and a causal corner or None.
    """
    given, settings = CallOptions(**options), current_settings()
    is_drop_in, layout = layout == "sdpa", "bhsd" if layout == "sdpa" else layout
    q, k, v = (_spec(facts, layout) for facts in tensors[:3])
    mask = _spec(tensors[3], "bhsd") if tensors[3] is not None else masks.Causal(tensors[4]) if tensors[4] else None
    circumstances = Circumstances(
        off=settings.mode == "off",
        other_device=q.device.type not in ("cpu", "cuda"),
        restricted=not torch_private.not_inside_sdpa_kernel(),
        empty=any(0 in s.shape for s in (q, k, v)),
        deterministic=torch_private.deterministic(),
        distributed=ranks() > 1,
        compiling=True,
    )
    key = CallKey(q, k, v, mask, layout, given, torch_state(q.device.type))
    if is_passed_on(circumstances, given.kernel):
        return ""
    try:
        check_call(key)
    except (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError):
        if is_drop_in:
            return ""  # F.sdpa takes some of these, and says what is wrong with the others
        raise
    asked = asked_of(key, settings, circumstances)
    decision = decide_service(asked, tracing=True)
    if decision.action is Action.PASS or decision.candidate is None:
        return ""
    if decision.is_untuned:
        session.record_miss(asked.problem, what_is_allowed(circumstances)[1], circumstances)
    chosen = decision.candidate
    is_default = chosen.kernel.name == "default" or bool(IN_BLOCKS & set(chosen.conversions))
    if given.kernel is None and (decision.is_untuned or is_default):
        return ""
    name = f"{asked.problem.digest} {chosen.name} {given.scale} {given.dropout_p} {asked.facts}"
    calls[name] = bind(chosen, asked, key)
    return name


def _spec(facts: tuple[Any, ...], layout: str) -> TensorSpec:
    """The TensorSpec of the (b, h, s, d) view of a tensor in a layout."""
    shape, stride, dtype, device, requires_grad = facts
    order = TO_BHSD[layout] if len(shape) == 4 else range(len(shape))
    return TensorSpec(tuple(shape[i] for i in order), tuple(stride[i] for i in order), dtype, device, requires_grad)
