"""Why a problem is served as it is: every candidate with its reason, or its time, error and memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn import candidates, chain, config, guards, inputs, learnt, planning, resolve, tuning, units
from fastattn.device import Device
from fastattn.kernel import Accepted, Rejected
from fastattn.problem import Problem
from fastattn.verdict import Trial, Verdict


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
            "candidates": rows,
        }

    def __str__(self) -> str:
        lines = [f"problem  {self.problem}", f"device   {self.device}", f"served by {self.served_by}: {self.why}", ""]
        width = max(len(t.candidate) for t in self.rows)
        base = self.verdict.trial(self.verdict.incumbent) if self.verdict else None
        for t in self.rows:
            mark = "*" if t.candidate == self.served_by else " "
            lines.append(f"{mark} {t.candidate:<{width}}  {describe(t, base)}")
        return "\n".join(lines)

    __repr__ = __str__


def describe(trial: Trial, incumbent: Trial | None = None) -> str:
    """One candidate's line: its time against the default's, error in budgets and memory, or its reason."""
    if trial.tombstone is not None:
        return f"demoted: it raised {trial.tombstone}"
    if trial.time_us is None:
        error = f" (forward {trial.forward:.2f} budgets)" if trial.forward is not None and not trial.reason else ""
        return (trial.reason or "can do it; not measured") + error
    gain = f" {incumbent.time_us / trial.time_us:5.2f}x" if incumbent and incumbent.time_us else ""
    back = f", backward {trial.backward:.2f}" if trial.backward is not None else ""
    kept = f", keeps {units.size(trial.saved_bytes)}" if trial.saved_bytes else ""
    return (
        f"{trial.time_us:10.1f} us{gain}  error {trial.forward:.2f}{back} of budget,"
        f" {units.size(trial.temporary_bytes or 0)} temporary{kept}"
    )


def explain(
    q: Tensor, k: Tensor, v: Tensor, mask: Any = None, layout: str = "bhsd", *, tune: bool = False, **options: Any
) -> Explanation:
    """Why `attention` with these arguments is served as it is. Runs nothing unless `tune=True`, which measures now.

    Arguments and errors are those of `fastattn.attention`. Every known kernel appears: with a time, or with its reasons.
    """
    settings = config.current()
    parsed = inputs.parse(options)
    key = inputs.call_key(q, k, v, mask, layout, parsed)
    problem = Problem.from_key(key, settings.accuracy)
    if tune and not problem.is_custom:  # with the caller's own function there is nothing to choose
        resolve.tune(learnt.lengths(problem), settings, key.q.device, thorough=True)
        learnt.forget_calls()
    circumstances = guards.context(inputs.tensors_of(q, k, v, mask), settings, learnt.is_spent(settings))
    return of_problem(problem, parsed.kernel, circumstances)


def of_problem(
    problem: Problem, kernel: str | None = None, circumstances: guards.Context | None = None
) -> Explanation:
    """The explanation of a problem, from what is stored and what can be decided without running anything."""
    settings = config.current()
    silicon = Device.of(torch.device(problem.device))
    circumstances = circumstances or guards.Context()
    found = candidates.decisions(problem, silicon, settings)
    verdict = learnt.find(problem, silicon, settings, circumstances, register=False)
    action, why = guards.decide(circumstances)
    if kernel is not None:
        served, why = chain.ordered(kernel, problem, silicon, settings).name, "ordered"
    elif action == guards.PASS or verdict is None:
        served = "default" if action == guards.PASS else planning.fallbacks(problem, silicon, settings, found)[0].name
        untuned = "nothing else can" if problem.is_custom else "not tuned yet: the first call will"
        why = why if action != guards.TUNE else untuned
        not_default = planning.why_not_default(problem, silicon, found)
        why = not_default if not_default and served != "default" else why
    else:
        served = chain.chain(verdict, problem, silicon, settings)[0].name
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
        return f"nothing was faster by more than {tuning.MARGIN:.0%} and twice the noise"
    return f"{gain:.2f}x the default's speed" if gain else "the default is out of the race"


class Plan:
    """A bound Call for loops that want no dispatch at all: `plan(q, k, v, mask)`, with tensors like those it was made of.

    It checks nothing: other shapes of the same heads and head dims work, other dtypes or options do not. `explanation` says
    why this kernel.
    """

    __slots__ = ("_call", "candidate", "explanation")

    def __init__(self, call: planning.Call, candidate: str, explanation: Explanation) -> None:
        self._call, self.candidate, self.explanation = call, candidate, explanation

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Any = None) -> Tensor:
        return self._call(q, k, v, mask)

    def __repr__(self) -> str:
        return f"Plan({self.candidate})\n{self.explanation}"


def plan(q: Tensor, k: Tensor, v: Tensor, mask: Any = None, layout: str = "bhsd", **options: Any) -> Plan:
    """The Call that `attention` with these arguments would use (tuning now if it would), without the guard.

    Arguments and errors are those of `fastattn.attention`.
    """
    served = resolve.attention(q, k, v, mask, layout, options)
    return Plan(served.call, served.candidate, explain(q, k, v, mask, layout, **options))

