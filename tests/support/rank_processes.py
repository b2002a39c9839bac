"""Processes that are the ranks of one group."""

from __future__ import annotations

import subprocess
import time

TIMEOUT_S = 60


def outputs_of(ranks: list[subprocess.Popen[str]]) -> list[tuple[str, str]]:
    """What each rank wrote to its standard output and error, once all have ended; if one failed the other is not waited for."""
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while any(r.poll() is None for r in ranks) and not any(r.poll() for r in ranks):
            assert time.monotonic() < deadline, "a rank hangs"
            time.sleep(0.05)
    finally:
        for r in ranks:
            r.kill()
    return [r.communicate() for r in ranks]
