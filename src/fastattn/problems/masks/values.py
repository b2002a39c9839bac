"""The values that masks are made of, checked and rounded."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from fastattn.environment.text import type_name
from fastattn.problems.length_buckets import canonical_length


def whole_numbers(name: str, value: Any, least: int, count: int | None = None) -> tuple[int, ...]:
    """Whole numbers from one, a sequence, an array or a tensor. Raises TypeError or ValueError that names them."""
    found = numbers_in(value, or_one=True)
    if found is None:
        raise TypeError(f"{name} must be whole numbers, got {type_name(value)} {value!r}")
    if not found or min(found) < least or (count is not None and len(found) != count):
        wanted = f"{count} of them" if count is not None else "one or more"
        raise ValueError(f"{name} must be whole numbers >= {least}, {wanted}, got {value!r}")
    return found


def numbers_in(value: Any, *, or_one: bool = False) -> tuple[int, ...] | None:
    """The numbers of a sequence, an array or a tensor of one dimension, or of one by itself; None where they are not whole."""
    given: Any = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(given, (list, tuple, range)):
        return numbers_in([given]) if or_one else None
    found = tuple(int(n) for n in given if type(n) is int or (isinstance(n, Integral) and not isinstance(n, bool)))
    return found if len(found) == len(given) else None


def one_or_each(name: str, given: Any) -> int | tuple[int, ...]:
    """A number that holds for all batch entries, or one for each. Raises TypeError or ValueError for anything else."""
    found = whole_numbers(name, given, 0)
    return found[0] if is_one_number(given) else found


def is_one_number(given: Any) -> bool:
    """Whether it is no sequence: a number, or an array or tensor of one without dimensions."""
    return isinstance(given, int) or getattr(given, "ndim", None) == 0


def each(values: int | tuple[int, ...]) -> tuple[int, ...]:
    """A number for each batch entry, or the one that holds for all."""
    return (values,) if isinstance(values, int) else values


def about(n: float, kv_len: int) -> int:
    """A length in eighths of the keys, of a bucket's canonical length: those that are about as long share a verdict."""
    return max(1, round(8 * n / kv_len)) * canonical_length(kv_len) // 8 if kv_len else 0


def check_entries(mask: Any, entries: int, batch: int) -> None:
    """Raises ValueError where a mask holds values for another number of batch entries."""
    if entries not in (1, batch):
        raise ValueError(f"{mask!r} is for {entries} batch entries, got {batch}")
