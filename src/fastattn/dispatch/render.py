"""How an Explanation is written: for `print`, and for the command line, which colours the same lines."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fastattn.environment.text import format_bytes, format_duration
from fastattn.planning.decision import ON_COPIES, but_for_copies
from fastattn.verdicts.verdict import MARGIN, Outcome, Trial, Verdict

if TYPE_CHECKING:
    from fastattn.dispatch.explain import Explanation

OFTEN = 4  # rows with one reason, which then share a line
WIDEST = 128  # of a line that lists names
IN_DOUBT = "? measured while other programs used the CPU; run again when the machine is quiet"


def lines(e: Explanation, width: int | None = None) -> Iterator[tuple[str, str]]:
    """(kind, text) of every line that is printed; kind is "head", "served", "timed", "out" or "note".

    width: what is longer goes on in the next line, below where its text begins.
    """
    of_mask = [f"mask     {e.mask}"] if e.mask else []
    for text in (f"problem  {e.problem}", *of_mask, f"device   {e.device}", f"served by {e.served_by}: {e.why}", ""):
        yield from (("head", line) for line in _folded(text, width, 9))
    alike = _alike(e.rows)
    rows = [t for t in e.rows if all(t not in together for together in alike.values())]
    names = max(len(t.candidate) for t in rows or e.rows)
    base = e.verdict.trial(e.verdict.incumbent) if e.verdict else None
    doubt = mark_of_doubt(e.verdict)
    for t in rows:
        kind = "served" if t.candidate == e.served_by else "timed" if t.is_timed else "out"
        mark = "*" if kind == "served" else " "
        text = _measured(t, base, doubt) if t.is_timed else _why_out(t)
        for line in _folded(f"{mark} {t.candidate:<{names}}  {text}", width, names + 4):
            yield kind, line
    for why, together in alike.items():
        text = f"  {why}: {', '.join(t.candidate for t in together)}"
        yield from (("out", line) for line in _folded(text, width or WIDEST, 4))
    if doubt:
        yield "note", ""
        yield from (("note", line) for line in _folded(IN_DOUBT, width, 2))


def _alike(rows: Sequence[Trial]) -> dict[str, list[Trial]]:
    """Rows that are out for the same reason, where that is said often: they share a line."""
    found: dict[str, list[Trial]] = {}
    for t in rows:
        if not t.is_timed and t.reason and t.forward is None and t.outcome is not Outcome.DEMOTED:
            found.setdefault(_in_short(t.reason), []).append(t)
    return {why: together for why, together in found.items() if len(together) >= OFTEN}


def _in_short(reason: str) -> str:
    """A reason as many rows may share it: of what is not installed, which package it is leads no further here."""
    others, _, last = reason.rpartition("; ")
    if not (last.startswith("package ") and last.endswith(" is not installed")):
        return reason
    return "not installed, and not for this call either" if others else "not installed (`fastattn doctor` says how)"


def mark_of_doubt(verdict: Verdict | None) -> str:
    """The mark behind a speed that is worth little; IN_DOUBT says what it means."""
    return "?" if verdict is not None and verdict.is_crowded else ""


def errors_of(trial: Trial | None) -> str:
    """The largest error in budgets, forward and, where there is one, backward: "0.23 / 0.41"."""
    if trial is None or trial.forward is None:
        return ""
    return f"{trial.forward:.2f}" + (f" / {trial.backward:.2f}" if trial.backward is not None else "")


def _measured(trial: Trial, incumbent: Trial | None, doubt: str) -> str:
    """A candidate's time, speed against the default, what is worth knowing of it, error in budgets, and memory."""
    gain = ""
    if incumbent is not None and incumbent.time_us and trial.time_us:
        gain = f"{incumbent.time_us / trial.time_us:6.2f}x{doubt}"
    new = f", {trial.reason}" if trial.reason else ""
    kept = f", keeps {format_bytes(trial.saved_bytes)}" if trial.saved_bytes else ""
    memory = f"{format_bytes(trial.temporary_bytes or 0)} temporary{kept}"
    return f"{format_duration(trial.time_us):>7}{gain}{new}  error {errors_of(trial)} of budget, {memory}"


def _why_out(trial: Trial) -> str:
    """Why a candidate has no time."""
    if trial.outcome is Outcome.DEMOTED:
        return f"demoted: it raised {trial.reason}"
    error = f" (error {errors_of(trial)} of budget)" if trial.forward is not None and not trial.reason else ""
    return (trial.reason or "can do it; not measured") + error


def _folded(text: str, width: int | None, indent: int) -> list[str]:
    if width is None:
        return [text]
    indent = indent if indent <= width // 2 else 4
    whole_names = textwrap.TextWrapper(
        width, subsequent_indent=" " * indent, break_on_hyphens=False, break_long_words=False
    )
    return whole_names.wrap(text) or [text]


def why_served(verdict: Verdict, served: str, why_not_default: str | None = None) -> str:
    """Why a candidate of this verdict serves, with the numbers that decided. why_not_default: what keeps the default out."""
    if served != verdict.winner and but_for_copies(served) == but_for_copies(verdict.winner):
        return ON_COPIES
    if served != verdict.winner:
        why = (why_not_default if verdict.winner == "default" else None) or "it cannot do this call"
        return f"the stored winner {verdict.winner} is not served: {why}"
    if served == verdict.incumbent:
        failed = verdict.trial(served)
        if verdict.is_provisional:
            return f"{verdict.why_not_lasting}; it serves until a process on a quiet machine has timed the others"
        if failed is not None and failed.reason and not failed.is_timed:
            return f"nothing passed; the default itself: {failed.reason}"
        return why_kept(verdict)
    gain, best = verdict.speedup(), next(iter(verdict.timed()), None)
    tie = ""
    if best is not None and best.candidate != served:
        tie = f"; {best.candidate} is within the margin, where the fixed order decides"
    return f"{gain:.2f}x the default's speed{tie}" if gain else "the default itself did not pass"


def challenger(verdict: Verdict) -> tuple[str, float] | None:
    """(name, speed against the default) of the candidate that came nearest to replacing it; None where none had a time."""
    base = verdict.trial(verdict.incumbent)
    best = next((t for t in verdict.timed() if t.candidate != verdict.incumbent), None)
    if base is None or best is None or not base.time_us or not best.time_us:
        return None
    return best.candidate, base.time_us / best.time_us


def why_kept(verdict: Verdict) -> str:
    """Why nothing replaced the default: what came nearest, how far behind it was, and what that measurement was worth."""
    nearest, base = challenger(verdict), verdict.trial(verdict.incumbent)
    if nearest is None or base is None:
        return "nothing else passed and was fast enough to be timed"
    name, gain = nearest
    if gain <= 1:
        return f"the fastest; {name} came nearest with {gain:.2f}x"
    best = verdict.trial(name)
    noise = 2 * max(base.noise or 0.0, best.noise or 0.0 if best else 0.0)
    if gain <= 1 + MARGIN:
        worth = f"within the margin of {MARGIN:.0%}"
    else:
        worth = f"within the noise of {noise:.0%}" if gain <= 1 + noise else "in too few rounds to be sure"
    return f"{name} measured {gain:.2f}x, {worth}"
