"""How a number of bytes or of microseconds is written for people."""

from __future__ import annotations


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
