"""How things are written for people: sizes, times, dtypes, errors, and the name that was probably meant."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def format_bytes(count: float) -> str:
    """A number of bytes: "512 B", "18 MiB", "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def format_duration(us: float | None) -> str:
    """Microseconds in the unit that suits them, three digits; "" of None."""
    if us is None:
        return ""
    for unit, step in (("s", 1e6), ("ms", 1e3)):
        if us >= step:
            return f"{us / step:.3g} {unit}" if us < 999.5 * step else f"{us / step:.0f} {unit}"
    return f"{us:.3g} us"


def unexpected_argument(function: str, name: str, valid: Iterable[str], hint: str = "") -> TypeError:
    """The error for an argument that a function does not take; without a hint, the name that is nearest is one."""
    from difflib import get_close_matches

    valid = list(valid)
    near = get_close_matches(name, valid, 1)
    hint = hint or (f"did you mean {near[0]!r}?" if near else "")
    return TypeError(
        f"{function}() got an unexpected keyword argument {name!r};{hint and f' {hint}'} valid: {', '.join(valid)}"
    )


def unknown_kernel(name: str, known: Iterable[str]) -> ValueError:
    """The error for a kernel that does not exist, with the name that is nearest."""
    from difflib import get_close_matches

    known = list(known)
    near = get_close_matches(name, known, 1)
    hint = f" did you mean {near[0]!r}?" if near else ""
    return ValueError(f"unknown kernel {name!r};{hint} known: {', '.join(known)}")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, "" where it has none."""
    return (str(error).splitlines() or [""])[0][:200]


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" of torch.float32."""
    return str(dtype).removeprefix("torch.")


def type_name(value: object) -> str:
    """The type of a value; with its module where it is no builtin: "numpy.bool" is another one than "bool"."""
    kind = type(value)
    return kind.__name__ if kind.__module__ in ("builtins", "torch") else f"{kind.__module__}.{kind.__name__}"
