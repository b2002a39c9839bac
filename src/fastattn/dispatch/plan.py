"""plan(): a bound Call for loops that want no dispatch at all."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastattn.dispatch import resolve
from fastattn.dispatch.explain import Explanation, explain
from fastattn.planning.binding import Call
from fastattn.problems.call_options import parse_options


class Plan:
    """A bound Call: `plan(q, k, v, mask)`, with tensors like those it was made of.

    It checks nothing: dtypes, options and shapes must be those it was made of. Only kv_len may be another one, from the first
    of `kv_lens` to the second: for up to 16 queries (decoding) these are wide. `explanation` says why this kernel.
    """

    __slots__ = ("_call", "candidate", "explanation", "kv_lens")

    def __init__(self, call: Call, candidate: str, kv_lens: tuple[int, int], explanation: Explanation) -> None:
        self._call, self.candidate, self.kv_lens, self.explanation = call, candidate, kv_lens, explanation

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Any = None) -> Any:
        return self._call(q, k, v, mask)

    def __repr__(self) -> str:
        return f"Plan({self.candidate})\n{self.explanation}"


def plan(q: Tensor, k: Tensor, v: Tensor, mask: Any = None, layout: str = "bhsd", **options: Any) -> Plan:
    """The Call that `attention` with these arguments would use (tuning now if it would), without the guard.

    Arguments and errors are those of `fastattn.attention`.
    """
    parse_options(options, "plan")
    resolved = resolve.attention(q, k, v, mask, layout, options)
    found = explain(q, k, v, mask, layout, **options)
    kv_lens = resolved.kv_lens[1:] if resolved.kv_lens else (found.problem.kv_len, found.problem.kv_len)
    return Plan(resolved.call, resolved.candidate, kv_lens, found)
