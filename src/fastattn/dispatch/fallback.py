"""What may run for a problem, in order: an order by name, the verdict's candidates, the fallback chain; and the rescue of a
call whose winner raised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.dispatch import session
from fastattn.environment.device import Device
from fastattn.environment.errors import NoKernelError, is_sticky
from fastattn.environment.log import log
from fastattn.environment.settings import Settings
from fastattn.environment.text import unknown_kernel
from fastattn.kernels import registry
from fastattn.kernels.kernel import Kernel
from fastattn.kernels.libraries import availability
from fastattn.planning import binding, candidates, default_choice
from fastattn.planning.conversions import blocks
from fastattn.planning.decision import Accepted, Rejected
from fastattn.problems.call_key import CallKey
from fastattn.problems.problem import Problem
from fastattn.tuning import memory_use
from fastattn.verdicts.verdict import Verdict


def ordered(name: str, problem: Problem, silicon: Device, settings: Settings) -> Accepted:
    """The candidate that `kernel=name` means. Raises NoKernelError with the reasons, ValueError for an unknown name."""
    base = name.split("+", maxsplit=1)[0]
    if base not in registry.names():
        raise unknown_kernel(name, registry.names())
    settings = settings.naming(base)
    own = [kernel for kernel in registry.rows_for(silicon.type, settings.named) if kernel.name == base]
    found = candidates.decisions(problem, silicon, settings, own, certain=True)
    named = candidates.by_name(name, found)
    if named:
        return named[0]
    mine = [d for d in found if d.kernel.name == base]
    reasons = [r for d in mine if isinstance(d, Rejected) for r in d.reasons]
    reasons = reasons or [f"its candidates here are {', '.join(d.name for d in mine)}"]
    others = [d for d in candidates.decisions(problem, silicon, settings) if d.kernel.name != base]
    raise NoKernelError(f"kernel {name!r} cannot run {problem}: {'; '.join(reasons)}", [*found, *others])


def chain(
    verdict: Verdict | None,
    problem: Problem,
    silicon: Device,
    settings: Settings,
    *,
    tracing: bool = False,
    capturing: bool = False,
) -> Sequence[Accepted]:
    """What may run, in order: the verdict's candidates that can do this very problem, else the fallback chain.

    tracing: only what stands in a graph of torch.compile: no loops, which would be unrolled, and no library's own Python.
    capturing: only what was imported before, and compiles nothing in its first run: a CUDA graph would hold neither.
    """
    served: list[Accepted] = []
    rows = {kernel.name: kernel for kernel in registry.rows_for(silicon.type, settings.named)}
    for name in verdict.ranked() if verdict is not None else ():
        kernel = rows.get(name.split("+")[0])
        is_out = verdict is not None and (verdict.problem, name) in session.state.buried
        if kernel is None or is_out or (tracing and not _is_traceable(kernel, name)):
            continue
        if capturing and not _is_ready(kernel):
            continue
        found = candidates.decide(kernel, problem, silicon, settings, certain=True)
        served += [d for d in found if isinstance(d, Accepted) and d.name == name]
        if served and served[0].kernel.name == "default":
            return served
        if served:
            break
    return served or last_resorts(verdict, problem, silicon, settings)


def _is_traceable(kernel: Kernel, name: str) -> bool:
    return kernel.library == "torch" and not blocks.IN_BLOCKS & set(name.split("+")[1:])


def _is_ready(kernel: Kernel) -> bool:
    return kernel.compiles is None and availability.is_loaded(kernel)


def last_resorts(verdict: Verdict | None, problem: Problem, silicon: Device, settings: Settings) -> list[Accepted]:
    """planning.fallbacks, without a default that this problem's own tuning found wrong while others were right.

    Raises NoKernelError, with every kernel's reasons, where none can do the problem.
    """
    decisions = candidates.decisions(problem, silicon, settings)
    found = default_choice.fallbacks(problem, silicon, settings, decisions)
    if not found:
        why = "; ".join(f"{d.name}: {', '.join(d.reasons)}" for d in decisions if isinstance(d, Rejected))
        raise NoKernelError(f"no kernel can run {problem}: {why}", decisions)
    incumbent = verdict.trial(verdict.incumbent) if verdict is not None else None
    is_wrong = incumbent is not None and incumbent.reason is not None and verdict and verdict.ranked()
    return [c for c in found if c.kernel.name != "default"] if is_wrong else found


def bind(candidate: Accepted, problem: Problem, key: CallKey, structured: bool) -> binding.Call:
    return binding.bind(
        candidate,
        problem,
        key.options.scale,
        structured=structured,
        dropout_p=key.options.dropout_p,
        score_mod=key.options.score_mod,
    )


def rescued(
    call: binding.Call,
    chosen: Accepted,
    verdict: Verdict | None,
    problem: Problem,
    settings: Settings,
    key: CallKey,
    structured: bool,
) -> binding.Call:
    """The Call, with the fallback chain behind it: a winner that raises is answered in the same call and demoted.

    What answered serves this Call from then on, should somebody hold it (a plan): nothing that raised is asked again.
    """
    serving = (call, chosen)

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        nonlocal serving
        call, chosen = serving
        try:
            return call(q, k, v, mask)
        except Exception as error:
            if _is_not_its_own(error):
                raise
            out, *now = _rescue(error, chosen, verdict, problem, settings, key, structured, (q, k, v, mask))
            serving = (now[0], now[1])
            return out

    return run


def is_capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _is_not_its_own(error: Exception) -> bool:
    """Out of memory, a sticky CUDA error, or what a caller's hook raises through the kernel (checkpoint, to stop early)."""
    is_hook = type(error).__module__.startswith("torch.utils.checkpoint")
    return is_hook or memory_use.is_out_of_memory(error) or is_sticky(error)


def _rescue(
    error: Exception,
    failed: Accepted,
    verdict: Verdict | None,
    problem: Problem,
    settings: Settings,
    key: CallKey,
    structured: bool,
    given: tuple[Any, ...],
) -> tuple[Tensor, binding.Call, Accepted]:
    """What answers in place of a candidate that raised: (the answer, the Call it came from, its candidate)."""
    silicon = Device.of(given[0].device)
    cause = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    left = session.latest(verdict, settings, silicon).ranked() if verdict is not None else []
    found = candidates.decisions(problem, silicon, settings)
    last = last_resorts(verdict, problem, silicon, settings)
    answers: dict[str, Tensor] = {}
    for candidate in last[:1]:
        if candidate.kernel.name == "default":
            try:
                answers[candidate.name] = bind(candidate, problem, key, structured)(*given)
            except Exception:
                raise error from None  # F.sdpa raises too: it is the caller's own error
    order = [d for name in left for d in found if isinstance(d, Accepted) and d.name == name]
    for candidate in (*order, *last):
        if candidate == failed or (is_capturing(given[0]) and not _is_ready(candidate.kernel)):
            continue
        try:
            call = bind(candidate, problem, key, structured)
            out = answers.get(candidate.name)
            out = call(*given) if out is None else out
        except Exception:
            continue
        if is_capturing(given[0]):
            return out, call, candidate  # not every kernel can be captured; outside it may be as good as ever
        if verdict is None or session.bury(verdict, failed.name, cause, settings, silicon):
            log.warning(
                "kernel %s raised (%s) on %s; %s serves from now on", failed.name, cause, problem, candidate.name
            )
        return out, call, candidate
    raise error
