"""Calls of F.sdpa that are not (b, h, s, d), or that it broadcasts, as views of such a call.

F.sdpa takes its math for all of them: the dimension before the last two is the heads, those before it are the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastattn.dispatch.torch_function import stock_sdpa
from fastattn.environment.device import Device
from fastattn.planning import default_choice
from fastattn.problems.call_facts import CallFacts
from fastattn.problems.problem import Problem

if TYPE_CHECKING:
    from fastattn.dispatch.resolve import Resolved

MASK_AND_CAUSAL = "a mask together with is_causal"


class NotFour(NamedTuple):
    """Why a call is no view of one of (b, h, s, d)."""

    why: str
    by_sizes: bool  # it lies in sizes or strides, not in the numbers of dimensions


OTHER_DIMS = NotFour("inputs of such numbers of dimensions", by_sizes=False)
NO_VIEW = NotFour("inputs of more than 4 dimensions that are no view of 4-D ones", by_sizes=True)
OTHER_HEADS = NotFour("different head counts without enable_gqa", by_sizes=True)


class FourDims(NamedTuple):
    """How the tensors of a call become (b, h, s, d), and the output what F.sdpa's would be. All are views."""

    into: Callable[[Tensor], Tensor]  # of q, k and v
    mask_into: Callable[[Any], Any]
    back: Callable[[Tensor, Tensor], Tensor]  # (the output, the caller's q)
    dims: int = 4  # of the caller's tensors
    both: bool = False  # a mask together with is_causal

    def views(self, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> tuple[Tensor, Tensor, Tensor, Any]:
        return self.into(q), self.into(k), self.into(v), self.mask_into(mask)

    def of_caller(self, resolved: Resolved, as_it_was: Callable[..., Tensor]) -> Resolved:
        """What a miss on the views came to, for the caller's tensors. as_it_was: F.sdpa as the caller called it.

        An untuned default is that very call. So is any with a mask and is_causal, which the default's row cannot say.
        """
        if self.both:
            resolved = resolved._replace(reads=tuple(dict.fromkeys((*resolved.reads, "flash"))))  # else F.sdpa refuses
        elif resolved.kv_lens is not None:
            dim, low, high = resolved.kv_lens
            resolved = resolved._replace(kv_lens=(dim + self.dims - 4, low, high))
        if resolved.candidate == "default" + "+mask_dense" * self.both and (self.both or not resolved.is_tuned):
            return resolved._replace(call=as_it_was)
        return resolved._replace(call=self._around(resolved.call))

    def _around(self, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        into, mask_into, back = self[:3]
        if self[:3] == _SAME:
            return call
        return lambda q, k, v, mask: back(call(into(q), into(k), into(v), mask_into(mask)), q)


def as_four_dims(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, enable_gqa: bool) -> FourDims | NotFour | None:
    """None where the call is (b, h, s, d) already."""
    n, mask_dims = q.dim(), None if mask is None else mask.dim()
    is_mask_taken = mask_dims in (None, 2) or (mask_dims == 3 and n > 2) or n == 4
    if not n == k.dim() == v.dim() or n < 2 or not is_mask_taken or (n == 2 and enable_gqa):
        return OTHER_DIMS
    is_one_head = n > 2 and q.shape[-3] != k.shape[-3] and not enable_gqa
    if is_one_head and not is_one_head_broadcast(q, k, v, enable_gqa):
        return OTHER_HEADS
    mask_into = _before_it if mask_dims == 3 else _as_it_is
    if n < 4:
        return FourDims(_INTO[n], mask_into, _last_three if n == 3 else _last_two, n)
    if n > 4:
        if not q.shape[:-3] == k.shape[:-3] == v.shape[:-3] or not all(map(_merges, (q, k, v))):
            return NO_VIEW
        return FourDims(_merged, mask_into, _unmerged, n)
    if not q.shape[0] == k.shape[0] == v.shape[0] and f_sdpa_broadcasts():
        batch = max(q.shape[0], k.shape[0], v.shape[0])
        return FourDims(lambda x: x.expand(batch, -1, -1, -1) if x.shape[0] == 1 else x, mask_into, _whole)
    return FourDims(_as_it_is, mask_into, _whole) if mask_dims == 3 or is_one_head else None


def is_one_head_broadcast(q: Tensor, k: Tensor, v: Tensor, enable_gqa: Any) -> bool:
    """Whether one head of keys and values is for all queries without enable_gqa, as in Falcon: F.sdpa's math broadcasts it."""
    return not enable_gqa and k.shape[-3] == v.shape[-3] == 1 < q.shape[-3] and f_sdpa_broadcasts()


def f_sdpa_broadcasts() -> bool:
    """Whether F.sdpa of this torch broadcasts heads and batch entries; what it refuses must be refused. Asked once."""
    if "broadcasts" not in _answers:
        _answers["broadcasts"] = _takes((2, 2), (1, 1))
    return _answers["broadcasts"]


def f_sdpa_takes_both(p: Problem, device: Device, facts: CallFacts) -> bool:
    """Whether F.sdpa of this torch takes this mask with is_causal: the CPU's fused kernel alone may. That is asked once."""
    if device.type != "cpu" or default_choice.default_runs(p, device, facts) != "torch_flash":
        return False
    if "both" not in _answers:
        _answers["both"] = _takes((1, 1), (1, 1), torch.zeros(1, 1, dtype=torch.float32, device="cpu"), is_causal=True)
    return _answers["both"]


_answers: dict[str, bool] = {}  # no functools.cache: Dynamo warns of it, though it does not look in here
f_sdpa_broadcasts._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as compiled.winner


def _takes(of_q: tuple[int, int], of_k: tuple[int, int], mask: Tensor | None = None, **options: Any) -> bool:
    q, k = (torch.zeros(*sizes, 1, 8, dtype=torch.float32, device="cpu") for sizes in (of_q, of_k))
    try:
        stock_sdpa(q, k, k, mask, **options)
    except RuntimeError:
        return False
    return True


def _as_it_is(x: Any) -> Any:
    return x


def _before_it(x: Tensor) -> Tensor:
    return x.unsqueeze(0)


_INTO = {2: lambda x: x[None, None], 3: _before_it}


def _merges(x: Tensor) -> bool:
    """Whether the dimensions before the last three are one in memory."""
    try:
        _merged(x)
    except RuntimeError:
        return False
    return True


def _merged(x: Tensor) -> Tensor:
    return x.view(-1, *x.shape[-3:])


def _unmerged(out: Tensor, q: Tensor) -> Tensor:
    return _no_view(out.view(*q.shape[:-3], *out.shape[-3:]))


def _last_three(out: Tensor, q: Tensor) -> Tensor:
    return _no_view(out.squeeze(0))


def _last_two(out: Tensor, q: Tensor) -> Tensor:
    return _no_view(out.squeeze(0).squeeze(0))


def _whole(out: Tensor, q: Tensor) -> Tensor:
    return out


_SAME = (_as_it_is, _as_it_is, _whole)
BOTH = FourDims(*_SAME, both=True)


def _no_view(out: Tensor) -> Tensor:
    """The same memory, and no view where it has no gradient: it may be changed in place with gradients, as F.sdpa's may."""
    return out if out.requires_grad else torch.unsafe_chunk(out, 1)[0]
