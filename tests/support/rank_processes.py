"""Processes that are the two ranks of one group."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import children

TIMEOUT_S = 60


def run(code: str, stores: Path, **environment: str) -> list[children.Child]:
    """Both ranks, each with a store of its own, once they have ended; if one failed the other is not waited for."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **environment}
    ranks = []
    try:
        for rank in range(2):
            own = {"RANK": str(rank), "FASTATTN_CACHE_DIR": str(stores / f"rank{rank}")}
            ranks.append(children.start(code, env={**group, **own}))
        deadline = time.monotonic() + TIMEOUT_S
        while any(r.returncode is None for r in ranks) and not any(r.returncode for r in ranks):
            assert time.monotonic() < deadline, "a rank hangs"
            time.sleep(0.05)
    finally:
        for rank in ranks:
            rank.kill()
    return [rank.wait() for rank in ranks]
