"""Sample: the tensors of one call, made up or the caller's own, on which candidates are checked and timed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastattn.problems import dense_masks
from fastattn.problems.layouts import from_bhsd, to_bhsd
from fastattn.problems.masks import Filled, Kept, Mask
from fastattn.problems.problem import Problem


@dataclass(frozen=True, slots=True)
class Sample:
    """One call's tensors in the caller's layout; q, k, v and mask ask for a gradient as the problem says.

    Of a cache in pages k and v are the cache that these make up.
    """

    problem: Problem
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | Mask | None
    grad: Tensor | None  # upstream gradient, (b, h, s, dv) in the caller's layout
    given: tuple[Any, ...] = field(init=False)  # (q, k, v, mask) of the call

    def __post_init__(self) -> None:
        k, v, mask = self.k, self.v, self.mask
        if self.problem.page_size and isinstance(mask, Mask):
            k, v, mask = _in_pages(k, v, mask, self.problem.layout)
        if self.problem.kept:
            mask = _in_kv_cache(self.problem, k, v, mask)
        object.__setattr__(self, "given", (self.q, k, v, mask))

    @property
    def tensors(self) -> list[Tensor]:
        """Those a call is given."""
        return [x for x in self.given if isinstance(x, Tensor)]

    def dense_mask(self, entry: int, heads: slice, rows: Tensor | None = None) -> Tensor | None:
        """The mask of some heads of a batch entry: (heads or 1, q_len or 1, kv_len or 1), in the dtype that is computed in.

        rows: of a Mask, the queries that are wanted.
        """
        p = self.problem
        if isinstance(self.mask, Mask):
            mask = self.mask.dense(p.batch, p.q_len, p.kv_len, self.q.device, rows=rows)
        elif self.mask is not None:
            mask = dense_masks.as_4d(self.mask.detach())
        else:
            return None
        mask = mask[entry if mask.shape[0] > 1 else 0]
        if isinstance(self.mask, Mask) and mask.dtype is not torch.bool:
            mask = mask.to(getattr(torch, p.mask or ""))
        if p.cast_from and mask.dtype is not torch.bool:
            mask = mask.to(p.torch_dtype)
        return mask if mask.shape[0] == 1 else mask[heads]


def _in_kv_cache(p: Problem, k: Tensor, v: Tensor, mask: Any) -> Kept:
    from fastattn.planning.conversions.kept import InDecoding  # here, as no other problem needs it
    from fastattn.problems.packing import filled_to

    filled = filled_to(mask, p.batch, p.kv_len) if isinstance(mask, Filled) else (p.kv_len,) * p.batch
    return Kept(mask, InDecoding(to_bhsd(k, p.layout), to_bhsd(v, p.layout), filled, p.q_len))


def _in_pages(k: Tensor, v: Tensor, mask: Mask, layout: str) -> tuple[Tensor, Tensor, Mask]:
    from fastattn.problems.packing import in_pages  # here, as no other problem needs it

    *pages, told = in_pages(to_bhsd(k, layout), to_bhsd(v, layout), mask)
    k, v = (from_bhsd(x, layout).contiguous() for x in pages)
    return k, v, told
