"""The judge: a candidate's output and gradients on a sample, compared with float64 and held to the budgets (budgets.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastattn.problems import bands, dense_masks
from fastattn.problems.layouts import to_bhsd
from fastattn.problems.problem import Problem
from fastattn.tuning.accuracy import reference
from fastattn.tuning.accuracy.budgets import ROUNDOFF, Errors, in_budgets, largest, rounded_to, row_budget, score_size
from fastattn.tuning.accuracy.digest import digest
from fastattn.tuning.accuracy.patterns import structured
from fastattn.tuning.accuracy.probes import plain_sample, probe_problem, probe_sample, stand_in_scale
from fastattn.tuning.accuracy.sample import Sample

ROW_LIMIT = 2**20  # scores per head; above it the reference looks at a sample of rows
WORK_LIMIT = 2**27  # the same of what they take: scores of a kv head x their dims
ROWS = 192  # of a sample; fewer where their scores would be more than SAMPLED
SAMPLED = 2**22
POISONED = 2**24  # elements: more would take memory that the caller may not have

Call = Callable[[Tensor, Tensor, Tensor, Any], Any]


@dataclass(frozen=True, slots=True)
class _Head:
    """The budget of one kv head, and the float64 results it is around."""

    exact: reference.Result
    rows: Tensor  # (g, r) budget of each row
    gradients: dict[str, tuple[Tensor, float]]  # name -> (float64 gradient, budget)
    lse: Tensor  # (g, r) budget of each row's log-sum-exp


class Judge:
    """A sample with its reference, computed once and used for every candidate."""

    def __init__(self, sample: Sample, scale: float, drop: Tensor | None = None) -> None:
        """drop (q_heads, q_len, kv_len): the factors that a dropout puts on the weights."""
        self.sample, self.drop = sample, drop
        p = sample.problem
        self.rows = row_sample(p, sample.q.device)
        self.grad = sample.grad
        if self.grad is not None and self.rows is not None:
            only = torch.zeros_like(self.grad)
            view, source = to_bhsd(only, p.layout), to_bhsd(self.grad, p.layout)
            view[:, :, self.rows] = source[:, :, self.rows]
            self.grad = only  # rows that are not compared must not reach dk and dv
        self.heads = [self._head(h, scale) for h in range(p.kv_heads)]
        self._mask_grad = self._whole_mask_grad() if p.mask_grad else None

    def _head(self, h: int, scale: float) -> _Head:
        p, g = self.sample.problem, self.sample.problem.group
        dtype = p.torch_dtype
        q = _bhsd(self.sample.q, p, dtype)[0, h * g : (h + 1) * g]
        k, v = _bhsd(self.sample.k, p, dtype)[0, h], _bhsd(self.sample.v, p, dtype)[0, h]
        mask = self.sample.dense_mask(0, slice(h * g, (h + 1) * g), self.rows)
        lower, upper = bands.band(p.causal, p.window, p.q_len, p.kv_len)
        drop = None if self.drop is None else self.drop[h * g : (h + 1) * g]
        grad = None
        if self.grad is not None:
            grad = to_bhsd(self.grad, p.layout)[0, h * g : (h + 1) * g]
            grad = grad if self.rows is None else grad[:, self.rows]

        def run(in_dtype: torch.dtype, sized: bool) -> reference.Result:
            if grad is None and drop is None:
                return reference.attend_in_blocks(
                    q, k, v, mask, scale=scale, lower=lower, upper=upper, softcap=p.softcap, lse=p.lse, rows=self.rows,
                    dtype=in_dtype, sized=sized,
                )  # fmt: skip
            return reference.attend(
                q, k, v, mask, scale=scale, lower=lower, upper=upper, softcap=p.softcap, drop=drop, lse=p.lse,
                rows=self.rows, grad=grad, dtype=in_dtype, sized=sized,
            )  # fmt: skip

        exact = run(torch.float64, sized=True)
        accuracy = p.accuracy
        rounded = run(dtype if accuracy == "dtype" else torch.float32, sized=False)
        u = ROUNDOFF[dtype]
        shrink = 2.0**-29 if dtype is torch.float64 else 1.0  # float64 math errs like float32 math, 2^29 times less

        def error(got: Tensor, want: Tensor) -> Tensor:
            return (rounded_to(got, dtype if shrink == 1.0 else torch.float32) - want).abs() * shrink

        rows = row_budget(exact, error(rounded.out, exact.out).amax(-1), p, shrink)
        gradients = {}
        if exact.gradients is not None and rounded.gradients is not None:
            most = score_size(exact)
            allowed = accuracy if isinstance(accuracy, float) else u + 2.0**-24 * shrink * most
            of_dq, of_dk, of_dv = exact.gradients.cancelling(u, most)
            for name, cancelling in (("dq", of_dq), ("dk", of_dk), ("dv", of_dv)):
                want = getattr(exact.gradients, name)
                e32 = largest(error(getattr(rounded.gradients, name), want))
                gradients[name] = (want, 3 * (e32 + allowed * largest(want) + cancelling))
        if (
            not p.mask_grad and exact.gradients is not None
        ):  # its matrices are large, and only a mask's gradient needs them
            exact = replace(exact, gradients=None)
        e_lse = (rounded.lse - exact.lse).abs().nan_to_num_(nan=0.0) * shrink  # -inf where nothing is visible
        lse = 4 * (e_lse + 2.0**-24 * shrink * (1 + exact.lse.abs() + exact.noise))
        return _Head(exact, rows, gradients, lse)

    def _whole_mask_grad(self) -> tuple[Tensor, float]:
        p, u = self.sample.problem, ROUNDOFF[self.sample.problem.torch_dtype]
        parts = [head.exact.gradients for head in self.heads if head.exact.gradients is not None]
        shape = dense_masks.as_4d(self.sample.mask).shape  # type: ignore[arg-type]

        def over_rows(x: Tensor) -> Tensor:
            full = x.new_zeros(1, p.q_heads, p.q_len, p.kv_len)
            full[:, :, slice(None) if self.rows is None else self.rows] = x[None]
            return full.sum_to_size(shape)

        want = over_rows(torch.cat([g.dmask for g in parts]))
        # The terms of a broadcast sum are rounded one by one, and delta comes from the rounded output.
        spread = [g.weights * g.delta[..., None] if g.sizes is None else g.sizes for g in parts]
        sizes = over_rows(torch.cat([g.dmask.abs() + s for g, s in zip(parts, spread, strict=True)]))
        most = max(score_size(head.exact) for head in self.heads)
        return want, 3 * (u + min(2.0**-24, u) * most) * largest(sizes)

    def errors(self, call: Call) -> Errors:
        """Run the candidate on the sample; raises what it raises, and ValueError if it changes its inputs."""
        s, p = self.sample, self.sample.problem
        inputs = s.tensors
        before = [digest(x) for x in inputs]
        _poison(s)
        found = call(*s.given)
        out, lse = found if p.lse else (found, None)
        if [digest(x) for x in inputs] != before:
            raise ValueError("it changes its inputs")
        got = to_bhsd(out, p.layout).detach()[0]
        if out.shape != (want := _out_shape(p)) or out.dtype is not p.torch_dtype:
            raise ValueError(f"its output is {tuple(out.shape)} {out.dtype}, not {want} {p.torch_dtype}")
        got = got if self.rows is None else got[:, self.rows]
        forward = 0.0
        g = p.group
        for h, head in enumerate(self.heads):
            error = (got[h * g : (h + 1) * g].double() - head.exact.out).abs().amax(-1)
            forward = max(forward, in_budgets(error, head.rows))
            if lse is not None:
                forward = max(forward, self._lse(lse.detach()[0, h * g : (h + 1) * g], head))
        if self.grad is None:
            return Errors(forward)
        return Errors(forward, self._backward(out))

    def _lse(self, lse: Tensor, head: _Head) -> float:
        if lse.dtype is not torch.float32 or lse.shape[-1] != self.sample.problem.q_len:
            raise ValueError(f"its log-sum-exp is {lse.dtype} with rows of {lse.shape[-1]}")
        lse = lse if self.rows is None else lse[:, self.rows]
        hidden = head.exact.lse == float("-inf")
        if not torch.equal(lse == float("-inf"), hidden):
            return float("inf")
        return in_budgets((lse.double() - head.exact.lse).masked_fill(hidden, 0.0).abs(), head.lse)

    def _backward(self, out: Tensor) -> float:
        s, p, g = self.sample, self.sample.problem, self.sample.problem.group
        wanted = [x for x in s.tensors if x.requires_grad]
        found = torch.autograd.grad(out, wanted, self.grad)
        dq, dk, dv = (to_bhsd(x, p.layout)[0] for x in found[:3])
        worst = 0.0
        for h, head in enumerate(self.heads):
            mine = dq[h * g : (h + 1) * g]
            mine = mine if self.rows is None else mine[:, self.rows]
            for name, got in (("dq", mine), ("dk", dk[h]), ("dv", dv[h])):
                want, budget = head.gradients[name]
                worst = max(
                    worst,
                    in_budgets((got.double() - want).abs(), torch.tensor(budget, dtype=torch.float64, device="cpu")),
                )
        if self._mask_grad is not None:
            want, budget = self._mask_grad
            got = dense_masks.as_4d(found[3]).double().masked_fill(dense_masks.as_4d(s.mask) == float("-inf"), 0.0)  # type: ignore[arg-type]
            worst = max(worst, in_budgets((got - want).abs(), torch.tensor(budget, dtype=torch.float64, device="cpu")))
        return worst


def judges_of_problem(p: Problem, device: torch.device) -> list[Judge]:
    """The probes of a problem, and a plain sample where a stride of 0 is part of it."""
    scale = stand_in_scale(p)
    found = [Judge(probe_sample(p, device), scale)]
    if "expanded" in p.strides:
        r = probe_problem(p)
        found.append(Judge(plain_sample(r.replace(strides=p.strides), device), scale))
    return found


def judge_of_tiles(p: Problem, device: torch.device) -> Judge:
    """The probes under a mask with a structure, most of which falls out of the tiles."""
    return Judge(probe_sample(p, device, visible=structured), stand_in_scale(p))


def row_sample(p: Problem, device: torch.device) -> Tensor | None:
    """The rows the reference looks at: all, or the first and last tile and an even spread between (None is all)."""
    of_row = p.group * p.kv_len
    count = min(ROWS, max(24, SAMPLED // max(1, of_row)))
    is_little = p.q_len * of_row * (p.head_dim + p.head_dim_v) <= WORK_LIMIT and p.q_len * p.kv_len <= ROW_LIMIT
    if is_little or p.q_len <= count:
        return None
    edge = count // 3
    spread = torch.linspace(edge, p.q_len - edge - 1, count - 2 * edge, dtype=torch.float64, device=device).long()
    head, tail = (torch.arange(start, start + edge, dtype=torch.int64, device=device) for start in (0, p.q_len - edge))
    return torch.cat([head, spread, tail]).unique()


def _bhsd(x: Tensor, p: Problem, dtype: torch.dtype) -> Tensor:
    return to_bhsd(x.detach(), p.layout).to(dtype)


def _out_shape(p: Problem) -> tuple[int, ...]:
    sizes = {"b": p.batch, "h": p.q_heads, "s": p.q_len, "d": p.head_dim_v}
    return tuple(sizes[letter] for letter in p.layout)


def _poison(s: Sample) -> None:
    """Leave NaN where the allocator will hand out memory next, in several places: a partial write then shows."""
    blocks = [
        torch.full_like(x, float("nan"), requires_grad=False)
        for x in (s.q, s.k)
        for _ in range(3)
        if x.numel() <= POISONED // 3
    ]
    del blocks  # together: each was a place of its own


def worst_errors(judged: Sequence[Judge], call: Call) -> Errors:
    """The worst over several samples."""
    worst: Errors | None = None
    for judge in judged:
        worst = judge.errors(call).worst(worst)
    assert worst is not None
    return worst
