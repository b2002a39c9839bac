"""softmax(q k^T) v written out, and its gradients, in any precision: what every kernel is judged by.

The default itself can be wrong, so the reference is never "whatever F.sdpa returns". Fully masked rows are zeros with zero
gradients. Works on one kv head at a time, on chosen query rows, and forward alone in blocks of keys, so that its memory
stays small.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Result:
    """One kv head; g query heads, r rows. Sizes that error budgets are made of stand beside the results.

    out (g, r, dv). lse (g, r). spreads (g, r, dv): sum_j p_ij |v_jd|. noise (g, r): sum_j p_ij of sum_d |q_id k_jd scale|
    and the bias, how large the terms are that a row's scores rest on; 0 for half inputs, unless the log-sum-exp is wanted.
    """

    out: Tensor
    lse: Tensor
    spreads: Tensor
    noise: Tensor
    gradients: Gradients | None = None

    @property
    def spread(self) -> Tensor:
        """(g, r): (P|V|)_i = max_d sum_j p_ij |v_jd|."""
        return self.spreads.amax(-1)


@dataclass(frozen=True, slots=True)
class Gradients:
    """dq (g, r, d), dk (kv_len, d), dv (kv_len, dv), dmask = dscores (g, r, kv_len), and what `cancelling` needs.

    delta (g, r) is the root of squares of the terms o_id do_id, whose sum every flash backward takes from the rounded
    output.
    """

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dmask: Tensor
    dscores: Tensor
    weights: Tensor
    delta: Tensor
    sizes: Tensor | None  # p_ij (sum_d |do_id v_jd| + sum_d |do_id o_id|), float32 inputs and wider
    q: Tensor
    k: Tensor
    grad: Tensor
    scale: float

    def cancelling(self, u: float, score_size: float) -> tuple[float, float, float]:
        """Error in (dq, dk, dv) by terms that were each rounded by u before they cancelled.

        Half dtypes: delta comes from the rounded output, and the weights and dscores are rounded to that dtype before their
        products, as fused kernels do; independent errors, so squares add up. Wider ones: a bound by the sizes of all terms,
        as weights are off by u times the size of their scores.
        """
        k, q = self.k.abs(), self.q.flatten(0, 1).abs()
        if self.sizes is not None:
            weight = u * (1 + score_size)
            dq, dk = self.sizes @ k, self.sizes.flatten(0, 1).mT @ q
            dv = self.weights.flatten(0, 1).mT @ self.grad.flatten(0, 1).abs()
            dq, dk, dv = (float(x.max()) for x in (dq, dk, dv))
            return weight * abs(self.scale) * dq, weight * abs(self.scale) * dk, weight * dv
        rounded = self.dscores.square()
        shifted = (self.weights * self.delta[..., None]).square()
        dq = (self.weights @ self.k * self.delta[..., None]).square() + rounded @ k.square()
        dk = (shifted + rounded).flatten(0, 1).mT @ q.square()
        dv = self.weights.square().flatten(0, 1).mT @ self.grad.flatten(0, 1).square()
        dq, dk, dv = (u * float(x.max()) ** 0.5 for x in (dq, dk, dv))
        return abs(self.scale) * dq, abs(self.scale) * dk, dv


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    lower: int | None = None,
    upper: int | None = None,
    softcap: float = 0.0,
    score_mod: Callable[[Tensor], Tensor] | None = None,
    drop: Tensor | None = None,
    lse: bool = False,
    rows: Tensor | None = None,
    grad: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    sized: bool = True,
) -> Result:
    """Attention of the g query heads of one kv head, computed in `dtype`.

    q (g, s, d), k (kv_len, d), v (kv_len, dv); mask None or (g|1, s|1, kv_len|1), bool or float, or of the
    wanted rows alone. Key j is visible to query i
    when i + lower <= j <= i + upper; None is no limit. softcap: scores become softcap * tanh(scores / softcap). score_mod:
    changes (g, r, kv_len) scores. drop (g, s, kv_len): factors of the weights, 0 or 1 / (1 - dropout_p). lse: whether the
    log-sum-exp is judged too. rows: the query rows wanted, all if None. grad (g, r, dv): upstream gradient of those rows.
    sized: whether the sizes that budgets are made of are wanted; they are half of the work.
    """
    index = torch.arange(q.shape[1], dtype=torch.int64, device=q.device) if rows is None else rows
    dtype_in = q.dtype
    q, k, v = q[:, index].to(dtype), k.to(dtype), v.to(dtype)
    scores = q @ k.mT * scale
    is_wide = sized and dtype_in.itemsize >= 4  # for half inputs float32 scores are as good as exact
    sizes = (q.abs() @ k.abs().mT).mul_(abs(scale)) if is_wide or (sized and lse) else None
    hidden: Tensor | None = None
    slope: Tensor | None = None
    if softcap:
        capped = torch.tanh(scores / softcap)
        scores, slope = capped * softcap, 1 - capped.square()
    if score_mod is not None:
        scores = score_mod(scores)
    if mask is not None:
        mask = mask if mask.shape[1] in (1, len(index)) else mask[:, index]
        if mask.dtype is torch.bool:
            hidden = mask.logical_not().expand_as(scores)
        else:
            mask = mask.to(dtype)
            scores += mask
            if sizes is not None:
                sizes += mask.abs()
    keys = torch.arange(k.shape[0], dtype=torch.int64, device=q.device)
    for beyond in (
        keys > (index + upper)[:, None] if upper is not None else None,
        keys < (index + lower)[:, None] if lower is not None else None,
    ):
        if beyond is not None:
            hidden = beyond.expand_as(scores) if hidden is None else hidden | beyond
    if hidden is not None:
        scores = scores.masked_fill_(hidden, float("-inf"))
    sums = scores.logsumexp(-1)
    weights = (scores - sums[..., None]).exp_().nan_to_num_(nan=0.0)
    factors = None if drop is None else drop[:, index].to(dtype)
    kept = weights if factors is None else weights * factors
    out = kept @ v
    spreads = kept @ v.abs() if sized else torch.zeros_like(out)
    noise = torch.zeros_like(sums) if sizes is None else sizes.mul_(weights).nan_to_num_(nan=0.0).sum(-1)
    if grad is None:
        return Result(out, sums, spreads, noise)
    grad = grad.to(dtype)
    terms = grad * out
    dscores = grad @ v.mT if factors is None else grad @ v.mT * factors
    dscores -= terms.sum(-1, keepdim=True)
    dscores *= weights
    inner = dscores if slope is None else dscores * slope
    gradients = Gradients(
        dq=inner @ k * scale,
        dk=inner.flatten(0, 1).mT @ q.flatten(0, 1) * scale,
        dv=kept.flatten(0, 1).mT @ grad.flatten(0, 1),
        dmask=dscores,
        dscores=inner,
        weights=weights,
        delta=terms.square().sum(-1).sqrt(),
        sizes=(grad.abs() @ v.abs().mT + terms.abs().sum(-1, keepdim=True)).mul_(weights) if is_wide else None,
        q=q,
        k=k,
        grad=grad,
        scale=scale,
    )
    return Result(out, sums, spreads, noise, gradients)


BLOCK = 2**18  # numbers in the largest matrix of a block: in float64 2 MiB, which malloc hands out again and again


def attend_in_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    block: int | None = None,
    lower: int | None,
    upper: int | None,
    **options: Any,
) -> Result:
    """attend() forward, `block` keys at a time, merged by log-sum-exp: its memory does not grow with the keys.

    options: scale, softcap, lse, rows, dtype and sized, as for attend().
    """
    rows = q.shape[1] if options.get("rows") is None else options["rows"].numel()
    block = block or max(64, BLOCK // max(k.shape[1], v.shape[1], q.shape[0] * rows))
    parts: list[Result] = []
    for start in range(0, k.shape[0], block):
        keys = slice(start, start + block)
        seen = mask if mask is None or mask.shape[-1] == 1 else mask[..., keys]
        band = {"lower": None if lower is None else lower - start, "upper": None if upper is None else upper - start}
        parts.append(attend(q, k[keys], v[keys], seen, **band, **options))
    lse = torch.stack([part.lse for part in parts]).logsumexp(0)
    shares = [(part.lse - lse).exp().nan_to_num(nan=0.0) for part in parts]
    out = sum(part.out * share[..., None] for part, share in zip(parts, shares, strict=True))
    spreads = sum(part.spreads * share[..., None] for part, share in zip(parts, shares, strict=True))
    noise = sum(part.noise * share for part, share in zip(parts, shares, strict=True))
    return Result(out, lse, spreads, noise)  # type: ignore[arg-type]
