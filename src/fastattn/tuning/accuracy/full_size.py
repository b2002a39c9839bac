"""A look at a candidate's output at the problem's own size: some rows of the first and of the last head.

The probes (probes.py) are of bounded lengths. What only goes wrong at full size, such as an offset beyond 32 bits or a split
of the keys that loses one, shows here, in the output of the run that measures memory anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.problems import bands
from fastattn.problems.layouts import to_bhsd
from fastattn.tuning.accuracy import reference
from fastattn.tuning.accuracy.budgets import Errors, in_budgets, rounded_to, row_budget
from fastattn.tuning.accuracy.sample import Sample

ROWS = 24  # the first and the last eight, and as many between


@dataclass(frozen=True, slots=True)
class _Head:
    """Where to look, and what must be there: rows (r) of query heads [start, start + g) of a batch entry."""

    batch: int
    start: int
    rows: Tensor
    exact: Tensor  # (g, r, dv)
    budget: Tensor  # (g, r)


class FullSize:
    """The sample that candidates are timed on, with a reference for some rows of it."""

    def __init__(self, sample: Sample, scale: float) -> None:
        self._sample, self._scale = sample, scale
        p = sample.problem
        first, last = (0, 0), (p.batch - 1, p.kv_heads - 1)
        self._heads = [self._head(*at) for at in dict.fromkeys((first, last))] if p.q_len and p.kv_len else []

    def _head(self, batch: int, h: int) -> _Head:
        s, p, g = self._sample, self._sample.problem, self._sample.problem.group
        dtype = p.torch_dtype
        rows = some_rows(p.q_len, s.q.device)
        q = to_bhsd(s.q.detach(), p.layout)[batch, h * g : (h + 1) * g].to(dtype)
        k, v = (to_bhsd(x.detach(), p.layout)[batch, h].to(dtype) for x in (s.k, s.v))
        mask = s.dense_mask(batch, slice(h * g, (h + 1) * g), rows)
        lower, upper = bands.band(p.causal, p.window, p.q_len, p.kv_len)
        exact, rounded = (
            reference.attend_in_blocks(
                q, k, v, mask, scale=self._scale, lower=lower, upper=upper, softcap=p.softcap, rows=rows,
                dtype=wide, sized=wide is torch.float64,
            )
            for wide in (torch.float64, dtype if p.accuracy == "dtype" else torch.float32)
        )  # fmt: skip
        shrink = 2.0**-29 if dtype is torch.float64 else 1.0
        e_rows = rounded_to(rounded.out, dtype if shrink == 1.0 else torch.float32) - exact.out
        budget = row_budget(exact, e_rows.abs().amax(-1) * shrink, p, shrink)
        return _Head(batch, h * g, rows, exact.out, budget)

    def errors(self, found: Any) -> Errors:
        """The errors of what a run on the sample returned. Raises ValueError for an output of another shape or dtype."""
        p = self._sample.problem
        out = to_bhsd((found[0] if p.lse else found).detach(), p.layout)
        want = (p.batch, p.q_heads, p.q_len, p.head_dim_v)
        if out.shape != want or out.dtype is not p.torch_dtype:
            raise ValueError(f"at full size its output is {tuple(out.shape)} {out.dtype}, not {want} {p.torch_dtype}")
        worst = 0.0
        for head in self._heads:
            got = out[head.batch, head.start : head.start + p.group, head.rows].double()
            worst = max(worst, in_budgets((got - head.exact).abs().amax(-1), head.budget))
        return Errors(worst)


def some_rows(q_len: int, device: torch.device) -> Tensor:
    """The rows that are looked at: all of a few, else the first, the last, and an even spread between."""
    edge = ROWS // 3
    if q_len <= ROWS:
        return torch.arange(q_len, device=device, dtype=torch.int64)
    spread = [edge + (q_len - 2 * edge - 1) * i // (edge - 1) for i in range(edge)]
    rows = [*range(edge), *spread, *range(q_len - edge, q_len)]
    return torch.tensor(sorted(set(rows)), device=device, dtype=torch.int64)
