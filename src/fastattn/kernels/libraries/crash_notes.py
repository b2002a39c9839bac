"""Candidates of libraries that end the process while they are tried: a note on disk before, taken away after.

A note that is still there, of a process that is not, is why the next process leaves the candidate alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from fastattn.environment.blame import suppress_system_errors
from fastattn.environment.cache_files import make_directory, publish, read_safely
from fastattn.environment.errors import is_sticky


@contextmanager
def leave_note(root: Path | None, what: str) -> Generator[None]:
    """Leave a note while `what` is tried, and behind a sticky CUDA error. root: the cache; without one nothing is noted."""
    path = _path(root, what)
    if path is not None:
        with suppress_system_errors():
            make_directory(path.parent)
            publish(path, json.dumps({"tried": what, "pid": os.getpid()}).encode())
    try:
        yield
    except Exception as error:
        path = None if is_sticky(error) else path  # it broke this process, if not at once
        raise
    finally:
        if path is not None:
            with suppress_system_errors():
                path.unlink()


def crashed_before(root: Path | None, what: str) -> str | None:
    """Why not to try `what`: its note is there, and the process that wrote it is not."""
    path = _path(root, what)
    try:
        pid = json.loads(read_safely(path))["pid"] if path is not None else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    if not isinstance(pid, int) or pid == os.getpid() or _is_alive(pid):
        return None
    return "it ended the process that tried it; `fastattn cache clear` has it tried again"


def _path(root: Path | None, what: str) -> Path | None:
    return (
        root / "trying" / "notes" / f"{hashlib.sha256(what.encode()).hexdigest()[:24]}.json"
        if root is not None
        else None
    )


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
