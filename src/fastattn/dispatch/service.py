"""What serves a call: one decision, which attention(), sdpa(), the traced twin, plan() and explain() all ask.

It runs nothing, and asks the store only.
"""

from enum import Enum
from typing import NamedTuple

from fastattn.dispatch import fallback
from fastattn.dispatch.circumstances import PASS, TUNE, Circumstances, what_is_allowed
from fastattn.dispatch.session import session
from fastattn.environment.device import Device
from fastattn.environment.settings import Settings
from fastattn.planning import default_choice
from fastattn.planning.decision import ON_COPIES, Accepted, but_for_copies
from fastattn.problems.call_facts import CallFacts
from fastattn.problems.problem import Problem
from fastattn.verdicts.verdict import Verdict


class Asked(NamedTuple):
    """One call, as decisions see it. kernel: the order `kernel=`; drops_all: dropout_p is 1."""

    problem: Problem
    facts: CallFacts
    device: Device
    settings: Settings
    circumstances: Circumstances
    kernel: str | None = None
    drops_all: bool = False


class Action(str, Enum):
    """What is done with a call."""

    PASS = "pass on"  # F.sdpa is called as it was, and nothing is learnt
    TUNE = "tune"  # a tuning comes first, then the decision is made again
    SERVE = "serve"  # the candidate


class Service(NamedTuple):
    """The decision. candidate: None where the call is passed on; it serves meanwhile where a tuning comes first."""

    action: Action
    candidate: Accepted | None
    why: str
    verdict: Verdict | None = None
    remember: bool = True
    is_untuned: bool = False  # nothing is stored, and nothing may be tuned now

    def name(self, problem: Problem) -> str:
        """Who answers."""
        if self.candidate is not None:
            return self.candidate.name
        return default_choice.untuned_name(problem.softcap > 0 or problem.lse, problem.is_custom)


def of_regime(asked: Asked) -> Asked:
    """A call of compiled code as it is decided: by the verdict of that regime where one is stored, else as eager code's."""
    own = asked.problem.replace(compiled=True)
    verdict = session.find(own, asked.device, asked.settings, asked.circumstances, count_lengths=False)
    return asked._replace(problem=asked.problem.replace(compiled=verdict is not None))


def is_passed_on(circumstances: Circumstances, kernel: str | None) -> bool:
    """Whether F.sdpa is called as it was. An order is carried out in every circumstance but mode "off"."""
    return what_is_allowed(circumstances)[0] == PASS and not (kernel and not circumstances.off)


def decide_service(
    asked: Asked, *, count_lengths: bool = True, certain: bool = True, in_graph: bool = False
) -> Service:
    """What serves this call.

    count_lengths: note its lengths as seen. certain: the library of what serves is imported to know that it can be; without it
    nothing is imported. in_graph: only what may stand in a graph of torch.compile.

    Raises NoKernelError where nothing can do it.
    """
    problem, circumstances = asked.problem, asked.circumstances
    action, why = what_is_allowed(circumstances)
    if is_passed_on(circumstances, asked.kernel):
        return Service(Action.PASS, None, why)
    if asked.kernel is not None:
        return Service(Action.SERVE, fallback.forced_kernel(asked, certain=certain), "ordered")
    if problem.is_custom:
        return Service(Action.SERVE, fallback.last_resorts(asked)[0], "nothing else can")
    if asked.drops_all:  # which some libraries refuse to do
        return Service(Action.SERVE, fallback.last_resorts(asked)[0], "dropout_p 1 leaves nothing", remember=False)
    verdict = session.find(problem, asked.device, asked.settings, circumstances, count_lengths=count_lengths)
    is_tuned_here = not problem.compiled  # what is for compiled code is tuned ahead alone
    if action == TUNE and is_tuned_here and not session.is_complete(verdict, asked.device, asked.settings):
        return _untuned(asked, verdict, count_lengths)
    candidate = next(fallback.in_order(asked, verdict, certain=certain, in_graph=in_graph))
    if verdict is not None:
        why = _why(verdict, candidate)
    return Service(Action.SERVE, candidate, why, verdict, is_untuned=verdict is None)


def _untuned(asked: Asked, verdict: Verdict | None, count_lengths: bool) -> Service:
    """A problem without a complete verdict: tune it, unless another thread does, or it cannot be tuned."""
    default = fallback.last_resorts(asked)[0]
    problem = session.lengths_to_tune(asked.problem, count_lengths=count_lengths)
    if problem in session.being_tuned:
        return Service(Action.SERVE, default, "another thread is tuning this problem", remember=False)
    if problem in session.not_tunable:
        return Service(Action.SERVE, default, session.not_tunable[problem], remember=False)
    return Service(Action.TUNE, default, "not tuned yet: the first call will", verdict)


def _why(verdict: Verdict, candidate: Accepted) -> str:
    """Why this candidate of a verdict serves."""
    if verdict.is_provisional and candidate.name == verdict.incumbent:
        return f"for this process only: {verdict.why_not_lasting}"
    if candidate.name == verdict.winner:
        return "the stored winner" if verdict.winner != verdict.incumbent else "nothing was faster than the default"
    if but_for_copies(candidate.name) == but_for_copies(verdict.winner):
        return ON_COPIES
    return f"the stored winner {verdict.winner} is not served: it cannot do this call"
