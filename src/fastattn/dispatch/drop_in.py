"""A miss of sdpa(): what fastattn can serve goes the way of attention(), what F.sdpa alone takes is passed on to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastattn.dispatch import four_dims, service
from fastattn.dispatch.circumstances import read_circumstances, what_is_allowed
from fastattn.dispatch.resolve import Resolved, asked_of, resolve_key, what_guards_see
from fastattn.dispatch.session import session
from fastattn.dispatch.torch_function import stock_sdpa
from fastattn.environment.settings import current_settings
from fastattn.problems.call_key import call_key
from fastattn.problems.call_options import parse_options


def drop_in(q: Any, k: Any, v: Any, mask: Any, options: tuple[Any, ...]) -> Resolved:
    """Resolve a call of sdpa(): what F.sdpa would take and we can serve, else F.sdpa itself."""
    dropout_p, is_causal, scale, enable_gqa = options
    as_it_was = _as_it_was(dropout_p, is_causal, scale, enable_gqa)

    def pass_on(why: str, remember: bool = True, any_sizes: bool = False, reads: tuple[str, ...] = ()) -> Resolved:
        session.counts.pass_on(why)
        remember = remember and not is_changeable
        return Resolved(as_it_was, "default", why, remember, reads, passed_on=why, any_sizes=any_sizes)

    is_changeable = any(hasattr(value, "ndim") for value in options)  # a tensor, which may be changed in place
    settings = current_settings()
    tensors = [x for x in (q, k, v, mask) if x is not None]
    if not all(isinstance(x, Tensor) for x in tensors) or len(tensors) != 3 + (mask is not None):
        return pass_on("an argument is no tensor", remember=False)
    circumstances = read_circumstances(tensors, settings, session.is_spent(settings))
    if circumstances.foreign:
        from fastattn.dispatch.dtensors import local_sdpa  # here, as no other call needs it

        if (local := local_sdpa(circumstances, tensors, options)) is not None:
            return Resolved(local, "", "", remember=False)
    if service.is_passed_on(circumstances, None):
        return pass_on(what_is_allowed(circumstances)[1], *what_guards_see(circumstances))
    if type(is_causal) is not bool or type(enable_gqa) is not bool:
        return pass_on("is_causal or enable_gqa is no bool")
    seen = four_dims.as_four_dims(q, k, v, mask, enable_gqa)
    if isinstance(seen, four_dims.NotFour):
        return pass_on(seen.why, any_sizes=not seen.by_sizes)
    q, k, v, mask = (q, k, v, mask) if seen is None else seen.views(q, k, v, mask)
    try:
        given = {"is_causal": is_causal, "scale": scale, "dropout_p": dropout_p}
        key = call_key(q, k, v, mask, "bhsd", parse_options(given))
    except (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError):
        return pass_on("F.sdpa alone takes these arguments, or says what is wrong with them")
    asked = asked_of(key, settings, circumstances)
    if mask is not None and is_causal:
        if seen is not None or not four_dims.f_sdpa_takes_both(asked.problem, asked.device, asked.facts):
            return pass_on(four_dims.MASK_AND_CAUSAL)
        seen = four_dims.BOTH
    by_math = seen is not None and seen is not four_dims.BOTH
    resolved = resolve_key(key, asked._replace(facts=asked.facts._replace(by_math=by_math)), (q, k, v, mask))
    resolved = resolved if seen is None else seen.of_caller(resolved, as_it_was)
    return resolved._replace(remember=False) if is_changeable else resolved


def _as_it_was(dropout_p: Any, is_causal: Any, scale: Any, enable_gqa: Any) -> Callable[..., Any]:
    """F.sdpa with these arguments; what is as usual is not said again, which saves some 0.2 us a call."""
    if scale is not None or enable_gqa is not False:
        return lambda q, k, v, mask: stock_sdpa(q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if is_causal is not False or dropout_p.__class__ is not float or dropout_p:
        return lambda q, k, v, mask: stock_sdpa(q, k, v, mask, dropout_p, is_causal)
    return stock_sdpa
