"""A limit of a kernel, and the sentence it refuses with.

Three of the four kinds are pure data, so that one place writes every sentence with both numbers, and tests and docs are
generated from the same row. RefuseWhen is the escape hatch: first ask whether it could be one of the others.
A field is an attribute of Problem, "capability" of the Device, or one of OF_CALL of the CallFacts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from fastattn.environment.device import Device
from fastattn.problems.call_facts import CallFacts
from fastattn.problems.problem import Problem

OF_CALL = ("extent",)  # what a limit may ask of one call
OF_LENGTH = ("kv_len", "extent", "scores", "unfused_bytes", "io_bytes")  # what differs from one kv_len to the next
ORDINARY = CallFacts()


class Need(Protocol):
    """One limit."""

    def why_not(self, problem: Problem, device: Device, facts: CallFacts = ORDINARY) -> str | None:
        """None if the problem is within the limit, else the sentence that names both values."""
        ...

    def describe(self) -> str:
        """The limit itself, for the table in the docs."""
        ...


def _value(field: str, problem: Problem, device: Device, facts: CallFacts) -> Any:
    return getattr(facts if field in OF_CALL else device if field == "capability" else problem, field)


class Range(NamedTuple):
    """A number between `min` and `max`, and a multiple of `multiple_of`."""

    field: str
    min: int | None = None
    max: int | None = None
    multiple_of: int = 1

    def why_not(self, problem: Problem, device: Device, facts: CallFacts = ORDINARY) -> str | None:
        value = _value(self.field, problem, device, facts)
        if self.min is not None and value < self.min:
            return f"{self.field} {value} < {self.min}"
        if self.max is not None and value > self.max:
            return f"{self.field} {value} > {self.max}"
        if value % self.multiple_of:
            return f"{self.field} {value} is not a multiple of {self.multiple_of}"
        return None

    def holds_between(self, field: str, low: int, high: int) -> bool:
        """Whether it is a limit of this field, and every value from low to high is within it."""
        is_within = (self.min is None or self.min <= low) and (self.max is None or high <= self.max)
        return self.field == field and is_within and self.multiple_of == 1

    def edges(self) -> tuple[list[int], list[int]]:
        """Values just inside the limit, and just outside it."""
        step = self.multiple_of
        inside = [v for v in (self.min, self.max) if v is not None]
        below = [self.min - step] if self.min is not None else []
        above = [self.max + step] if self.max is not None else []
        return inside or [step], [*below, *above, *([step + 1] if step > 1 else [])]

    def describe(self) -> str:
        low = f"{self.min} <= " if self.min is not None else ""
        high = f" <= {self.max}" if self.max is not None else ""
        step = f", multiple of {self.multiple_of}" if self.multiple_of > 1 else ""
        return f"{low}{self.field}{high}{step}"


class OneOf(NamedTuple):
    """One of a few values."""

    field: str
    values: tuple[Any, ...]

    def why_not(self, problem: Problem, device: Device, facts: CallFacts = ORDINARY) -> str | None:
        value = _value(self.field, problem, device, facts)
        if value in self.values:
            return None
        return f"{self.field} {value} is not one of {', '.join(map(str, self.values))}"

    def describe(self) -> str:
        return f"{self.field} in {', '.join(map(str, self.values))}"


class Forbid(NamedTuple):
    """Something this kernel does not do at all: the field must be falsy."""

    field: str
    what: str

    def why_not(self, problem: Problem, device: Device, facts: CallFacts = ORDINARY) -> str | None:
        value = _value(self.field, problem, device, facts)
        if not value:
            return None
        return f"{self.what} is not supported" + ("" if value is True else f" ({self.field} {value})")

    def describe(self) -> str:
        return f"no {self.what}"


class RefuseWhen(NamedTuple):
    """Any other limit: `text` may use {p.field} and {device.field}, and should name both sides."""

    text: str
    test: Callable[[Problem, Device], bool]

    def why_not(self, problem: Problem, device: Device, facts: CallFacts = ORDINARY) -> str | None:
        return self.text.format(p=problem, device=device) if self.test(problem, device) else None

    def describe(self) -> str:
        return f"not: {self.text}"


# --- limits that kernels of several libraries share

NOT_EMPTY = (Range("q_len", min=1), Range("kv_len", min=1))
GRID = (Range("batch", min=1, max=65535), Range("q_heads", min=1, max=65535))  # grid dimensions (pytorch#142228)
FLASH_2_BACKWARD = RefuseWhen(  # of torch's copy of FlashAttention 2: sdp_utils.cpp, check_requires_grad_and_head_dim_gt192_...
    "training with head dims {p.head_dim} and {p.head_dim_v}, dropout {p.dropout}, on sm{device.capability}"
    " (86 to 89, 120 and 121 take up to 192, or over 224 without dropout)",
    lambda p, device: (
        p.needs_grad and device.capability in (86, 87, 89, 120, 121) and max(p.head_dim, p.head_dim_v) > 192
        and (p.dropout or max(p.head_dim, p.head_dim_v) <= 224)
    ),
)  # fmt: skip
OWN_MASK = RefuseWhen(  # a cast would round it, and make hidden what is merely very low
    "a {p.mask} mask beside {p.dtype} inputs", lambda p, _: p.mask not in (None, "bool", p.dtype)
)
PLANNED = RefuseWhen(
    "planned for each length, and lengths change here ({p.lengths})", lambda p, _: p.lengths != "exact"
)
BFLOAT16 = RefuseWhen(
    "dtype bfloat16 on sm{device.capability} < 80",
    lambda p, device: p.dtype == "bfloat16" and device.capability < 80,
)
