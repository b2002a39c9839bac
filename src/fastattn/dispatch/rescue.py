"""A winner that raises is answered in the same call by the next that can, and demoted if it raises again.

Whose an exception is, environment/blame.py says: what only passed through a kernel reaches the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from fastattn.dispatch import fallback
from fastattn.dispatch.service import Asked
from fastattn.dispatch.session import session
from fastattn.environment.blame import RAISED, Cause, cause_of, is_callers
from fastattn.environment.device import Device
from fastattn.environment.errors import is_out_of_memory
from fastattn.environment.log import log
from fastattn.environment.text import first_line
from fastattn.kernels.libraries import availability
from fastattn.planning.binding import Call
from fastattn.planning.decision import Accepted
from fastattn.verdicts.verdict import Verdict

Bind = Callable[[Accepted], Call]


def rescued(call: Call, may_serve: tuple[Accepted, ...], asked: Asked, verdict: Verdict | None, bind: Bind) -> Call:
    """The Call of a candidate, or of two that a mask decides between, with the fallback chain behind it.

    What answered in the place of one that was demoted serves this Call from then on, should somebody hold it (a plan): nothing
    that was demoted is asked again.
    """
    serving = (call, may_serve)

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Any:
        nonlocal serving
        call, may_serve = serving
        try:
            return call(q, k, v, mask)
        except Exception as error:
            own = {name for one in may_serve for name in availability.modules_of(one.kernel)}
            cause = cause_of(error, own)
            is_short = _is_short_on_cpu(error, q, own)
            if cause in RAISED and not is_short:
                raise
            if not is_short:
                given = (q, k, v, mask)
                out, other_call, other = _answer(error, may_serve, asked, verdict, bind, given)
                is_its_own = cause is Cause.KERNEL and not is_capturing(q) and _fits(asked, q, k, v)
                if is_its_own and _raises_again(error, call, given, own):
                    failed = next((one for one in may_serve[:-1] if _raises(bind(one), given)), may_serve[-1])
                    serving = (other_call, (other,))
                    _demote(error, failed, other, asked, verdict, q)
                return out
        # only now: the exception held what the kernel had made
        return _with_less_memory(may_serve, asked, verdict, bind, (q, k, v, mask))

    return run


def _is_short_on_cpu(error: Exception, q: Tensor, own: Collection[str]) -> bool:
    """Whether a kernel's copies found no memory on the CPU; torch.OutOfMemoryError is CUDA's, which are not asked again."""
    is_short = is_out_of_memory(error) and not isinstance(error, torch.OutOfMemoryError)
    return is_short and q.device.type == "cpu" and not is_callers(error, own)


def _with_less_memory(
    may_serve: tuple[Accepted, ...], asked: Asked, verdict: Verdict | None, bind: Bind, given: tuple[Any, ...]
) -> Any:
    """The answer of the default, which may need no copies; where it has no memory either, its error is the caller's."""
    default = fallback.last_resorts(asked, verdict)[0]
    log.info("kernel %s found no memory on %s; %s answered", may_serve[0].name, asked.problem, default.name)
    return bind(default)(*given)


def is_capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured where x is."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _fits(asked: Asked, *given: Tensor) -> bool:
    """Whether the kernel was bound for such a call: a plan that is held may be called where gradients are wanted."""
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    return asked.problem.needs_grad or not wants_grad


def _answer(
    error: Exception,
    failed: tuple[Accepted, ...],
    asked: Asked,
    verdict: Verdict | None,
    bind: Bind,
    given: tuple[Any, ...],
) -> tuple[Any, Call, Accepted]:
    """What answers in place of a candidate that raised: (the answer, the Call it came from, its candidate).

    Of two that a mask decides between both are asked again: who knows which one raised.
    """
    capturing = is_capturing(given[0])
    asked = asked._replace(circumstances=asked.circumstances._replace(capturing=capturing))
    answers = _answer_of_default(error, asked, verdict, bind, given)
    latest = session.latest(verdict, asked.settings, Device.of(given[0].device)) if verdict is not None else None
    for candidate in fallback.in_order(asked, latest):
        if (candidate,) == failed or (capturing and not fallback.is_ready(candidate.kernel)):
            continue
        try:
            call = bind(candidate)
            return answers[candidate.name] if candidate.name in answers else call(*given), call, candidate
        except Exception as other:
            own = availability.modules_of(candidate.kernel)
            if cause_of(other, own) in RAISED and not _is_short_on_cpu(other, given[0], own):
                raise
    raise error


def _answer_of_default(
    error: Exception, asked: Asked, verdict: Verdict | None, bind: Bind, given: tuple[Any, ...]
) -> dict[str, Any]:
    """The default's answer, where it may be asked. Raises `error` where F.sdpa raises too: it is the caller's own."""
    default = fallback.last_resorts(asked, verdict)[0]
    if default.kernel.name != "default":
        return {}
    try:
        return {default.name: bind(default)(*given)}
    except Exception as other:
        if cause_of(other) is Cause.CALLER:
            raise
        raise error from None


def _raises_again(error: Exception, call: Call, given: tuple[Any, ...], own: Collection[str]) -> bool:
    """Whether the call raises a second time, now that something else has answered it.

    Raises `error` where it does not, and no kernel raises the like: it came from outside.
    """
    try:
        call(*given)
    except Exception as again:
        cause = cause_of(again, own)
        if cause is Cause.CALLER:
            raise
        return cause is not Cause.MEMORY
    if not isinstance(error, RuntimeError):
        raise error
    return False


def _raises(call: Call, given: tuple[Any, ...]) -> bool:
    try:
        call(*given)
    except Exception:
        return True
    return False


def _demote(
    error: Exception, failed: Accepted, serves: Accepted, asked: Asked, verdict: Verdict | None, q: Tensor
) -> None:
    cause = f"{type(error).__name__}: {first_line(error)}"
    if verdict is None or session.demote(verdict, failed.name, cause, asked.settings, Device.of(q.device)):
        text = "kernel %s raised (%s) on %s; %s serves from now on"
        log.warning(text, failed.name, cause, asked.problem, serves.name)
