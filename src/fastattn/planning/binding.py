"""Candidate + Problem -> Call: a closure call(q, k, v, mask) -> out over the caller's tensors as they come.

No Call bakes a length in.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastattn.environment.text import type_name
from fastattn.environment.torch_private import is_view, sdpa
from fastattn.kernels.kernel import Arguments, Kernel, Run
from fastattn.kernels.libraries import availability
from fastattn.planning.conversions import BY_NAME, IN_BLOCKS, OWN_FORMS
from fastattn.planning.conversions.conversion import map_output
from fastattn.planning.decision import Accepted
from fastattn.planning.default_output import CONTIGUOUS, is_fused, output_order
from fastattn.problems import bands, masks
from fastattn.problems.call_facts import CallFacts, ordinary_facts
from fastattn.problems.layouts import FROM_BHSD, TO_BHSD, empty_in_order, from_bhsd, is_dense, to_bhsd
from fastattn.problems.problem import Problem, default_scale

if TYPE_CHECKING:
    from fastattn.problems.tilings.worth import Worth

# call(q, k, v, mask) -> out, or (out, lse)
Call = Callable[[Tensor, Tensor, Tensor, Any], Any]


class ByShare(NamedTuple):
    """Each call's own mask decides: tiles where they are worth it, else what computes all pairs."""

    in_tiles: Accepted
    plain: Accepted
    worth: "Worth"
    by_other: Iterator[int]  # counts the calls that the one serves which is not the verdict's


def bind(
    candidate: Accepted,
    p: Problem,
    scale: float | None,
    facts: CallFacts | None = None,
    *,
    structured: bool = False,
    dropout_p: float = 0.0,
    score_mod: Callable[..., Tensor] | None = None,
    by_share: ByShare | None = None,
) -> Call:
    """The Call of a candidate for the caller's layout.

    scale: the caller's, None means head_dim ** -0.5. facts: of the call, an ordinary one if not given. structured: the mask
    argument is no tensor. by_share: one of its two is the candidate; which of them serves, each call's mask decides.
    """
    is_tuning = facts is None  # outside of autocast, whatever the problem's calls are in
    facts = ordinary_facts(p) if facts is None else facts
    is_default = candidate.kernel.name == "default" and not (candidate.conversions or facts.decode or facts.by_math)
    if is_default and p.layout == "bhsd" and by_share is None:
        direct = _direct_default(p, scale, structured or p.kept, dropout_p)
        return _under_autocast(direct, p) if is_tuning and facts.autocast else direct
    may_serve = (candidate,) if by_share is None else (by_share.in_tiles, by_share.plain)
    steps = [_converted(one, p, facts) for one in may_serve]
    step = steps[0] if by_share is None else _as_mask_decides(by_share, candidate, *steps)
    is_right = all(_lies_as_default(one, p, facts) for one in may_serve)
    if p.lse and p.needs_grad:
        from fastattn.planning.conversions.lse_gradient import with_lse_gradient

        step = with_lse_gradient(step)
    reads_kept = any("kept" in one.conversions for one in may_serve)
    return _outermost(step, is_right, is_tuning, reads_kept, p, facts, Arguments(
        default_scale(p.head_dim) if scale is None else scale,
        softcap=p.softcap, dropout_p=dropout_p, needs_grad=p.needs_grad, lse=p.lse, score_mod=score_mod,
        deterministic=p.deterministic,
    ))  # fmt: skip


def _converted(candidate: Accepted, p: Problem, facts: CallFacts) -> Run:
    """The kernel with its conversions around it."""
    own = OWN_FORMS.intersection(candidate.conversions)
    step = availability.load_form(candidate.kernel, *own) if own else availability.load_kernel(candidate.kernel)
    if candidate.kernel.library != "torch":
        step = _on_its_device(step)
    step = _in_layout(step, candidate.kernel)
    for name in reversed(candidate.conversions):
        step = BY_NAME[name].wrap(step, candidate.kernel, p, facts)
    if _lacks_double_backward(candidate, p, facts):
        from fastattn.planning.conversions.double_backward import twice_differentiable

        return twice_differentiable(step)
    return step


def _as_mask_decides(pair: ByShare, candidate: Accepted, in_tiles: Run, plain: Run) -> Run:
    """Each call in tiles where they pay; those that the other one serves are counted."""
    from fastattn.planning.conversions.tiles import where_they_pay  # here, as few calls need it

    def counted(step: Run) -> Run:
        def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
            next(pair.by_other)
            return step(q, k, v, mask, a)

        return run

    if candidate is pair.plain:
        return where_they_pay(counted(in_tiles), plain, pair.worth)
    return where_they_pay(in_tiles, counted(plain), pair.worth)


def _on_its_device(step: Run) -> Run:
    """Libraries launch on the current device, whatever device the tensors are on."""

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        if not q.is_cuda or q.device.index == torch.cuda.current_device():
            return step(q, k, v, mask, a)
        with torch.cuda.device(q.device):
            return step(q, k, v, mask, a)

    return run


def _direct_default(p: Problem, scale: float | None, structured: bool, dropout_p: float) -> Call:
    """F.sdpa itself, with as little around it as can be: it is the hot path of every untuned and every tied problem."""
    causal, gqa = p.causal is not None, p.group > 1
    if structured:
        return lambda q, k, v, mask: sdpa(q, k, v, None, dropout_p, causal, scale=scale, enable_gqa=gqa)
    if scale is not None or gqa:
        return lambda q, k, v, mask: sdpa(q, k, v, mask, dropout_p, causal, scale=scale, enable_gqa=gqa)
    if causal or dropout_p:
        return lambda q, k, v, mask: sdpa(q, k, v, mask, dropout_p, causal)
    return sdpa


def _in_layout(step: Run, kernel: Kernel) -> Run:
    layout = kernel.layout
    if layout == "bhsd":
        return step

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        q, k, v = from_bhsd(q, layout), from_bhsd(k, layout), from_bhsd(v, layout)
        return map_output(step(q, k, v, mask, a), lambda out: to_bhsd(out, layout))

    return run


def _outermost(
    step: Run, is_right: bool, is_tuning: bool, reads_kept: bool, p: Problem, facts: CallFacts, a: Arguments
) -> Call:
    """From (q, k, v, mask) in the caller's layout to the step, and back. is_right: its output lies as F.sdpa's would."""
    order = TO_BHSD[p.layout]
    back = FROM_BHSD[p.layout]
    is_permuted = p.layout != "bhsd"
    is_moving = p.is_banded and p.causal == "bottom_right"  # the band depends on the lengths
    is_banded, causal, window, decode = p.is_banded, p.causal, p.window, facts.decode
    has_mask = p.mask is not None  # a structured mask has become the corner
    is_kept, is_tensor, is_told, also = p.kept, p.mask != "block", bool(p.structure), facts.also
    wanted = output_order(p, facts)
    is_contiguous = wanted == CONTIGUOUS
    # a view of what a backward may read must stay one, or that it was changed would not be noticed
    may_be_view = not (is_right or is_permuted or p.needs_grad)
    if is_banded and not is_moving:
        lower, upper = bands.band(causal, window, 0, 0)
        a = a._replace(lower=lower, upper=upper)

    def as_default(out: Tensor) -> Tensor:
        if is_right:
            pass
        elif is_contiguous:
            out = out.contiguous()
        elif not is_dense(out, wanted):
            out = empty_in_order(out, out.shape, wanted).copy_(out)
        if may_be_view and not torch.compiler.is_compiling() and is_view(out):
            out = torch.unsafe_chunk(out, 1)[
                0
            ]  # the same memory, and no view: it may be changed in place with gradients
        return out.permute(back) if is_permuted else out

    if is_right and not (is_permuted or is_moving or has_mask or decode or facts.autocast or reads_kept):
        return lambda q, k, v, mask: step(q, k, v, None, a)  # the short way, for decoding above all

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Any:
        if is_permuted:
            q, k, v = q.permute(order), k.permute(order), v.permute(order)
        if decode is not None:
            first, last = decode.keys(k.shape[2])
            k, v = k[:, :, first:last], v[:, :, first:last]
        now = a
        if is_moving:
            lower, upper = bands.band(causal, window, q.shape[2], k.shape[2])
            now = a._replace(lower=lower, upper=upper)
        if is_kept:
            now = now._replace(kept=mask.cache) if reads_kept else now
            mask = mask.of
        if not has_mask:
            mask = None
        elif is_told:
            if not isinstance(mask, masks.Mask):
                raise TypeError(f"this call was bound for a mask like {p.structure}, got {type_name(mask)}")
            mask = mask if also is None else mask & also
            if not is_tuning:
                mask.check(*q.shape[:3], k.shape[2])  # a guard knows only what it is like
        elif is_tensor and mask is not None and mask.dim() == 2:
            mask = mask[None, None]
        found = step(q, k, v, mask, now)
        return map_output(found, as_default) if now.lse else as_default(found)

    return _under_autocast(call, p) if facts.autocast else call


def _lies_as_default(candidate: Accepted, p: Problem, facts: CallFacts) -> bool:
    """Whether it is certain that the output lies in memory as F.sdpa's would, so that no call need look."""
    kernel, names, wanted = candidate.kernel, set(candidate.conversions), output_order(p, facts)
    if (kernel.name == "default" and not facts.by_math) or "tiles" in names:  # written into an output that lies so
        return True
    if wanted == CONTIGUOUS == facts.q_order:
        return bool(kernel.output_lies)
    if names & {"gqa_fold", "split_kv", "contiguous", "head_dim_pad", "dense"}:
        return False
    if names & IN_BLOCKS:
        return not p.needs_grad or "recompute" in names
    return kernel.output_lies == ("contiguous" if wanted == CONTIGUOUS else "as_query")


def _lacks_double_backward(candidate: Accepted, p: Problem, facts: CallFacts) -> bool:
    """Whether F.sdpa's gradients could be differentiated, and its output changed in place, where this kernel's cannot."""
    kernel = candidate.kernel
    is_default = kernel.name == "default" and not facts.by_math  # on a view it may be a fused kernel
    is_able = kernel.twice_differentiable or is_default or "tiles" in candidate.conversions
    is_theirs_unable = is_fused(p, facts) and not p.lse  # which F.sdpa does not say
    return p.needs_grad and not is_able and not p.dropout and not is_theirs_unable


def _under_autocast(call: Call, p: Problem) -> Call:
    """Cast as F.sdpa casts, then keep autocast away from the products inside."""
    dtype, device = p.torch_dtype, p.device

    def cast(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.dtype is torch.bool or x.dtype is torch.float64 else x.to(dtype)

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return call(cast(q), cast(k), cast(v), cast(mask) if isinstance(mask, Tensor) else mask)  # type: ignore[arg-type]

    return run
