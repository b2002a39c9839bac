"""plan(): a bound Call for loops that want no dispatch at all."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from fastattn.dispatch import resolve
from fastattn.dispatch.explain import Explanation, explain, explain_asked
from fastattn.dispatch.resolve import Resolved
from fastattn.environment.option_scope import options
from fastattn.environment.settings import current_settings
from fastattn.problems.call_key import CallKey, call_key
from fastattn.problems.call_options import is_ordinary, parse_options
from fastattn.problems.masks import Mask

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastattn.problems.given_options import OptionsWithLse


class Plan:
    """A bound Call: `plan(q, k, v, mask)`, with tensors like those it was made of.

    It checks nothing: dtypes, options and shapes must be those it was made of. Only kv_len may be another one, from the first
    of `kv_lens` to the second: for up to 16 queries (decoding) these are wide. `explanation` says why this kernel.

    A copy is the plan itself. Pickled, it is what it was made of: the loading process resolves it anew, as plan() would there.
    """

    __slots__ = ("_call", "_made_of", "candidate", "explanation", "kv_lens")

    def __init__(self, made_of: MadeOf, resolved: Resolved, explanation: Explanation) -> None:
        problem = explanation.problem
        self._made_of, self._call, self.candidate = made_of, resolved.call, resolved.candidate
        self.kv_lens = resolved.kv_lens[1:] if resolved.kv_lens else (problem.kv_len, problem.kv_len)
        self.explanation = explanation

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Any = None) -> Any:
        return self._call(q, k, v, mask)

    def __repr__(self) -> str:
        return f"Plan({self.candidate})\n{self.explanation}"

    def __copy__(self) -> Plan:
        return self

    def __deepcopy__(self, memo: object) -> Plan:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        key = self._made_of.key
        for function in (key.options.score_mod, getattr(key.mask, "mask_mod", None)):
            if function is not None and not _has_a_name(function):
                raise TypeError(
                    f"a plan with {function!r}, which has no name in a module, cannot be pickled;"
                    " call fastattn.plan() in the other process"
                )
        return _plan_again, (self._made_of,)


class MadeOf(NamedTuple):
    """What a Plan was made of: the call's key, and the options that decide what it may run."""

    key: CallKey
    kernels: tuple[str, ...]
    accuracy: str | float
    same_kernel_in_training: bool


def plan(
    q: Tensor, k: Tensor, v: Tensor, mask: Any = None, layout: str = "bhsd", **options: Unpack[OptionsWithLse]
) -> Plan:
    """The Call that `attention` with these arguments would use (tuning now if it would), without the guard.

    Arguments and errors are those of `fastattn.attention`.
    """
    given = dict[str, Any](options)
    if not is_ordinary(q, mask, layout, given):
        raise NotImplementedError(
            "plan() binds no lengths of one call (layout 'thd', kv_lens, NestedTensor), no sinks and no Bias: call attention()"
        )
    parsed = parse_options(given, "plan")
    resolved = resolve.attention(q, k, v, mask, layout, given)
    now = current_settings()
    key = call_key(q, k, v, mask, layout, parsed)
    made_of = MadeOf(key, now.kernels, now.accuracy, now.same_kernel_in_training)
    found = explain(q, k, v, mask, layout, **options)
    if isinstance(mask, Tensor) and not isinstance(key.mask, Mask):
        found = replace(found, mask="")  # a plan takes any other mask as well
    return Plan(made_of, resolved, found)


def _plan_again(made_of: MadeOf) -> Plan:
    """The plan that was pickled, resolved in this process."""
    tied = made_of.same_kernel_in_training
    with options.scope(kernels=made_of.kernels or None, accuracy=made_of.accuracy, same_kernel_in_training=tied):
        resolved, asked = resolve.without_tensors(made_of.key)
        return Plan(made_of, resolved, explain_asked(asked, made_of.key.mask))


def _has_a_name(function: Any) -> bool:
    """Whether pickle finds this very function again by its module and name."""
    found: Any = sys.modules.get(getattr(function, "__module__", None) or "")
    for name in getattr(function, "__qualname__", "?").split("."):
        found = getattr(found, name, None)
    return found is function
