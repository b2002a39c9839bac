"""What may run for a call, in order: a kernel ordered by name, the verdict's candidates, and what always can."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fastattn.dispatch.session import session
from fastattn.environment.errors import NoKernelError
from fastattn.environment.text import unknown_kernel
from fastattn.kernels import registry
from fastattn.kernels.kernel import Kernel
from fastattn.kernels.libraries import availability
from fastattn.planning import candidates, default_choice
from fastattn.planning.conversions import IN_BLOCKS
from fastattn.planning.decision import Accepted, Decision, Rejected, but_for_copies
from fastattn.problems.problem import Problem
from fastattn.verdicts.verdict import Verdict

if TYPE_CHECKING:
    from fastattn.dispatch.service import Asked


def all_decisions(asked: Asked) -> list[Decision]:
    """Every kernel's answer to this call."""
    return candidates.decisions(asked.problem, asked.device, asked.settings, facts=asked.facts)


def forced_kernel(asked: Asked, *, certain: bool = True) -> Accepted:
    """The candidate that `kernel=name` means. Raises NoKernelError with the reasons, ValueError for an unknown name."""
    name = asked.kernel or ""
    base = name.split("+", maxsplit=1)[0]
    if not registry.is_known(base):
        raise unknown_kernel(name, registry.names())
    settings = asked.settings.naming(base)
    row = registry.row_for(base, asked.device.type, settings.named)
    rows = [row] if row is not None else []
    found = candidates.decisions(asked.problem, asked.device, settings, rows, facts=asked.facts, certain=certain)
    named = candidates.by_name(name, found)
    if named:
        return named[0]
    reasons = [reason for d in found if isinstance(d, Rejected) for reason in d.reasons]
    reasons = reasons or [f"its candidates here are {', '.join(d.name for d in found)}"]
    others = [d for d in all_decisions(asked) if d.kernel.name != base]
    raise NoKernelError(f"kernel {name!r} cannot run {asked.problem}: {'; '.join(reasons)}", [*found, *others])


def can_be_ordered(asked: Asked) -> bool:
    """Whether the kernel that is ordered by name can do this."""
    try:
        forced_kernel(asked, certain=False)
    except NoKernelError:
        return False
    return True


def in_order(
    asked: Asked, verdict: Verdict | None, *, certain: bool = True, in_graph: bool = False
) -> Iterator[Accepted]:
    """What may run, best first: the verdict's candidates that can do this very call, then what always can.

    in_graph: only what stands in a graph of torch.compile: no loops, which would be unrolled, and no library's own Python.
    While a CUDA graph is captured: only what is imported already, and compiles nothing in its first run.
    """
    done: set[str] = set()
    for name in verdict.ranked() if verdict is not None else ():
        for candidate in ranked(name, asked, verdict, certain=certain, in_graph=in_graph):
            done.add(candidate.name)
            yield candidate
    yield from (candidate for candidate in last_resorts(asked, verdict) if candidate.name not in done)


def ranked(
    name: str, asked: Asked, verdict: Verdict | None, *, certain: bool = True, in_graph: bool = False
) -> Iterator[Accepted]:
    """The candidate of a name in the verdict, if it may run."""

    def is_out(name: str) -> bool:
        return verdict is not None and (verdict.problem, name) in session.demotions

    kernel = registry.row_for(name.split("+", maxsplit=1)[0], asked.device.type, asked.settings.named)
    if kernel is None or is_out(name) or (in_graph and not stands_in_graph(kernel, name, asked.problem)):
        return
    if asked.circumstances.capturing and not is_ready(kernel):
        return
    if name == "default" and why_not_default(asked) is not None:
        return
    found = candidates.decide(kernel, asked.problem, asked.device, asked.settings, facts=asked.facts, certain=certain)
    yield from (candidate for candidate in _as_in_verdict(name, found) if not is_out(candidate.name))


def _as_in_verdict(name: str, found: list[Decision]) -> list[Accepted]:
    """The candidate of that name; where this call's tensors start or step so that it must copy them, the same with copies."""
    accepted = [d for d in found if isinstance(d, Accepted)]
    return [d for d in accepted if d.name == name] or [
        d for d in accepted if but_for_copies(d.name) == but_for_copies(name)
    ]


def last_resorts(asked: Asked, verdict: Verdict | None = None) -> list[Accepted]:
    """The default, or torch_flash, and sdpa_math; not the first where this problem's tuning found it wrong, and others right.

    Raises NoKernelError, with every kernel's reasons, where none can do the problem.
    """
    decisions: list[Decision] = []
    if not asked.problem.is_custom:  # mostly these few have the answer: to ask every kernel takes a millisecond
        default = _decide(asked, "default")
        is_enough = asked.device.type == "cpu" and any(isinstance(d, Accepted) for d in default)
        flash = [] if is_enough else _decide(asked, "torch_flash")
        decisions = [*default, *flash, *_decide(asked, "sdpa_math")]
    found = default_choice.fallbacks(asked.problem, asked.device, asked.settings, decisions, asked.facts)
    if not any(candidate.kernel.name in registry.FALLBACKS for candidate in found):
        decisions = all_decisions(asked)
        found = default_choice.fallbacks(asked.problem, asked.device, asked.settings, decisions, asked.facts)
    if not found:
        why = "; ".join(f"{d.name}: {', '.join(d.reasons)}" for d in decisions if isinstance(d, Rejected))
        raise NoKernelError(f"no kernel can run {asked.problem}: {why}", decisions)
    wrong = ""
    if verdict is not None and verdict.ranked():
        incumbent = verdict.trial(verdict.incumbent)
        wrong = but_for_copies(verdict.incumbent) if incumbent is not None and not incumbent.is_timed else ""
    is_tied = _why_not_tied(asked) is not None
    left = [c for c in found if but_for_copies(c.name) != wrong and not (is_tied and c.kernel.name == "default")]
    return left or found[-1:]


def why_not_default(asked: Asked) -> str | None:
    """Why the default must not serve this call, None where it may."""
    is_large = asked.problem.unfused_bytes > asked.problem.memory_limit  # else its own decision has no say
    found = _decide(asked, "default") if is_large else []
    why = default_choice.why_not_default(asked.problem, asked.device, asked.settings, found, asked.facts)
    return why or _why_not_tied(asked)


def _why_not_tied(asked: Asked) -> str | None:
    """Why the default cannot be the same kernel with gradients and without, where that is asked for."""
    if not asked.settings.same_kernel_in_training or asked.problem.is_custom:
        return None
    ways = (asked.problem.as_in_training(), asked.problem.replace(needs_grad=False, mask_grad=False))
    runs = [default_choice.default_runs(p, asked.device, asked.facts) for p in ways]
    if runs[0] == runs[1]:
        return None
    return f"same_kernel_in_training: the default may run {runs[0]} in training, else {runs[1]}"


def _decide(asked: Asked, name: str) -> list[Decision]:
    kernel = registry.row_for(name, asked.device.type)
    if kernel is None or asked.device.type not in kernel.devices:
        return []
    return candidates.decide(kernel, asked.problem, asked.device, asked.settings, facts=asked.facts)


def is_ready(kernel: Kernel) -> bool:
    """Whether it runs at once: its library is imported, and it compiles nothing."""
    return kernel.compiles is None and availability.is_loaded(kernel)


def stands_in_graph(kernel: Kernel, name: str, p: Problem) -> bool:
    """Whether a candidate's own operators can stand in a graph of torch.compile.

    A loop over blocks would be unrolled; other libraries' Python breaks the graph, and so does the gradient of a log-sum-exp,
    which is made in the backward. Parts and padding ask for the length, which may be a symbol.
    """
    conversions = set(name.split("+")[1:])
    is_in_loop = IN_BLOCKS & conversions or ({"split_kv", "pad_lengths"} & conversions and p.lengths != "exact")
    return kernel.library == "torch" and not is_in_loop and not (p.lse and p.needs_grad)
