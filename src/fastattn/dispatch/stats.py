"""stats(): what this process's calls came to."""

from __future__ import annotations

from collections import Counter
from typing import Any

from fastattn.dispatch.session import session
from fastattn.environment.text import format_duration

MOST = 12  # lines of each kind that are printed


class Stats(dict[str, Any]):
    """A plain dict that prints as a few lines.

    calls, hits, misses, tunings: counts. tuning_s: seconds spent on tuning. served_by: {candidate: calls}. passed_on: {reason:
    calls that went to F.sdpa as they were}. untuned: {problem: misses that were served untuned}. demoted: {candidate and
    problem: what it raised}. saved_s: seconds saved, an estimate: each hit counts the default's time less that of who served
    it, as the tuning of that very problem measured them, with the backward where gradients are wanted. Hits of lengths that
    share a verdict are not in it: its times are of other lengths.
    """

    def __repr__(self) -> str:
        head = "{calls} calls: {hits} hits, {misses} misses, {passed} passed on; {tunings} tunings in {tuning_s:.1f} s"
        lines = [head.format(**self, passed=sum(self["passed_on"].values()))]
        for title, name in (
            ("served by", "served_by"),
            ("passed on", "passed_on"),
            ("untuned", "untuned"),
            ("demoted", "demoted"),
        ):
            lines += [f"  {title:<10}{count:>9}  {what}" for what, count in _by_count(self[name])[:MOST]]
        if self["saved_s"]:
            lines.append(
                f"  saved     about {format_duration(self['saved_s'] * 1e6)}, by the times of the tunings (an estimate)"
            )
        return "\n".join(lines)


def _by_count(found: dict[str, Any]) -> list[tuple[str, Any]]:
    return sorted(found.items(), key=lambda item: -item[1] if isinstance(item[1], int) else 0)


class _StatsFunction:
    """What the calls of this process came to since it began, or since `stats.reset()`; a dict that prints as a few lines.

    Hits are counted by the entries themselves; all else in the way of a miss.
    """

    def __call__(self) -> Stats:
        counts, (hits, again, saved_us) = session.counts, session.counts.hits()
        with session.lock:
            untuned, demoted = dict(session.misses), dict(session.demotions)
        served = Counter(counts.served_by)
        served.update(hits)
        passed_on = counts.passed_on + again
        return Stats(
            calls=sum(hits.values()) + counts.misses + sum(passed_on.values()),
            hits=sum(hits.values()),
            misses=counts.misses,
            tunings=counts.tunings,
            tuning_s=counts.tuning_s,
            saved_s=saved_us / 1e6,
            served_by={candidate: count for candidate, count in served.items() if count},
            passed_on=dict(passed_on),
            untuned={str(problem): count for problem, count in untuned.items()},
            demoted={f"{name} for {problem}": cause for (problem, name), cause in demoted.items()},
        )

    def reset(self) -> None:
        """Start counting anew. What was demoted stays so, and is still said."""
        with session.lock:
            session.counts.reset()
            session.misses.clear()


stats = _StatsFunction()
