"""Which candidates can do a problem on a device, and why the others cannot. No kernel is run here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

from fastattn.environment.device import Device
from fastattn.environment.settings import Settings
from fastattn.kernels import known_faults, registry
from fastattn.kernels.kernel import Kernel
from fastattn.kernels.libraries import availability
from fastattn.kernels.limits import OF_LENGTH, Need, Range, RefuseWhen
from fastattn.planning.conversions import BY_NAME, CONVERSIONS, as_applied
from fastattn.planning.conversions.conversion import NO, OPTIONAL, REQUIRED
from fastattn.planning.decision import Accepted, Decision, Rejected
from fastattn.problems.call_facts import CallFacts, ordinary_facts
from fastattn.problems.problem import Problem


def decisions(
    problem: Problem,
    device: Device,
    settings: Settings,
    rows: Sequence[Kernel] | None = None,
    *,
    facts: CallFacts | None = None,
    certain: bool = False,
) -> list[Decision]:
    """Every kernel known: its candidates in the fixed order of preference, or one Rejected with all reasons.

    facts: of the one call that is asked about; None is an ordinary one. certain: libraries are imported to know that they can
    be; else what their metadata tells is enough.
    """
    facts = ordinary_facts(problem) if facts is None else facts
    found: list[Decision] = []
    for kernel in registry.rows_for(device.type, settings.named) if rows is None else rows:
        found += decide(kernel, problem, device, settings, facts=facts, certain=certain)
    return found


def decide(
    kernel: Kernel,
    problem: Problem,
    device: Device,
    settings: Settings,
    *,
    facts: CallFacts | None = None,
    certain: bool = False,
) -> list[Decision]:
    """One kernel: its candidates, plainest first, or one Rejected with all reasons. facts, certain: as for decisions()."""
    facts = ordinary_facts(problem) if facts is None else facts
    answers = {c.name: c.when(kernel, problem, facts) for c in CONVERSIONS}
    reasons = list(_reasons(kernel, problem, facts, device, settings))
    reasons += [answer for answer in answers.values() if answer not in (NO, OPTIONAL, REQUIRED)]
    if certain and not reasons:
        reasons += [why] if (why := availability.why_unavailable(kernel)) else []
    if reasons:
        return [Rejected(kernel, tuple(reasons))]
    choices = [_choices(name, answer) for name, answer in answers.items() if answer != NO]
    chosen = (_needed(names) for names in product(*choices))
    chosen = (names for names in chosen if all(BY_NAME[name].requires in ("", *names) for name in names))
    chosen = (names for names in chosen if not _is_twice_as_much(names, answers))
    found: list[Decision] = [Accepted(kernel, as_applied(names, problem)) for names in chosen]
    version = availability.library_version(kernel.library) or ""
    faults = known_faults.faults_that_hold(kernel.name, problem, device, version, settings.known_faults, facts)
    return [Rejected(kernel, tuple(faults))] if faults else found


def _needed(names: tuple[str, ...]) -> tuple[str, ...]:
    """Those that are chosen, without what another one spares."""
    spared = {BY_NAME[name].spares for name in names if name}
    return tuple(name for name in names if name and name not in spared)


def _is_twice_as_much(names: tuple[str, ...], answers: dict[str, str]) -> bool:
    """Whether one conversion stands beside another that is not worth trying with it, and need not be there."""
    needless = {other for name in names for other in BY_NAME[name].instead_of}
    return any(answers[name] == OPTIONAL for name in needless.intersection(names))


def _choices(name: str, answer: str) -> tuple[str, ...]:
    first = (name, "") if name == "gqa_fold" else ("", name)  # a view that saves work: tried before all that copies
    return {OPTIONAL: first, REQUIRED: (name,)}[answer]


def _reasons(kernel: Kernel, p: Problem, facts: CallFacts, device: Device, settings: Settings) -> Iterable[str]:
    if device.type not in kernel.devices:
        yield f"needs {' or '.join(kernel.devices)}, this device is {device.type}"
        return  # its other limits speak of that device
    if not settings.allows(kernel.name) and kernel.name not in registry.FALLBACKS:
        yield f"excluded by options: kernels {', '.join(settings.kernels)}"
    elif kernel.opt_in and kernel.name not in settings.named:
        yield "considered only where it is named, with a + before it: fastattn.options(kernels=...) or FASTATTN_KERNELS"
        return
    if kernel.switch in facts.switched_off:
        yield f"switched off by torch.backends.cuda.enable_{kernel.switch}_sdp(False) or sdpa_kernel(...)"
    if p.dtype not in kernel.dtypes and not (kernel.fp32 and "float32" in kernel.dtypes and p.dtype != "float64"):
        yield f"dtype {p.dtype} is not one of {', '.join(kernel.dtypes)}"
    if p.causal and kernel.corner is None and not kernel.masks:
        yield "causal is not supported"
    if p.mask == "block":
        if not kernel.custom_mask:
            yield "a BlockMask is not supported"
    elif p.mask and not (p.structure and kernel.mask_blocks):  # whose conversion says what squares cannot
        if not kernel.masks and not _has_own_form(kernel, p):
            yield f"a mask is not supported ({p.mask} {p.mask_shape})"
        elif p.mask != "bool" and "additive" not in kernel.masks:
            yield f"a float mask is not supported ({p.mask})"
    for asked, can, what in (
        (p.softcap, kernel.softcap, f"softcap ({p.softcap:g})"),
        (p.dropout, kernel.dropout, "dropout"),
        (p.lse, kernel.lse, "return_lse: the log-sum-exp"),
        (p.score_mod, kernel.score_mod, "a score_mod"),
    ):
        if asked and not can:
            yield f"{what} is not supported"
    if p.needs_grad and not kernel.grad:
        yield "gradients are not supported"
    if p.mask_grad and not kernel.mask_grad:
        yield "a gradient for the mask is not supported"
    if p.deterministic and not kernel.deterministic:
        yield "not deterministic, and torch.use_deterministic_algorithms is on"
    if kernel.approximate and isinstance(p.accuracy, str):
        yield f"quantises its inputs: accuracy {p.accuracy!r} asks for more, pass a number"
    if kernel.compiles == "each_length" and p.lengths != "exact":
        yield "compiled for each length, and lengths change here"
    for need in kernel.needs:
        reason = need.why_not(p, device, facts)
        if reason:
            yield reason
    why = availability.why_absent(kernel)
    if why:
        yield why


def _has_own_form(kernel: Kernel, p: Problem) -> bool:
    """Whether it has an entry point for such problems, which may still refuse this one."""
    if not p.structure:
        return False
    from fastattn.planning.conversions.own_forms import has_own_form  # here, as few calls need it

    return has_own_form(kernel, p)


def serves_kv_lens(chosen: Accepted, problem: Problem, device: Device, settings: Settings, low: int, high: int) -> bool:
    """Whether a candidate that can do this problem can do it at every kv_len from low to high."""
    kernel = chosen.kernel
    faults = [fault for fault in known_faults.known_faults(settings.known_faults) if kernel.name in fault.kernels]
    version = availability.library_version(kernel.library) or ""
    if any(fault.may_hold_between(low, high, problem, device, version) for fault in faults):
        return False
    asking = [need for need in kernel.needs if _asks_length(need, problem, device)]
    walked = [need for need in asking if not (isinstance(need, Range) and need.holds_between("kv_len", low, high))]
    lengths = {low, high, *range(low, min(low + REMAINDERS, high))} if walked else ()
    at = [problem.replace(kv_len=length) for length in lengths]
    return not any(need.why_not(p, device) for p in at for need in walked)


def _asks_length(need: Need, problem: Problem, device: Device) -> bool:
    """Whether a limit reads what differs from one kv_len to the next."""
    if not isinstance(need, RefuseWhen):
        return getattr(need, "field", "") in OF_LENGTH
    read: set[str] = set()

    class Seen:
        def __getattr__(self, name: str) -> Any:
            read.add(name)
            return getattr(problem, name)

    need.test(Seen(), device)  # type: ignore[arg-type]
    return not read <= _OF_NO_LENGTH


_OF_NO_LENGTH = {*Problem._fields} - {"kv_len"}  # a property or a method may follow from the length
REMAINDERS = 64  # limits that ask for a length's remainder ask for one of this or a part of it


def by_name(name: str, found: Iterable[Decision]) -> list[Accepted]:
    """The candidates an order means: `torch_flash` any of its candidates, `torch_flash+fp32` just that one."""
    accepted = [d for d in found if isinstance(d, Accepted)]
    return [d for d in accepted if d.name == name] or [d for d in accepted if d.kernel.name == name]
