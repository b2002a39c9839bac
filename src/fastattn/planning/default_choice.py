"""What F.sdpa would run for a problem, when that must not be served untested, and what may always run in its place."""

from __future__ import annotations

from collections.abc import Sequence

from fastattn.environment.device import Device
from fastattn.environment.settings import Settings
from fastattn.kernels import known_faults
from fastattn.planning import candidates
from fastattn.planning.decision import Accepted, Decision
from fastattn.planning.sdpa_dispatcher import kernel_taken
from fastattn.problems.call_facts import INT32, CallFacts, ordinary_facts
from fastattn.problems.problem import Problem

BY_INT32 = ("torch_efficient", "torch_cudnn")  # whose offsets may be 32-bit; FlashAttention 2's are not


def untuned_name(is_math: bool, is_custom: bool) -> str:
    """What serves where nothing may be learnt: F.sdpa, or what takes a softcap, or the caller's own function."""
    return "flex" if is_custom else "sdpa_math" if is_math else "default"


def default_runs(p: Problem, device: Device, facts: CallFacts | None = None) -> str:
    """Name of the kernel that F.sdpa's own dispatcher takes for this problem (tested on the CPU, read for CUDA)."""
    return kernel_taken(p, device, ordinary_facts(p) if facts is None else facts)


def runs_natively(candidate: Accepted, kernel: str, *, in_tiles: bool = False) -> bool:
    """Whether this is the kernel as F.sdpa runs it: it converts mask forms itself, and pads for its flash kernel alone.

    in_tiles: whether the default is called for each tile.
    """
    own = {"mask_additive", "mask_dense"} | ({"tiles"} if in_tiles else set())
    own |= {"head_dim_pad"} if kernel == "torch_flash" else set()
    return candidate.kernel.name == kernel and candidate.is_in_tiles == in_tiles and set(candidate.conversions) <= own


def fallbacks(
    p: Problem, device: Device, settings: Settings, found: Sequence[Decision], facts: CallFacts | None = None
) -> list[Accepted]:
    """What may always be run, in order: the default unless something names what it would run, then sdpa_math.

    Torch's flash kernel comes between them where the default is not served, as for a log-sum-exp, which that one does not say:
    math would write all scores down. Where the caller's own function is part of the problem none of these can, and
    whatever can do it serves.
    """
    first = candidates.by_name("default", found)
    if why_not_default(p, device, settings, found, facts) is not None:
        first = []
    flash = [d for d in found if isinstance(d, Accepted) and d.kernel.name == "torch_flash"]
    if (
        device.type == "cpu" and p.torch_dtype.itemsize == 2
    ):  # its log-sum-exp of half inputs is off by 2e-5 (torch 2.13)
        flash = [d for d in flash if "fp32" in d.conversions]
    first = first or flash
    math = candidates.by_name("sdpa_math", found)
    return [*first[:1], *math[-1:]] or [d for d in found if isinstance(d, Accepted)][:1]


def why_not_default(
    p: Problem, device: Device, settings: Settings, found: Sequence[Decision], facts: CallFacts | None = None
) -> str | None:
    """Why the default must not be served untested: a known fault, what CUDA's kernels cannot address, or too much memory.

    found: the default's own decision, where it is known; others may stand there as well.
    """
    facts = ordinary_facts(p) if facts is None else facts
    runs = default_runs(p, device, facts)
    faults = [
        *known_faults.faults_that_hold(runs, p, device, device.torch, settings.known_faults, facts),
        *known_faults.faults_that_hold("default", p, device, device.torch, settings.known_faults, facts, runs),
    ]
    if faults:
        return f"the default would run {runs}: {'; '.join(faults)}"
    if device.type == "cuda" and (why := _why_unreadable(runs, p, facts)) is not None:
        return f"the default would run {runs}, {why}"
    are_whole = not any(d.is_in_tiles for d in candidates.by_name("default", found))
    if runs == "torch_math" and are_whole and p.unfused_bytes > p.memory_limit:
        return f"the default would run torch_math with {p.unfused_bytes} temporary bytes > {p.memory_limit}"
    return None


def _why_unreadable(runs: str, p: Problem, facts: CallFacts) -> str | None:
    """Why torch's CUDA kernel cannot read q, k and v as they lie, where its dispatcher does not see it."""
    if runs in BY_INT32 and facts.extent > INT32:
        return f"whose offsets are 32-bit, on an extent of {facts.extent} > {INT32}"
    is_copied = runs == "torch_flash" and p.head_dim % 8 != 0  # F.sdpa pads it
    if runs == "torch_math" or is_copied:
        return None
    if not all(facts.aligned):
        return "which reads 16 bytes at once, on tensors that start elsewhere"
    if runs != "torch_efficient" and not all(facts.aligned_rows):
        return "which reads 16 bytes at once, on rows that start elsewhere"
    return None
