"""Why a problem is served as it is: every candidate with its reason, or its time, error and memory."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.dispatch import fallback, resolve, session
from fastattn.dispatch.circumstances import PASS, TUNE, Circumstances, decide, read_circumstances
from fastattn.environment.device import Device
from fastattn.environment.settings import current_settings
from fastattn.environment.text import format_bytes, format_duration
from fastattn.planning import binding, candidates, default_choice
from fastattn.planning.decision import Accepted, Rejected
from fastattn.problems import call_key, call_options
from fastattn.problems.problem import Problem
from fastattn.tuning.choose import MARGIN
from fastattn.tuning.tune import is_crowded
from fastattn.verdicts.verdict import Trial, Verdict


@dataclass(frozen=True, slots=True)
class Explanation:
    """A problem, what serves it, and why; `print` it, or take `to_json()`. `rows` has every known kernel."""

    problem: Problem
    device: str
    served_by: str
    why: str
    rows: tuple[Trial, ...]
    verdict: Verdict | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        rows = [{name: getattr(t, name) for name in t.__dataclass_fields__} for t in self.rows]
        return {
            "problem": self.problem.to_json(),
            "device": self.device,
            "served_by": self.served_by,
            "why": self.why,
            "speedup": self.verdict.speedup() if self.verdict else None,
            "crowded": self.verdict.crowded if self.verdict else None,
            "candidates": rows,
        }

    def __str__(self) -> str:
        return "\n".join(text for _, text in self.lines())

    __repr__ = __str__

    def lines(self, width: int | None = None) -> Iterator[tuple[str, str]]:
        """(kind, text) of every line that is printed; kind is "head", "served", "timed", "out" or "note".

        width: what is longer goes on in the next line, below where its text begins.
        """
        served = f"served by {self.served_by}: {self.why}"
        for text in (f"problem  {self.problem}", f"device   {self.device}", served, ""):
            yield from (("head", line) for line in _folded(text, width, 9))
        alike = self._alike()
        rows = [t for t in self.rows if all(t not in together for together in alike.values())]
        names = max(len(t.candidate) for t in rows or self.rows)
        base = self.verdict.trial(self.verdict.incumbent) if self.verdict else None
        doubt = doubt_of(self.verdict)
        for t in rows:
            is_timed = t.time_us is not None and t.tombstone is None
            kind = "served" if t.candidate == self.served_by else "timed" if is_timed else "out"
            mark = "*" if kind == "served" else " "
            text = _measured(t, base, doubt) if is_timed else _why_out(t)
            for line in _folded(f"{mark} {t.candidate:<{names}}  {text}", width, names + 4):
                yield kind, line
        for why, together in alike.items():
            text = f"  {why}: {', '.join(t.candidate for t in together)}"
            yield from (("out", line) for line in _folded(text, width or WIDEST, 4))
        if doubt:
            yield "note", ""
            yield from (("note", line) for line in _folded(IN_DOUBT, width, 2))

    def _alike(self) -> dict[str, list[Trial]]:
        """Rows that are out for the same reason, where that is said often: they share a line."""
        found: dict[str, list[Trial]] = {}
        for t in self.rows:
            if t.time_us is None and t.reason and t.forward is None and t.tombstone is None:
                found.setdefault(_in_short(t.reason), []).append(t)
        return {why: together for why, together in found.items() if len(together) >= OFTEN}


OFTEN = 4  # rows with one reason
WIDEST = 128  # of a line that lists names
IN_DOUBT = "? measured while other programs used the CPU; run again when the machine is quiet"


def _in_short(reason: str) -> str:
    """A reason as many rows may share it: of what is not installed, which package it is leads no further here."""
    others, _, last = reason.rpartition("; ")
    if not (last.startswith("package ") and last.endswith(" is not installed")):
        return reason
    return "not installed, and not for this call either" if others else "not installed (`fastattn doctor` says how)"


def doubt_of(verdict: Verdict | None) -> str:
    """The mark behind a speed that is worth little; IN_DOUBT says what it means."""
    return "?" if verdict is not None and is_crowded(verdict) else ""


def errors_of(trial: Trial | None) -> str:
    """The largest error in budgets, forward and, where there is one, backward: "0.23 / 0.41"."""
    if trial is None or trial.forward is None:
        return ""
    return f"{trial.forward:.2f}" + (f" / {trial.backward:.2f}" if trial.backward is not None else "")


def _measured(trial: Trial, incumbent: Trial | None, doubt: str) -> str:
    """A candidate's time, speed against the default, error in budgets, and memory."""
    gain = ""
    if incumbent is not None and incumbent.time_us and trial.time_us:
        gain = f"{incumbent.time_us / trial.time_us:6.2f}x{doubt}"
    kept = f", keeps {format_bytes(trial.saved_bytes)}" if trial.saved_bytes else ""
    memory = f"{format_bytes(trial.temporary_bytes or 0)} temporary{kept}"
    return f"{format_duration(trial.time_us):>7}{gain}  error {errors_of(trial)} of budget, {memory}"


def _why_out(trial: Trial) -> str:
    """Why a candidate has no time."""
    if trial.tombstone is not None:
        return f"demoted: it raised {trial.tombstone}"
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


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any = None,
    layout: str = "bhsd",
    *,
    tune: bool = False,
    compiling: bool = False,
    **options: Any,
) -> Explanation:
    """Why `attention` with these arguments is served as it is. Runs nothing unless `tune=True`, which measures now.

    compiling: also the kernels that take seconds to compile first, as `fastattn tune --compile` does.

    Arguments and errors are those of `fastattn.attention`. Every known kernel appears: with a time, or with its reasons.
    """
    settings = current_settings()
    parsed = call_options.parse_options(options, "explain", ("tune", "compiling"))
    key = call_key.call_key(q, k, v, mask, layout, parsed)
    problem = Problem.from_key(key, settings.accuracy)
    if tune and not problem.is_custom:  # with the caller's own function there is nothing to choose
        resolve.tune(session.lengths(problem), settings, key.q.device, thorough=True, compiling=compiling)
        session.forget_calls()
    circumstances = read_circumstances(call_key.tensors_of(q, k, v, mask), settings, session.is_spent(settings))
    return of_problem(problem, parsed.kernel, circumstances)


def of_problem(problem: Problem, kernel: str | None = None, circumstances: Circumstances | None = None) -> Explanation:
    """The explanation of a problem, from what is stored and what can be decided without running anything."""
    settings = current_settings()
    silicon = Device.of(torch.device(problem.device))
    circumstances = circumstances or Circumstances()
    found = candidates.decisions(problem, silicon, settings, certain=True)
    verdict = session.find(problem, silicon, settings, circumstances, register=False)
    action, why = decide(circumstances)
    if kernel is not None:
        served, why = fallback.ordered(kernel, problem, silicon, settings).name, "ordered"
    elif action == PASS or verdict is None:
        last = default_choice.fallbacks(problem, silicon, settings, found)
        plain = default_choice.untuned_name(problem.softcap > 0 or problem.lse, problem.is_custom)
        served = plain if action == PASS else last[0].name if last else "nothing"
        untuned = "nothing else can" if problem.is_custom else "not tuned yet: the first call will"
        why = why if action != TUNE else untuned
        not_default = default_choice.why_not_default(problem, silicon, settings, found)
        why = not_default if not_default and served != "default" and not problem.is_custom else why
        why = why if last or action == PASS else "no kernel can do this call: it raises NoKernelError"
    else:
        served = fallback.chain(verdict, problem, silicon, settings)[0].name
        why = _why(verdict, served)
    return Explanation(problem, silicon.name, served, why, tuple(_rows(found, verdict)), verdict)


def _rows(found: list[Any], verdict: Verdict | None) -> list[Trial]:
    rows = []
    for d in found:
        trial = verdict.trial(d.name) if verdict is not None else None
        if isinstance(d, Rejected):
            rows.append(Trial(d.name, "; ".join(d.reasons)))
        elif trial is not None:
            rows.append(trial)
        elif isinstance(d, Accepted):
            rows.append(Trial(d.name))
    rows.sort(key=lambda t: (t.time_us is None, t.time_us or 0.0))
    return rows


def _why(verdict: Verdict, served: str) -> str:
    if served != verdict.winner:
        return f"the stored winner {verdict.winner} cannot do these lengths or strides"
    gain = verdict.speedup()
    if served == verdict.incumbent:
        failed = verdict.trial(served)
        if failed is not None and failed.reason:
            return f"nothing passed; the default itself: {failed.reason}"
        return _why_kept(verdict)
    best = min(
        (t for t in verdict.trials if t.time_us and t.tombstone is None), key=lambda t: t.time_us or 0.0, default=None
    )
    tie = (
        f"; {best.candidate} is within the margin, where the fixed order decides"
        if best and best.candidate != served
        else ""
    )
    return f"{gain:.2f}x the default's speed{tie}" if gain else "the default is out of the race"


def _why_kept(verdict: Verdict) -> str:
    """Why nothing replaced the default: what came nearest, and what that measurement was worth."""
    base = verdict.trial(verdict.incumbent)
    others = [t for t in verdict.trials if t.candidate != verdict.incumbent and t.time_us and t.tombstone is None]
    best = min(others, key=lambda t: t.time_us or 0.0, default=None)
    gain = base.time_us / best.time_us if base and best and base.time_us and best.time_us else 0.0
    if base is None or best is None or gain <= 1 + MARGIN:
        return f"nothing was faster by more than {MARGIN:.0%}"
    noise = 2 * max(base.noise or 0.0, best.noise or 0.0)
    worth = f"within the noise of {noise:.0%}" if gain <= 1 + noise else "in too few rounds to be sure"
    return f"{best.candidate} measured {gain:.2f}x, {worth}"


class Plan:
    """A bound Call for loops that want no dispatch at all: `plan(q, k, v, mask)`, with tensors like those it was made of.

    It checks nothing: dtypes, options and shapes must be those it was made of. Only kv_len may be another one, from the first
    of `kv_lens` to the second: for up to 16 queries (decoding) these are wide. `explanation` says why this kernel.
    """

    __slots__ = ("_call", "candidate", "explanation", "kv_lens")

    def __init__(self, call: binding.Call, candidate: str, kv_lens: tuple[int, int], explanation: Explanation) -> None:
        self._call, self.candidate, self.kv_lens, self.explanation = call, candidate, kv_lens, explanation

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Any = None) -> Tensor:
        return self._call(q, k, v, mask)

    def __repr__(self) -> str:
        return f"Plan({self.candidate})\n{self.explanation}"


def plan(q: Tensor, k: Tensor, v: Tensor, mask: Any = None, layout: str = "bhsd", **options: Any) -> Plan:
    """The Call that `attention` with these arguments would use (tuning now if it would), without the guard.

    Arguments and errors are those of `fastattn.attention`.
    """
    call_options.parse_options(options, "plan")
    served = resolve.attention(q, k, v, mask, layout, options)
    found = explain(q, k, v, mask, layout, **options)
    kv_lens = served.bucket[1:] if served.bucket else (found.problem.kv_len, found.problem.kv_len)
    return Plan(served.call, served.candidate, kv_lens, found)
