"""Characters that a terminal, a pipe or a log file cannot take: written another way, so that no command ends by them."""

from __future__ import annotations

import codecs
import contextlib
import sys
from collections.abc import Generator

import click

PLAIN = {"✓": "+", "✗": "x", "↘": "\\", "…": "."}  # our own marks and rich's, in any encoding and as wide as they were
HANDLER = "fastattn.plain"


def _in_plain_characters(error: UnicodeError) -> tuple[str, int]:
    """What is written for characters that cannot be encoded: its sign, else its number as Python writes it."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start : error.end]
    return "".join(PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode("ascii") for c in found), error.end


codecs.register_error(HANDLER, _in_plain_characters)


@contextlib.contextmanager
def never_refused() -> Generator[None]:
    """While this lasts stdout and stderr take every character, whatever their encoding is.

    Bytes of a file name that are no text (surrogates) are refused by UTF-8 too.
    """
    before = [(stream, stream.errors) for stream in (sys.stdout, sys.stderr) if hasattr(stream, "reconfigure")]
    for stream, _ in before:
        with contextlib.suppress(OSError, ValueError):  # closed, or a full disk behind it: whoever writes meets that
            stream.reconfigure(errors=HANDLER)  # type: ignore[union-attr]
    try:
        yield
    finally:
        for stream, errors in before:
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(errors=errors)  # type: ignore[union-attr]


def say(text: str, *, err: bool = False) -> None:
    """One text to stdout or stderr, in the stream's own encoding: where that is ASCII, click would write UTF-8."""
    click.echo(text, file=sys.stderr if err else sys.stdout)
