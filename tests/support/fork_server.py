"""A process that has imported torch and nothing else, and forks for each child that a test wants: none imports torch again.

children.py starts it, `python fork_server.py FD`, with a socket. A message there brings four files: another socket, for this
child alone, and its standard input, output and error. What it is to run comes by that socket, and its process id and then how
it ended go back. It ends when nobody holds the other end of the first one. Nothing may be computed here: a pool of threads
that torch started would be gone in the children.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import signal
import socket
import struct
import sys
import threading
from contextlib import suppress
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from types import ModuleType
from typing import Any

NUMBER = struct.Struct("i")


def serve(link: socket.socket) -> dict[str, Any]:
    """Returns in each child what it is to run, and nowhere else."""
    while True:
        told, files, *_ = socket.recv_fds(link, 1, 4)
        if not told:
            os._exit(0)
        if os.fork() == 0:
            link.close()
            return child_of(*files)
        for file in files:
            os.close(file)
        with suppress(ChildProcessError):  # none is left
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def child_of(own: int, *streams: int) -> dict[str, Any]:
    """Forks once more: this process waits for the child, and says how it ended."""
    with socket.socket(fileno=own) as talk, talk.makefile(encoding="utf-8") as lines:
        told = json.loads(lines.readline())
        if pid := os.fork():
            for stream in streams:
                os.close(stream)
            talk.sendall(NUMBER.pack(pid))
            ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with suppress(BrokenPipeError):
                talk.sendall(NUMBER.pack(ended))
            os._exit(0)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    return told


def become(told: dict[str, Any], usual_path: list[str]) -> ModuleType:
    """Make this process the one that `python -c` would have started; its module __main__."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(told["cwd"])
    os.environ.clear()
    os.environ.update(told["environ"])
    sys.argv = ["-c", *told["arguments"]]
    first = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = ["", *first, *usual_path]
    if spec := PathFinder.find_spec("sitecustomize", first):
        spec.loader.exec_module(module_from_spec(spec))
    main = sys.modules["__main__"] = ModuleType("__main__")
    return main


def run(code: str, main: ModuleType) -> int:
    """Its exit code, of which Python makes what is raised."""
    try:
        exec(compile(code, "<string>", "exec"), main.__dict__)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def leave(exit_code: int) -> None:
    """End as Python does, but for taking all modules apart, which of torch's takes 0.3 s; multiprocessing's children do too."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code & 0xFF)


if __name__ == "__main__":
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the tests
    gc.collect()
    gc.freeze()  # what is here for good is no garbage of a child's
    usual = sys.path[1:]  # less this file's own folder
    told = serve(socket.socket(fileno=int(sys.argv[1])))
    torch.default_generator.seed()  # numbers of its own, as a new process has
    main = become(told, usual)
    leave(run(told["code"], main))
