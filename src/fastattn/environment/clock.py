"""The time that passes, read by functions that were bound when fastattn was imported.

Tools that freeze or move the time of a test (freezegun, a patched `time.perf_counter`) replace what the modules hold: what a
class holds they leave alone.
"""

from __future__ import annotations

import time


class _Bound:
    now = staticmethod(time.perf_counter)
    cpu_seconds = staticmethod(time.process_time)


def now() -> float:
    """Seconds since some moment; never less than before, where the machine's clock is sound."""
    return _Bound.now()


def cpu_seconds() -> float:
    """Seconds of CPU time that all threads of this process have used."""
    return _Bound.cpu_seconds()


def seconds_since(start: float) -> float:
    """Seconds since a reading of now(); 0 where the clock went back."""
    return max(0.0, now() - start)
