"""A conversion: what must be done to the caller's tensors for a kernel, as a row of data."""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

from torch import Tensor

from fastattn.kernels.kernel import Kernel, Run
from fastattn.problems.call_facts import CallFacts
from fastattn.problems.problem import Problem

# Answers of `Conversion.when`; any other string is the reason why the kernel cannot do the problem.
NO, OPTIONAL, REQUIRED = "no", "optional", "required"


class Conversion(NamedTuple):
    """One row. Its file has two functions that are named after it: `when_<name>` and `<name>`.

    concerns: whether it may apply at all, by fields alone: where it does not, its file is not imported.
    """

    name: str
    summary: str
    file: str
    concerns: Callable[[Kernel, Problem], object]
    requires: str = ""  # another conversion, without which this one is worth nothing
    instead_of: tuple[str, ...] = ()  # conversions that are not worth trying together with this one
    spares: str = ""  # another conversion, which is not needed any more where this one is done
    is_loop: bool = False  # over blocks, which a traced graph would have unrolled
    is_own_form: bool = False  # the kernel's own entry point for such problems takes the place of its ordinary one

    def when(self, kernel: Kernel, p: Problem, facts: CallFacts) -> str:
        """NO, OPTIONAL, REQUIRED, or the reason why the kernel cannot do the problem."""
        return self._function(f"when_{self.name}")(kernel, p, facts) if self.concerns(kernel, p) else NO

    def wrap(self, step: Run, kernel: Kernel, p: Problem, facts: CallFacts) -> Run:
        """The step that converts, around another one."""
        return self._function(self.name)(step, kernel, p, facts)

    def _function(self, name: str) -> Any:
        return getattr(import_module(f"{__package__}.{self.file}"), name)


def map_output(
    result: Any, change: Callable[[Tensor], Tensor], change_lse: Callable[[Tensor], Tensor] | None = None
) -> Any:
    """What a step returned with its output changed: the output alone, or (out, lse)."""
    if not isinstance(result, tuple):
        return change(result)
    out, lse = result
    return change(out), lse if change_lse is None else change_lse(lse)
