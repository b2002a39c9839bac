"""What of an older Verdict still holds: a library that is new, changed or gone is tried again, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from fastattn.environment.device import Device
from fastattn.environment.settings import Settings
from fastattn.environment.version import __version__
from fastattn.kernels import registry
from fastattn.kernels.libraries import availability, tags
from fastattn.planning import candidates
from fastattn.planning.decision import Accepted, Decision
from fastattn.verdicts.verdict import OPEN, Outcome, Verdict


def is_fresh(verdict: Verdict, device: Device, settings: Settings) -> bool:
    """Whether every candidate there is today was tried, in the version that is installed, and the winner can still run.

    What was timed on a machine that was not quiet, or by a clock that failed, is not fresh for another process, nor what had no
    time for a library that is installed.

    Where fastattn and the installed libraries are those of the verdict nothing else is asked, and no adapter is imported: a
    stored verdict must cost a new process next to nothing.
    """
    if not verdict.is_lasting or verdict.is_unfinished:
        return False
    tried = {t.candidate.split("+")[0] for t in verdict.trials}
    is_unchanged = (
        verdict.made_by == __version__
        and verdict.kernels == settings.kernels
        and verdict.libraries == libraries_now(verdict.problem.device)
        and all(kernel.name in tried for kernel in registry.registered())
    )
    return is_unchanged or not _has_something_new(verdict, device, settings)


def _has_something_new(verdict: Verdict, device: Device, settings: Settings) -> bool:
    """Whether a candidate appeared or changed since, or the winner vanished: then they compete again."""
    accepted = [d for d in candidates.decisions(verdict.problem, device, settings) if isinstance(d, Accepted)]
    is_winner_here = any(d.name == verdict.winner for d in accepted)
    return not is_winner_here or any(not _is_tried(verdict, d) for d in accepted)


def libraries_now(device_type: str) -> dict[str, str]:
    """The kernel libraries that may serve on such a device, each with its version and what its environment says."""
    own = {kernel.library for kernel in registry.registered()} - {"torch"}
    return {
        **tags.installed_for(device_type),
        **{library: tags.tag_of(library, availability.library_version(library)) for library in own},
    }


def settled(known: Verdict | None, found: Sequence[Decision]) -> set[str]:
    """Candidates that need no new trial: tried in the version that is installed, and neither incumbent nor winner."""
    if known is None:
        return set()
    accepted = [d for d in found if isinstance(d, Accepted)]
    names = {d.name for d in accepted if _is_tried(known, d)} - {known.incumbent, known.winner, "default"}
    names -= {t.candidate for t in known.trials if t.outcome is Outcome.RUN_BY_DEFAULT}  # it may run another one by now
    names -= {t.candidate for t in known.trials if t.outcome in OPEN}
    if not known.is_lasting:  # its times say nothing
        names -= {t.candidate for t in known.trials if t.is_timed or t.outcome is Outcome.TOO_SLOW}
    if all(d.name != known.winner for d in accepted):  # it is gone: whoever had a time competes for its place
        names -= {t.candidate for t in known.timed()}
    return names


def _is_tried(verdict: Verdict, candidate: Accepted) -> bool:
    trial = verdict.trial(candidate.name)
    return trial is not None and trial.library == availability.library_tag(candidate.kernel)
