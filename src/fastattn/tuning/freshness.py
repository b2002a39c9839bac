"""What of an older Verdict still holds: a library that is new, changed or gone is tried again, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from fastattn.environment.device import Device
from fastattn.environment.settings import Settings
from fastattn.planning import candidates
from fastattn.planning.decision import Accepted, Decision
from fastattn.tuning.screening import library_tag
from fastattn.verdicts.verdict import Verdict

RUN_BY_DEFAULT = "the default runs this kernel"


def settled(known: Verdict | None, found: Sequence[Decision]) -> set[str]:
    """Candidates that need no new trial: tried in the version that is installed, and neither incumbent nor winner."""
    if known is None:
        return set()
    accepted = [d for d in found if isinstance(d, Accepted)]
    names = {d.name for d in accepted if _is_tried(known, d)} - {known.incumbent, known.winner, "default"}
    names -= {
        t.candidate for t in known.trials if t.reason == RUN_BY_DEFAULT
    }  # what F.sdpa runs may be another kernel by now
    if all(d.name != known.winner for d in accepted):  # it is gone: whoever had a time races for its place
        names -= {t.candidate for t in known.trials if t.time_us is not None}
    return names


def _is_tried(verdict: Verdict, candidate: Accepted) -> bool:
    trial = verdict.trial(candidate.name)
    return trial is not None and trial.library == library_tag(candidate)


def is_stale(verdict: Verdict, silicon: Device, config: Settings) -> bool:
    """Whether a kernel library appeared, changed or vanished since; then its candidates race the winner again."""
    found = candidates.decisions(verdict.problem, silicon, config)
    accepted = [d for d in found if isinstance(d, Accepted)]
    is_winner_here = any(d.name == verdict.winner for d in accepted)
    return not is_winner_here or any(not _is_tried(verdict, d) for d in accepted)
