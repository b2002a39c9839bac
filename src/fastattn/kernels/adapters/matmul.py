"""Attention made of matrix products: on a CPU two plain products often beat a fused kernel.

The query group of GQA is folded into rows, so keys and values are never repeated.
"""

from __future__ import annotations

from typing import Any

from fastattn.kernels import (
    NEVER,
    Arguments,
    Backward,
    Kernel,
    OneOf,
    Range,
    Run,
    Tensor,
    additive,
    all_rows_see,
    drowns_scores,
    fold,
    scratch,
    unfold,
)


def in_room(name: str, x: Tensor) -> Tensor:
    """x in float32."""
    import torch

    return scratch(name, x, tuple(x.shape), torch.float32).copy_(x)


def masked_scores(q: Tensor, q3: Tensor, k3: Tensor, mask: Tensor | None, a: Arguments) -> Tensor:
    """(n, rows, kv_len) scale * q k^T + mask, -inf where a key is hidden; a mask is laid under the product, not added."""
    import torch

    n, rows, kv_len = q3.shape[0], q3.shape[1], k3.shape[1]
    scores = scratch("scores", q3, (n, rows, kv_len), q3.dtype)
    view = scores.view(*q.shape[:3], kv_len)
    if mask is not None and mask.is_floating_point() and mask.itemsize > scores.itemsize:
        mask = narrowed(mask, scores.dtype)
    if mask is None or a.softcap:
        torch.baddbmm(scores, q3, k3.mT, beta=0, alpha=a.scale, out=scores)
        if a.softcap:
            scores.mul_(1 / a.softcap).tanh_().mul_(a.softcap)
        if mask is not None:  # a cap stands between the product and the mask
            view.masked_fill_(mask.logical_not(), NEVER) if mask.dtype is torch.bool else view.add_(mask)
    else:
        view.copy_(mask if mask.dtype is not torch.bool else additive(mask, scores))
        scores.baddbmm_(q3, k3.mT, alpha=a.scale)
    hide_band(view, a.lower, a.upper)
    return scores


def narrowed(mask: Tensor, dtype: Any) -> Tensor:
    """A wider float mask in the dtype of the scores: what it makes lower than they can be is very low, and not hidden."""
    import torch

    found = mask.to(dtype)
    lowest = torch.finfo(dtype).min / 2  # a product that is added does not make it -inf
    return found.masked_fill_((found == NEVER) & (mask != NEVER), lowest)


def hide_band(scores: Tensor, lower: int | None, upper: int | None) -> None:
    """-inf outside the band of (b, h, q_len, kv_len) scores, in place; columns that all rows see are left alone."""
    import torch

    q_len, kv_len = scores.shape[2:]
    if upper is not None and upper < kv_len - 1:
        first = max(0, upper + 1)
        hidden = torch.ones(q_len, kv_len - first, dtype=torch.bool, device=scores.device).triu_(upper + 1 - first)
        scores[..., first:].masked_fill_(hidden, NEVER)
    if lower is not None and q_len - 1 + lower > 0:
        last = min(kv_len, q_len - 1 + lower)
        hidden = torch.ones(q_len, last, dtype=torch.bool, device=scores.device).tril_(lower - 1)
        scores[..., :last].masked_fill_(hidden, NEVER)


def softmax(scores: Tensor, see: bool) -> Tensor:
    """Along the keys, in place; a row that sees nothing becomes zeros."""
    import torch

    if see:
        return torch.softmax(scores, -1, out=scores)
    nothing = scores.amax(-1, keepdim=True) == NEVER
    torch.softmax(scores, -1, out=scores)
    if torch.compiler.is_compiling() or bool(nothing.any()):  # a graph has no branch by value
        scores.masked_fill_(nothing, 0.0)
    return scores


def finished(q: Tensor, v: Tensor, scores: Tensor, mask: Tensor | None, a: Arguments, half: bool = False) -> Any:
    """What a kernel returns, from its masked scores; half: the weights are rounded to v's dtype."""
    import torch

    v3 = v.reshape(scores.shape[0], v.shape[2], v.shape[3])
    lse = torch.logsumexp(scores, -1).float().view(q.shape[:3]) if a.lse else None
    weights = softmax(scores, all_rows_see(q.shape[2], v.shape[2], mask, a))
    if half:
        weights = scratch("weights", v3, tuple(weights.shape), v3.dtype).copy_(weights)
    out = unfold(torch.bmm(weights, v3), (*q.shape[:3], v.shape[3]))
    return out if lse is None else (out, lse)


def load_matmul() -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        q3, k3, _ = fold(q, k, v)
        half = mask is not None and q.itemsize == 2 and drowns_scores(mask, a.lower is not None or a.upper is not None)
        if half:
            q3, k3 = in_room("q", q3), in_room("k", k3)
        return finished(q, v, masked_scores(q, q3, k3, mask, a), mask, a, half)

    return run


def load_mixed() -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        q3, k3, _ = fold(q, k, v)
        return finished(q, v, masked_scores(q, in_room("q", q3), in_room("k", k3), mask, a), mask, a, half=True)

    return run


def load_shifted() -> Run:
    import torch

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        # A bf16 product loses what lies below 2^-8 of a score. The first one only finds each row's maximum m over the
        # visible keys; the second subtracts it inside the float32 accumulator, by one more column (-m against 1), so that
        # what is rounded is small where the weights are large: |t - (s - m)| <= 2^-8 |s - m|.
        q3, k3, _ = fold(q, k, v)
        unscaled = a._replace(scale=1.0)
        top = masked_scores(q, q3, k3, mask, unscaled).amax(-1, keepdim=True)
        top.masked_fill_(top == NEVER, 0.0)
        q1 = torch.cat([q3, top.neg_()], -1)
        k1 = torch.cat([k3, k3.new_ones(1, 1, 1).expand(*k3.shape[:2], 1)], -1)
        return finished(q, v, masked_scores(q, q1, k1, mask, a), mask, a)

    return run


def load_backward() -> Backward:
    """The gradients of a block: with P = softmax(S) and delta = rowsum(dO * O), dS = P * (dO V^T - delta).

    Without O delta is rowsum(P * dO V^T), the same.

    Scores, weights and dS are made in float32; P and dS are rounded to the input's dtype before their products, as in
    FlashAttention's backward (arXiv 2205.14135, algorithm 4).
    """
    import torch

    def backward(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor | None, grad: Tensor, a: Arguments
    ) -> tuple[Tensor, ...]:
        q3, k3, v3 = fold(q, k, v)
        is_half = q.dtype is not torch.promote_types(q.dtype, torch.float32)
        wide = torch.promote_types(q.dtype, torch.float32)
        grad3 = grad.reshape(*q3.shape[:2], v.shape[3])
        wide_q, wide_k = (in_room("q", q3), in_room("k", k3)) if is_half else (q3, k3)
        scores = masked_scores(q, wide_q, wide_k, mask, a)
        slope = None
        if a.softcap:  # d/ds of c tanh(s/c) is 1 - tanh^2; hidden keys have no weight whatever it says
            slope = 1 - (torch.bmm(wide_q, wide_k.mT).mul_(a.scale / a.softcap)).tanh_().square_()
        del wide_q, wide_k  # their memory is for dO and v
        weights = softmax(scores, all_rows_see(q.shape[2], k.shape[2], mask, a))
        half = scratch("weights", v3, tuple(weights.shape), v3.dtype).copy_(weights) if is_half else weights
        dv = torch.bmm(half.mT, grad3)
        del half  # its memory is for dS
        wide_grad, wide_v = (in_room("q", grad3), in_room("k", v3)) if is_half else (grad3, v3)
        raw = scratch("dscores", q3, (*q.shape[:3], k.shape[2]), wide)  # what a mask that is added to the scores gets
        dscores = raw.view(weights.shape)
        if out is None:
            torch.bmm(wide_grad, wide_v.mT, out=dscores)
            dscores.sub_(torch.linalg.vecdot(dscores, weights)[..., None])
        else:
            delta = torch.linalg.vecdot(wide_grad, out.reshape(grad3.shape).to(wide))
            torch.baddbmm(delta[..., None].expand_as(dscores), wide_grad, wide_v.mT, beta=-1, out=dscores)
        dscores.mul_(weights)
        inner = dscores if slope is None else dscores * slope
        half = scratch("weights", v3, tuple(weights.shape), v3.dtype).copy_(inner) if is_half else inner
        dq = torch.bmm(half, k3).mul_(a.scale)
        dk = torch.bmm(half.mT, q3).mul_(a.scale)
        return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape), raw

    return backward


NO_SIZE_ZERO = tuple(Range(field, min=1) for field in ("batch", "q_heads", "q_len", "kv_len", "head_dim"))

MATMUL = Kernel(
    name="matmul",
    summary="two matrix products and a softmax, in the input's dtype or in float32",
    load=load_matmul,
    corner="any",
    masks=("bool", "additive"),
    mask_and_causal=True,
    mask_grad=True,
    window=True,
    softcap=True,
    lse=True,
    fp32=True,
    output_lies="contiguous",
    twice_differentiable=True,
    tiles=True,
    chunks=True,
    load_backward=load_backward,
    needs=(OneOf("scale", ("positive", "negative")), *NO_SIZE_ZERO),  # alpha=0 leaves mkldnn's output unwritten
)
KERNELS = (
    MATMUL,
    MATMUL.replace(
        name="matmul_mixed", load=load_mixed, dtypes=("bfloat16",), fp32=False,
        summary="scores in float32, their product with v in bfloat16: what a fused kernel rounds",
    ),
    Kernel(
        name="matmul_shifted",
        summary="bfloat16 products, the row maximum subtracted inside the second one",
        load=load_shifted,
        dtypes=("bfloat16",),
        corner="any",
        masks=("bool",),
        mask_and_causal=True,
        grad=False,
        window=True,
        output_lies="contiguous",
        chunks=True,
        needs=(OneOf("scale", ("positive",)), *NO_SIZE_ZERO),
    ),
)  # fmt: skip
