"""A winner that raises is answered in the same call by the next that can, and demoted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastattn.dispatch import fallback
from fastattn.dispatch.service import Asked
from fastattn.dispatch.session import session
from fastattn.environment.device import Device
from fastattn.environment.errors import is_out_of_memory, is_sticky
from fastattn.environment.log import log
from fastattn.environment.text import first_line
from fastattn.planning.binding import Call
from fastattn.planning.decision import Accepted
from fastattn.verdicts.verdict import Verdict


def rescued(
    call: Call, candidate: Accepted, asked: Asked, verdict: Verdict | None, bind: Callable[[Accepted], Call]
) -> Call:
    """The Call, with the fallback chain behind it.

    What answered in the place of one that raised serves this Call from then on, should somebody hold it (a plan): nothing that
    raised is asked again.
    """
    serving = (call, candidate)

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Any:
        nonlocal serving
        call, candidate = serving
        try:
            return call(q, k, v, mask)
        except Exception as error:
            if _is_not_its_own(error):
                raise
            out, *now = _rescue(error, candidate, asked, verdict, bind, (q, k, v, mask))
            serving = (now[0], now[1])
            return out

    return run


def is_capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured where x is."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _is_not_its_own(error: Exception) -> bool:
    """Out of memory, a sticky CUDA error, or what a caller's hook raises through the kernel (checkpoint, to stop early)."""
    is_hook = type(error).__module__.startswith("torch.utils.checkpoint")
    return is_hook or is_out_of_memory(error) or is_sticky(error)


def _rescue(
    error: Exception,
    failed: Accepted,
    asked: Asked,
    verdict: Verdict | None,
    bind: Callable[[Accepted], Call],
    given: tuple[Any, ...],
) -> tuple[Any, Call, Accepted]:
    """What answers in place of a candidate that raised: (the answer, the Call it came from, its candidate)."""
    capturing = is_capturing(given[0])
    device = Device.of(given[0].device)
    cause = f"{type(error).__name__}: {first_line(error)}"
    asked = asked._replace(circumstances=replace(asked.circumstances, capturing=capturing))
    answers = _answer_of_default(error, asked, verdict, bind, given)
    latest = session.latest(verdict, asked.settings, device) if verdict is not None else None
    for candidate in fallback.in_order(asked, latest):
        if candidate == failed or (capturing and not fallback.is_ready(candidate.kernel)):
            continue
        try:
            call = bind(candidate)
            out = answers[candidate.name] if candidate.name in answers else call(*given)
        except Exception:
            continue
        if capturing:
            return out, call, candidate  # not every kernel can be captured; outside it may be as good as ever
        if verdict is None or session.demote(verdict, failed.name, cause, asked.settings, device):
            text = "kernel %s raised (%s) on %s; %s serves from now on"
            log.warning(text, failed.name, cause, asked.problem, candidate.name)
        return out, call, candidate
    raise error


def _answer_of_default(
    error: Exception, asked: Asked, verdict: Verdict | None, bind: Callable[[Accepted], Call], given: tuple[Any, ...]
) -> dict[str, Any]:
    """The default's answer, where it may be asked. Raises `error` where F.sdpa raises too: it is the caller's own."""
    default = fallback.last_resorts(asked, verdict)[0]
    if default.kernel.name != "default":
        return {}
    try:
        return {default.name: bind(default)(*given)}
    except Exception:
        raise error from None
