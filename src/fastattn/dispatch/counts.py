"""What the calls of a process came to, counted in the way of a miss; hits are counted by the entries themselves."""

from __future__ import annotations

from collections import Counter
from threading import Lock

from fastattn.dispatch import entries


class Counts:
    """Misses and tunings, who served the misses, and why calls were passed on to F.sdpa."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start counting anew."""
        self.renew_lock()
        self.misses = self.tunings = 0
        self.tuning_s = 0.0
        self.served_by: Counter[str] = Counter()
        self.passed_on: Counter[str] = Counter()
        self._hits_before = entries.all_hits()

    def renew_lock(self) -> None:
        """After a fork no other thread is left that could hold the old one."""
        self._lock = Lock()

    def miss(self, candidate: str) -> None:
        """A miss that this candidate serves."""
        with self._lock:
            self.misses += 1
            self.served_by[candidate] += 1

    def pass_on(self, why: str) -> None:
        """A call that goes to F.sdpa as it was."""
        with self._lock:
            self.passed_on[why] += 1

    def hits(self) -> tuple[Counter[str], Counter[str], float]:
        """Hits since the last reset: by candidate; of calls that are passed on, by the reason; what they saved in us."""
        served: Counter[str] = Counter()
        passed_on: Counter[str] = Counter()
        saved_us = 0.0
        for leads_to, n in entries.all_hits().items():
            candidate, why, saves_us = leads_to
            if since := n - self._hits_before.get(leads_to, 0):
                (passed_on if why else served)[why or candidate] += since
                saved_us += max(0, since) * saves_us
        return served, passed_on, saved_us
