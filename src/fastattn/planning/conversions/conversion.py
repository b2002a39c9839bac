"""A conversion: what must be done to the caller's tensors for a kernel, as a row of data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from fastattn.kernels.kernel import Kernel, Run
from fastattn.problems.call_facts import CallFacts
from fastattn.problems.problem import Problem

# Answers of `Conversion.when`; any other string is the reason why the kernel cannot do the problem.
NO, OPTIONAL, REQUIRED = "no", "optional", "required"


class Conversion(NamedTuple):
    """`when(kernel, problem, facts)` answers NO, OPTIONAL, REQUIRED or a reason; `wrap` makes the step that converts."""

    name: str
    summary: str
    when: Callable[[Kernel, Problem, CallFacts], str]
    wrap: Callable[[Run, Kernel, Problem, CallFacts], Run]
    requires: str = ""  # another conversion, without which this one is worth nothing
    instead_of: tuple[str, ...] = ()  # conversions that are not worth trying together with this one


def map_output(
    result: Any, change: Callable[[Tensor], Tensor], change_lse: Callable[[Tensor], Tensor] | None = None
) -> Any:
    """What a step returned with its output changed: the output alone, or (out, lse)."""
    if not isinstance(result, tuple):
        return change(result)
    out, lse = result
    return change(out), lse if change_lse is None else change_lse(lse)
