"""Attention made of matrix products: on a CPU two plain products often beat a fused kernel.

The query group of GQA is folded into rows, so keys and values are never repeated. Forward only, but for sdpa_math.
"""

from __future__ import annotations

from fastattn.kernel import Arguments, Kernel, OneOf, Range, Run, Tensor, room


def fold(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(n, group * q_len, d), (n, kv_len, d), (n, kv_len, dv) of n = batch * kv_heads; views where strides allow."""
    b, kv_heads, kv_len, d = k.shape
    n = b * kv_heads
    rows = q.shape[1] // max(1, kv_heads) * q.shape[2]
    return q.reshape(n, rows, d), k.reshape(n, kv_len, d), v.reshape(n, kv_len, v.shape[3])


def in_room(name: str, x: Tensor) -> Tensor:
    """x in float32."""
    import torch

    return room(name, x, tuple(x.shape), torch.float32).copy_(x)


def masked_scores(q: Tensor, q3: Tensor, k3: Tensor, mask: Tensor | None, a: Arguments) -> Tensor:
    """(n, rows, kv_len) scale * q k^T + mask, -inf where a key is hidden; a mask is laid under the product, not added."""
    import torch

    n, rows, kv_len = q3.shape[0], q3.shape[1], k3.shape[1]
    scores = room("scores", q3, (n, rows, kv_len), q3.dtype)
    view = scores.view(*q.shape[:3], kv_len)
    if mask is None:
        torch.baddbmm(scores, q3, k3.mT, beta=0, alpha=a.scale, out=scores)
    else:
        view.copy_(mask if mask.dtype is not torch.bool else additive(mask, scores))
        scores.baddbmm_(q3, k3.mT, alpha=a.scale)
    hide_triangle(view, a.diagonal)
    return scores


def additive(mask: Tensor, like: Tensor) -> Tensor:
    """A bool mask as what is added to the scores."""
    return like.new_zeros(mask.shape).masked_fill_(mask.logical_not(), float("-inf"))


def hide_triangle(scores: Tensor, diagonal: int | None) -> None:
    """-inf above the diagonal of (b, h, q_len, kv_len) scores, in place; columns that all rows see are left alone."""
    import torch

    q_len, kv_len = scores.shape[2:]
    if diagonal is None or diagonal >= kv_len - 1:
        return
    first = max(0, diagonal + 1)
    hidden = torch.ones(q_len, kv_len - first, dtype=torch.bool, device=scores.device).triu_(diagonal + 1 - first)
    scores[..., first:].masked_fill_(hidden, float("-inf"))


def softmax(scores: Tensor, mask: Tensor | None, a: Arguments) -> Tensor:
    """Along the keys, in place; a row that sees nothing becomes zeros."""
    import torch

    if mask is None and (a.diagonal is None or a.diagonal >= 0):
        return torch.softmax(scores, -1, out=scores)
    nothing = scores.amax(-1, keepdim=True) == float("-inf")
    torch.softmax(scores, -1, out=scores)
    if torch.compiler.is_compiling() or bool(nothing.any()):  # a graph has no branch by value
        scores.masked_fill_(nothing, 0.0)
    return scores


def load_matmul() -> Run:
    import torch

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Tensor:
        q3, k3, v3 = fold(q, k, v)
        weights = softmax(masked_scores(q, q3, k3, mask, a), mask, a)
        return torch.bmm(weights, v3).view(*q.shape[:3], v.shape[3])

    return run


def load_mixed() -> Run:
    import torch

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Tensor:
        q3, k3, v3 = fold(q, k, v)
        weights = softmax(masked_scores(q, in_room("q", q3), in_room("k", k3), mask, a), mask, a)
        half = room("weights", v3, tuple(weights.shape), v3.dtype).copy_(weights)
        return torch.bmm(half, v3).view(*q.shape[:3], v.shape[3])

    return run


def load_shifted() -> Run:
    import torch

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Tensor:
        # A bf16 product loses what lies below 2^-8 of a score. The first one only finds each row's maximum m over the
        # visible keys; the second subtracts it inside the float32 accumulator, by one more column (-m against 1), so that
        # what is rounded is small where the weights are large: |t - (s - m)| <= 2^-8 |s - m|.
        q3, k3, v3 = fold(q, k, v)
        unscaled = a._replace(scale=1.0)
        top = masked_scores(q, q3, k3, mask, unscaled).amax(-1, keepdim=True)
        top.masked_fill_(top == float("-inf"), 0.0)
        q1 = torch.cat([q3, top.neg_()], -1)
        k1 = torch.cat([k3, k3.new_ones(1, 1, 1).expand(*k3.shape[:2], 1)], -1)
        weights = softmax(masked_scores(q, q1, k1, mask, a), mask, a)
        return torch.bmm(weights, v3).view(*q.shape[:3], v.shape[3])

    return run


def load_math() -> Run:
    import torch

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Tensor:
        dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
        q3, k3, v3 = (x.to(dtype) for x in fold(q, k, v))
        scores = (torch.bmm(q3, k3.mT) * a.scale).view(*q.shape[:3], k.shape[2])
        if mask is not None and mask.dtype is not torch.bool:
            scores = scores + mask
        hidden = mask.logical_not() if mask is not None and mask.dtype is torch.bool else None
        if a.diagonal is not None:
            above = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu_(a.diagonal + 1)
            hidden = above if hidden is None else hidden | above
        if hidden is not None:
            scores = scores.masked_fill(hidden, float("-inf"))
        nothing = (scores.detach() == float("-inf")).all(-1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(nothing, 0.0), -1).masked_fill(nothing, 0.0)
        out = torch.bmm(weights.view(*q3.shape[:2], k.shape[2]), v3)
        return out.view(*q.shape[:3], v.shape[3]).to(q.dtype)

    return run


NOT_EMPTY = tuple(Range(field, min=1) for field in ("batch", "q_heads", "q_len", "kv_len", "head_dim"))

KERNELS = (
    Kernel(
        name="matmul",
        summary="two matrix products and a softmax, in the input's dtype or in float32",
        load=load_matmul,
        corner="any",
        masks=("bool", "additive"),
        mask_and_causal=True,
        grad=False,
        fp32=True,
        chunks=True,
        reads=("precision",),
        needs=(OneOf("scale", ("positive", "negative")), *NOT_EMPTY),  # alpha=0 leaves mkldnn's output unwritten
    ),
    Kernel(
        name="matmul_mixed",
        summary="scores in float32, their product with v in bfloat16: what a fused kernel rounds",
        load=load_mixed,
        dtypes=("bfloat16",),
        corner="any",
        masks=("bool", "additive"),
        mask_and_causal=True,
        grad=False,
        chunks=True,
        reads=("precision",),
        needs=(OneOf("scale", ("positive", "negative")), *NOT_EMPTY),  # alpha=0 leaves mkldnn's output unwritten
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
        chunks=True,
        needs=(OneOf("scale", ("positive",)), *NOT_EMPTY),
    ),
    Kernel(
        name="sdpa_math",
        summary="exact math with float32 accumulation, in query chunks where memory is short: accepts every problem",
        load=load_math,
        devices=("cpu", "cuda"),
        corner="any",
        masks=("bool", "additive"),
        mask_and_causal=True,
        mask_grad=True,
        chunks=True,
        reads=("precision",),
    ),
)
