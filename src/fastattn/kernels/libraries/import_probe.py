"""Whether a module can be imported, tried in a child process: one that hangs or ends the process costs a sentence.

What ended a child, and what did not, is remembered per version in the cache directory: <cache>/imports/<python and torch>/.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from fastattn.environment.blame import suppress_system_errors
from fastattn.environment.cache_files import make_directory, publish, read_safely
from fastattn.environment.log import log

TIMEOUT_S = 60.0  # a large library on a cold disk takes 20
ENDED, HANGS = "importing it ended the process", "importing it did not end"
KILLED = tuple(f"{ENDED}: SIG{name}" for name in ("KILL", "TERM", "INT", "HUP"))  # by somebody else, it may be

# What the child runs: the same sys.path as ours, one import, one look. Its answer follows a mark, as libraries print.
_MARK = b"\x1efastattn:"
_CHILD = f"""
import functools, json, os, sys
module, entry, beside, path = json.loads(sys.argv[1])
sys.path[:] = path
def load(name, names=()):
    if not os.path.isabs(name):
        return __import__(name, fromlist=names)
    from torch import ops
    ops.load_library(name)
    return ops
for name in beside:
    try:
        load(name)
    except Exception:
        pass
try:
    functools.reduce(getattr, entry.split("."), load(module, ["*"]))
    answer = ""
except BaseException as error:
    answer = type(error).__name__ + ": " + (str(error).strip().splitlines() or [""])[0][:300]
os.write(1, {_MARK!r} + answer.encode("utf-8", "replace"))
os._exit(0)
"""


def why_import_crashes(
    module: str, entry: str, version: str, root: Path | None, beside: Sequence[str] = (), after: Sequence[str] = ()
) -> str | None:
    """How importing a module would end or hang this process; None where it does not, or merely raises.

    A child tries it, beside other modules that are here: two libraries may register the same ops. root: the cache. after: what
    it cannot be imported without.
    """
    memory = _memory(root, module, version, beside)
    answer = _remembered(memory)
    if answer is None:
        log.info("%s is tried in a child process, as it is new here", module)
        why = why_import_fails(module, entry, beside=(*after, *beside)) or ""
        answer = why if why.startswith((ENDED, HANGS)) else ""
        is_its_own = not answer.startswith((HANGS, *KILLED))
        if memory is not None and is_its_own:
            with suppress_system_errors():
                make_directory(memory.parent)
                publish(memory, json.dumps({"module": module, "version": version, "fatal": answer}).encode())
    if not answer:
        return None
    again = "; `fastattn cache clear` has it tried again" if memory is not None and memory.exists() else ""
    return answer + (f" (beside {', '.join(beside)})" if beside else "") + again


def _memory(root: Path | None, module: str, version: str, beside: Sequence[str]) -> Path | None:
    """The file that remembers what came of it."""
    if root is None:
        return None
    digest = hashlib.sha256(repr((module, version, tuple(beside))).encode()).hexdigest()[:24]
    return root / "imports" / f"python{platform.python_version()}-torch{torch.__version__}" / f"{digest}.json"


def _remembered(memory: Path | None) -> str | None:
    try:
        found = json.loads(read_safely(memory))["fatal"] if memory is not None else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return found if isinstance(found, str) else None


def why_import_fails(module: str, entry: str, timeout_s: float = TIMEOUT_S, beside: Sequence[str] = ()) -> str | None:
    """Why `from module import entry` fails here, or None if it works. beside: modules to import first.

    A module may be the path of a file of torch's operators; entry is then a name in torch.ops.
    """
    if not sys.executable or getattr(sys, "frozen", False):  # an application would start itself
        return None
    told = json.dumps([module, entry, list(beside), sys.path])
    with tempfile.TemporaryFile() as output:  # a pipe would stay open as long as any process that the library started
        try:
            child = subprocess.Popen(
                [sys.executable, "-c", _CHILD, told],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            return f"no child process could try it: {error}"
        try:
            code = child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return f"{HANGS} within {timeout_s:.3g} s"
        finally:
            _end(child)
        output.seek(0)
        _, mark, answer = output.read().rpartition(_MARK)
    if not mark:
        return f"{ENDED}: {_ending(code)}"
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
