"""explain(): why a problem is served as it is, every candidate with its reason, or its time, error and memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastattn.dispatch import entries, fallback, render, resolve, tune_now
from fastattn.dispatch.circumstances import Circumstances, read_circumstances
from fastattn.dispatch.fallback import why_not_default
from fastattn.dispatch.mask_in_words import mask_in_words
from fastattn.dispatch.service import Action, Asked, Service, decide_service, of_regime
from fastattn.dispatch.session import session
from fastattn.environment.device import Device
from fastattn.environment.settings import current_settings
from fastattn.kernels import registry
from fastattn.planning import candidates
from fastattn.planning.decision import Rejected
from fastattn.problems.call_facts import ordinary_facts
from fastattn.problems.call_key import call_key, tensors_of
from fastattn.problems.call_options import is_ordinary, parse_options
from fastattn.problems.problem import Problem
from fastattn.problems.rewriting import rewrite
from fastattn.verdicts.verdict import Outcome, Trial, Verdict

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastattn.problems.given_options import OptionsWithLse


@dataclass(frozen=True, slots=True)
class Explanation:
    """A problem, what serves it, and why; `print` it, or take `to_json()`. `rows` has every known kernel.

    action: "serve", "tune" (the first call tunes; served_by serves meanwhile), "pass on" (F.sdpa is called as it was), or
    "raise" (nothing can do the call).
    """

    problem: Problem
    device: str
    action: str
    served_by: str
    why: str
    rows: tuple[Trial, ...]
    verdict: Verdict | None = None
    mask: str = ""  # what the mask of the call leaves

    def to_json(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {
            "problem": self.problem.to_json(),
            "device": self.device,
            "action": self.action,
            "served_by": self.served_by,
            "why": self.why,
            "mask": self.mask,
            "speedup": self.verdict.speedup() if self.verdict else None,
            "cores_missing": self.verdict.cores_missing if self.verdict else None,
            "candidates": [row._asdict() for row in self.rows],
        }

    def lines(self, width: int | None = None) -> Iterator[tuple[str, str]]:
        """(kind, text) of every line that is printed; see render.lines."""
        return render.lines(self, width)

    def __str__(self) -> str:
        return "\n".join(text for _, text in self.lines())

    __repr__ = __str__


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any = None,
    layout: str = "bhsd",
    *,
    tune: bool = False,
    compile_kernels: bool = False,
    compiled: bool = False,
    **options: Unpack[OptionsWithLse],
) -> Explanation:
    """Why `attention` with these arguments is served as it is. Runs and imports nothing unless `tune=True`, which measures now.

    compile_kernels: also the kernels that take seconds to compile first, as `fastattn tune --compile` does.
    compiled: what serves such a call in a graph of torch.compile.

    Arguments and errors are those of `fastattn.attention`. Every known kernel appears: with a time, or with its reasons.
    """
    settings, given = current_settings(), dict[str, Any](options)
    while not is_ordinary(q, mask, layout, given) and (ordinary := rewrite(q, k, v, mask, layout, given)) is not None:
        q, k, v, mask, layout, given = ordinary[:6]
    key = call_key(q, k, v, mask, layout, parse_options(given, "explain", ("tune", "compile_kernels", "compiled")))
    circumstances = read_circumstances(tensors_of(q, k, v, mask), settings, session.is_spent(settings))
    asked = resolve.asked_of(key, settings, circumstances)
    if tune and not asked.problem.is_custom:  # with the caller's own function there is nothing to choose
        problem = session.lengths_to_tune(asked.problem.replace(compiled=compiled))
        tune_now.tune_and_keep(problem, settings, key.q.device, thorough=True, compile_kernels=compile_kernels)
        entries.drop_all()
    return _explain_compiled(asked, mask) if compiled else explain_asked(asked, mask)


def explain_problem(problem: Problem, circumstances: Circumstances | None = None) -> Explanation:
    """The explanation of a problem without tensors."""
    device = Device.of(torch.device(problem.device))
    facts = ordinary_facts(problem)
    asked = Asked(problem, facts, device, current_settings(), circumstances or Circumstances())
    return _explain_compiled(asked) if problem.compiled else explain_asked(asked)


def _explain_compiled(asked: Asked, mask: Any = None) -> Explanation:
    """What serves the call in a graph of torch.compile."""
    asked = of_regime(asked._replace(circumstances=asked.circumstances._replace(in_graph=True)))
    found = explain_asked(asked, mask)
    if asked.problem.compiled or asked.kernel is not None:
        return found
    if found.verdict is None:
        return replace(found, why="nothing is tuned for such a call")
    return replace(found, why=f"{found.why} in eager code; nothing is tuned for compiled code")


def explain_asked(asked: Asked, mask: Any = None) -> Explanation:
    """The explanation of a call, by the decision that the call itself asks for. mask: what is to be said of this very one."""
    rows = registry.rows_for(asked.device.type, asked.settings.named, with_plugins=True)
    found = candidates.decisions(asked.problem, asked.device, asked.settings, rows, facts=asked.facts)
    try:
        decision = decide_service(asked, count_lengths=False, certain=False)
    except fallback.NoKernelError:
        if asked.kernel is not None:
            raise
        decision = None
    verdict = session.find(asked.problem, asked.device, asked.settings, asked.circumstances, count_lengths=False)
    trials = [_row(d.name, d.reasons if isinstance(d, Rejected) else None, verdict) for d in found]
    trials.sort(key=lambda t: (t.time_us is None, t.time_us or 0.0))
    served, why = _answer(asked, decision)
    action = decision.action.value if decision is not None else "raise"
    words = mask_in_words(asked, mask, served, verdict)
    return Explanation(asked.problem, asked.device.name, action, served, why, tuple(trials), verdict, words)


def _row(name: str, reasons: tuple[str, ...] | None, verdict: Verdict | None) -> Trial:
    """What is known of a candidate: why it cannot do this call, else its trial."""
    if reasons is not None:
        return Trial(name, Outcome.REFUSED, "; ".join(reasons))
    return (verdict.trial(name) if verdict is not None else None) or Trial(name)


def _answer(asked: Asked, decision: Service | None) -> tuple[str, str]:
    """(who serves, why)."""
    if decision is None:
        return "nothing", "no kernel can do this call: it raises NoKernelError"
    served = decision.name(asked.problem)
    if decision.verdict is not None and decision.action is Action.SERVE:
        return served, render.why_served(decision.verdict, served, why_not_default(asked))
    if (
        served.split("+")[0] in ("sdpa_math", "torch_flash")
        and decision.action is not Action.PASS
        and asked.kernel is None
    ):
        return served, why_not_default(asked) or decision.why
    return served, decision.why
