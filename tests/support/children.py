"""Other processes, the one way in which tests start them: `run(code)` waits for the end, `start(code)` does not.

A child is forked from a process that has imported torch (fork_server.py), one per process of pytest: it need not do so again,
which is most of what a child costs. fastattn it imports itself. `fresh=True` starts a new Python instead: for what depends on
the start of a process, such as the order of imports and hashes of strings, which differ between processes, or on its end, where
all modules are taken apart. Options of Python have one too, so do variables that are read when Python, OpenMP or torch is
loaded, and every child where the system is not Linux.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fork_server import NUMBER

CAN_FORK = sys.platform == "linux"
SERVER = Path(__file__).with_name("fork_server.py")
PATH = os.pathsep.join(
    [str(SERVER.parent), os.environ.get("PYTHONPATH", "")]
)  # a PYTHONPATH for what imports tests/support
TIMEOUT_S = 120.0
AT_START = dict(os.environ)  # what the server is loaded with, before any test changes it
READ_AT_START = ("PYTHON", "LC_", "LANG", "LD_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "ONEDNN_", "DNNL_", "ATEN_",
                 "TORCH_", "CUDA_", "NVIDIA_")  # fmt: skip


def run(code: str | Path, *arguments: str, timeout: float = TIMEOUT_S, **how) -> Child:
    """The child that has run `code`: returncode, stdout, stderr. Raises TimeoutExpired."""
    return start(code, *arguments, **how).wait(timeout)


def start(
    code: str | Path,
    *arguments: str,
    env: Mapping[str, str | None] = {},
    cwd: Path | None = None,
    fresh: bool | None = None,
    flags: tuple[str, ...] = (),
) -> Child:
    """A child that runs `code` as `python -W ignore -c` does; a Path is a program, which a new Python runs.

    env: what is other than in this process's environment, None for what is not there. flags: of a new Python.
    """
    if fresh is None:
        is_read_at_start = any(name.startswith(READ_AT_START) and name != "PYTHONPATH" for name in env)
        fresh = bool(flags) or is_read_at_start or isinstance(code, Path)
    environ = {name: value for name, value in {**os.environ, **env}.items() if value is not None}
    (stdout, to_stdout), (stderr, to_stderr) = os.pipe(), os.pipe()
    with open(os.devnull) as stdin:
        streams = [stdin.fileno(), to_stdout, to_stderr]
        if fresh or not CAN_FORK:
            words = [
                sys.executable,
                "-W",
                "ignore",
                *flags,
                *([code] if isinstance(code, Path) else ["-c", code]),
                *arguments,
            ]
            process = subprocess.Popen(words, 0, None, *streams, cwd=cwd, env=environ)
        else:
            process = Forked(
                {"code": code, "arguments": arguments, "environ": environ, "cwd": str(cwd or Path.cwd())}, streams
            )
    os.close(to_stdout)
    os.close(to_stderr)
    return Child(process, Reader(stdout), Reader(stderr))


class Child:
    """A process that was started, and what it has written by now."""

    def __init__(self, process: Forked | subprocess.Popen[bytes], stdout: Reader, stderr: Reader) -> None:
        self.process, self.readers = process, (stdout, stderr)

    stdout = property(lambda self: self.readers[0].text)
    stderr = property(lambda self: self.readers[1].text)
    returncode = property(lambda self: self.process.poll())  # None while it runs

    def wait(self, timeout: float = TIMEOUT_S) -> Child:
        """Until it has ended, and all that it wrote is here. One that takes longer is killed: TimeoutExpired."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        for reader in self.readers:
            reader.join(timeout)
        return self

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Reader(threading.Thread):
    """Reads a pipe to its end, so that no child waits for room in it."""

    def __init__(self, pipe: int) -> None:
        super().__init__(daemon=True)
        self.pipe, self.parts = pipe, []
        self.start()

    def run(self) -> None:
        while part := os.read(self.pipe, 2**16):
            self.parts.append(part)
        os.close(self.pipe)

    @property
    def text(self) -> str:
        return b"".join(self.parts).decode("utf-8", "replace")


class Forked:
    """A child of the fork server, in the words of subprocess.Popen."""

    def __init__(self, told: dict[str, Any], streams: list[int]) -> None:
        self.talk, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(server(), [b"!"], [theirs.fileno(), *streams])
        self.talk.sendall(json.dumps(told).encode() + b"\n")
        self.pid, self.returncode = self._hear(None), None

    def _hear(self, timeout: float | None) -> int:
        self.talk.settimeout(timeout)
        (number,) = NUMBER.unpack(self.talk.recv(NUMBER.size))
        return number

    def wait(self, timeout: float | None = None) -> int:
        try:
            self.returncode = self._hear(timeout) if self.returncode is None else self.returncode
        except TimeoutError:
            raise subprocess.TimeoutExpired(f"child {self.pid}", timeout or 0) from None
        return self.returncode

    def poll(self) -> int | None:
        try:
            self.returncode = self._hear(0) if self.returncode is None else self.returncode
        except BlockingIOError:
            return None
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


@cache
def server() -> socket.socket:
    """The socket of this process's fork server, which is started by the first call."""
    ours, theirs = socket.socketpair()
    environ = {name: value for name, value in AT_START.items() if name != "PYTHONPATH"}  # each child has its own
    with theirs:
        words = [sys.executable, "-W", "ignore", str(SERVER), str(theirs.fileno())]
        started = subprocess.Popen(
            words, env=environ, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )

    def stop() -> None:
        ours.close()
        started.wait(10)

    atexit.register(stop)
    return ours
