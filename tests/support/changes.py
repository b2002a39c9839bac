"""A state of torch that is another one inside a block."""

from __future__ import annotations

import contextlib


@contextlib.contextmanager
def changed(read, write, value):
    """write(value), and what read() gave before afterwards."""
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)
