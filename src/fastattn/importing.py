"""Whether a module can be imported, tried in a child process: one that hangs or ends the process costs a sentence."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile

TIMEOUT_S = 60.0  # a large library on a cold disk takes 20

# What the child runs: the same sys.path as ours, one import, one look. Its answer follows a mark, as libraries print.
_MARK = b"\x1efastattn:"
_CHILD = f"""
import sys
sys.path[:] = sys.argv[3:]
try:
    getattr(__import__(sys.argv[1], fromlist=["*"]), sys.argv[2])
    answer = ""
except BaseException as error:
    answer = type(error).__name__ + ": " + (str(error).strip().splitlines() or [""])[0][:300]
import os
os.write(1, {_MARK!r} + answer.encode("utf-8", "replace"))
os._exit(0)
"""


def why_not(module: str, entry: str, timeout_s: float = TIMEOUT_S) -> str | None:
    """Why `from module import entry` fails here, or None if it works."""
    with tempfile.TemporaryFile() as output:  # a pipe would stay open as long as any process that the library started
        child = subprocess.Popen(
            [sys.executable, "-c", _CHILD, module, entry, *sys.path],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code = child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return f"importing it did not end within {timeout_s:.3g} s"
        finally:
            _end(child)
        output.seek(0)
        _, mark, answer = output.read().rpartition(_MARK)
    if not mark:
        return f"importing it ended the process: {_ending(code)}"
    return answer.decode("utf-8", "replace") or None


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a child that still runs, with all it started."""
    if child.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()
        child.wait()


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
