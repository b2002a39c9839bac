"""Tiles or what computes all pairs: where a verdict has both, each call's own mask decides.

A tuning times them with a mask that is made up. Where tiles won, one that hides less is served without them; where they lost,
one that hides more is served in them, if the look at it costs little.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import TYPE_CHECKING

from fastattn.dispatch import fallback
from fastattn.planning.binding import ByShare
from fastattn.planning.conversions.tiles import is_large, may_be_tiled
from fastattn.planning.decision import Accepted, but_for_copies
from fastattn.verdicts.verdict import Trial, Verdict

if TYPE_CHECKING:
    from fastattn.dispatch.service import Asked

# Where tiles lost a mask is looked at if they win with one that leaves a quarter of all pairs, and if the look is at most 3%
# of what is served then: it took 0.2 to 0.4 ms for a mask of 512 x 512, one thread of an EPYC with AVX2.
LEAST_SHARE = 0.25
LEAST_US = 15_000


def by_share(candidate: Accepted, asked: Asked, verdict: Verdict | None, *, certain: bool = True) -> ByShare | None:
    """The two that each call's mask decides between, None where nothing is to decide. candidate: what the verdict serves."""
    if asked.kernel is not None or verdict is None or asked.problem.mask is None:
        return None  # with a triangle or a window alone, calls of a problem hide all alike
    own = _trial_of(candidate, verdict)
    if own is None or not own.is_timed or not (candidate.is_in_tiles or _is_worth_a_look(own, asked, verdict)):
        return None
    for other, trial in _others(candidate, asked, verdict, certain):
        if candidate.is_in_tiles:
            worth = verdict.worth_of_tiles(own, trial)
            return ByShare(candidate, other, worth, count()) if worth else None
        worth = verdict.worth_of_tiles(trial, own, is_to_gain=True)
        if worth and worth.allows(LEAST_SHARE, LEAST_SHARE):
            return ByShare(other, candidate, worth, count())
        return None
    return None


def _trial_of(candidate: Accepted, verdict: Verdict) -> Trial | None:
    """Its own trial, or that of the same with other copies."""
    same = (t for t in verdict.timed() if but_for_copies(t.candidate) == but_for_copies(candidate.name))
    return verdict.trial(candidate.name) or next(same, None)


def _is_worth_a_look(plain: Trial, asked: Asked, verdict: Verdict) -> bool:
    """Whether masks are looked at though tiles lost; a provisional verdict has no times to go by."""
    is_lasting = not verdict.is_provisional and (plain.time_us or 0.0) >= LEAST_US
    return is_lasting and may_be_tiled(asked.problem) and is_large(asked.problem)


def _others(candidate: Accepted, asked: Asked, verdict: Verdict, certain: bool) -> Iterator[tuple[Accepted, Trial]]:
    """What was timed in tiles, if the candidate is not, and the other way round; the fastest first."""
    for trial in verdict.timed():
        if ("tiles" in trial.candidate.split("+")) is not candidate.is_in_tiles:
            yield from ((c, trial) for c in fallback.ranked(trial.candidate, asked, verdict, certain=certain))
