"""What F.sdpa would run for a problem, when that must not be served untested, and what may always run in its place."""

from __future__ import annotations

from collections.abc import Sequence

from fastattn.environment.device import Device
from fastattn.environment.settings import Settings
from fastattn.kernels import known_faults
from fastattn.planning import candidates
from fastattn.planning.decision import Accepted, Decision, Rejected
from fastattn.problems.call_facts import INT32, CallFacts, ordinary_facts
from fastattn.problems.problem import Problem


def untuned_name(is_math: bool, is_custom: bool) -> str:
    """What serves where nothing may be learnt: F.sdpa, or what takes a softcap, or the caller's own function."""
    return "flex" if is_custom else "sdpa_math" if is_math else "default"


DISPATCHED = ("torch_cudnn", "torch_flash", "torch_efficient", "torch_math")  # what F.sdpa's dispatcher chooses from


def default_runs(p: Problem, device: Device, found: Sequence[Decision]) -> str:
    """Name of the kernel that F.sdpa's own dispatcher takes for this problem (measured on the CPU, read for CUDA)."""
    could = [
        d if isinstance(d, Accepted) else d.if_not_faulty for d in found
    ]  # torch knows nothing of our known faults
    plain = {d.kernel.name for d in could if d is not None and runs_natively(d, d.kernel.name, in_tiles=d.is_in_tiles)}
    return next((name for name in dispatch_order(device) if name in plain), "torch_math")


def dispatch_order(device: Device) -> tuple[str, ...]:
    """DISPATCHED as F.sdpa asks them on this device."""
    return DISPATCHED if device.type == "cuda" and device.prefers_cudnn else DISPATCHED[1:]


def runs_natively(candidate: Accepted, kernel: str, *, in_tiles: bool = False) -> bool:
    """Whether this is the kernel as the dispatcher would take it: it converts mask forms itself, and pads nothing.

    in_tiles: whether the default is called for each tile.
    """
    own = {"mask_additive", "mask_dense"} | ({"tiles"} if in_tiles else set())
    return candidate.kernel.name == kernel and candidate.is_in_tiles == in_tiles and set(candidate.conversions) <= own


def fallbacks(
    p: Problem, device: Device, settings: Settings, found: Sequence[Decision], facts: CallFacts | None = None
) -> list[Accepted]:
    """What may always be run, in order: the default unless something names what it would run, then sdpa_math.

    Where the caller's own function is part of the problem neither can, and whatever can do it serves.
    """
    default = candidates.by_name("default", found)
    math = candidates.by_name("sdpa_math", found)
    if why_not_default(p, device, settings, found, facts) is not None:
        default = []
    return [*default[:1], *math[-1:]] or [d for d in found if isinstance(d, Accepted)][:1]


def why_not_default(
    p: Problem, device: Device, settings: Settings, found: Sequence[Decision], facts: CallFacts | None = None
) -> str | None:
    """Why the default must not be served untested: a known fault, int32 extents on CUDA, or too much memory.

    found: the decisions of those it chooses from; others may stand there as well.
    """
    facts = ordinary_facts(p) if facts is None else facts
    runs = default_runs(p, device, found)
    faults = [
        d.reasons for d in found if isinstance(d, Rejected) and d.kernel.name == runs and d.if_not_faulty is not None
    ]
    faults += [known_faults.faults_that_hold("default", p, device, device.torch, settings.known_faults, facts, runs)]
    if any(faults):
        return f"the default would run {runs}: {'; '.join(reason for some in faults for reason in some)}"
    if device.type == "cuda" and facts.extent > INT32:
        return f"the default would run {runs}, whose offsets are 32-bit, on an extent of {facts.extent} > {INT32}"
    are_whole = not any(d.is_in_tiles for d in found if isinstance(d, Accepted) and d.kernel.name == runs)
    if runs == "torch_math" and are_whole and p.unfused_bytes > p.memory_limit:
        return f"the default would run torch_math with {p.unfused_bytes} temporary bytes > {p.memory_limit}"
    return None
