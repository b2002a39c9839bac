"""torch 2.13's flash and efficient ops: bshd; flash's corner is the bottom-right one, the efficient op is told which.

The efficient op's bottom-right triangle hides nothing with more queries than keys, and its backward knows no window.
"""

from __future__ import annotations

import torch

from stubs import INF, Stub, attend, band, check_aligned, check_half
from stubs.torch_cuda import HALF, LSE_WITH_MASK, check_bias, check_heads, padded_lse, private, torch_op


def run_flash(q, k, v, scale, is_causal, left, right, longest=None):
    """mha_fwd of flash_api.cpp on (b, s, h, d), and mha_varlen_fwd, whose seqlen_k is the longest."""
    check_half(q, k, v)
    check_aligned(q, k, v)
    assert q.shape[3] == k.shape[3] == v.shape[3] <= 256 and q.shape[3] % 8 == 0 and q.shape[2] % k.shape[2] == 0
    q_len, kv_len = q.shape[1], k.shape[1]
    assert q.shape[0] and (q_len and kv_len or longest)
    longest = kv_len if longest is None else longest
    left, right = (-1 if n >= longest else n for n in (left, right))
    right = 0 if is_causal and q_len > 1 else right
    visible = band(q_len, kv_len, None if left < 0 else left, None if right < 0 else right, kv_len - q_len)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    out, lse = attend(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale, visible=visible, empty_lse=INF)
    return out.transpose(1, 2).contiguous(), lse


@torch_op("_flash_attention_forward")
def flash(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, scale, window_size_left,
          window_size_right, **others):  # fmt: skip
    assert cum_seq_q is None and cum_seq_k is None and (max_q, max_k) == (query.shape[1], key.shape[1])
    assert not any(others.values())
    left, right = (-1 if n is None else n for n in (window_size_left, window_size_right))
    out, lse = run_flash(query, key, value, scale, is_causal, left, right)
    return out, lse, None, None, None


class NoWindowInBackward(torch.autograd.Function):
    """The values of one tensor, the gradients of another."""

    @staticmethod
    def forward(ctx, values, gradients):
        return values.detach().clone()

    @staticmethod
    def backward(ctx, grad):
        return None, grad


@torch_op("_efficient_attention_forward")
def efficient(query, key, value, bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, custom_mask_type,
              compute_log_sumexp, scale, seqlen_k, window_size):  # fmt: skip
    assert query.dtype in (*HALF, torch.float32) and query.dtype is key.dtype is value.dtype
    check_aligned(query, key, value)
    (b, q_len, h, _), kv_len = query.shape, key.shape[1]
    check_heads(h, key.shape[2], value.shape[2])
    assert query.numel() and key.numel()
    assert query.shape[3] * query.itemsize % 16 == value.shape[3] * value.itemsize % 16 == 0 and custom_mask_type in (
        0,
        1,
        2,
    )
    given = (query, key, value) if bias is None else (query, key, value, bias)
    needs_grad = any(x.requires_grad for x in given)
    assert compute_log_sumexp or not needs_grad, "the backward needs it"
    if bias is not None:
        check_bias(bias, query, (b, h, q_len, kv_len))
    at = kv_len - q_len if custom_mask_type == 2 else 0
    right = None if custom_mask_type == 0 or at < 0 else 0
    left = None
    if window_size:
        assert custom_mask_type, "custom_mask_type not supported"
        assert q_len <= kv_len, "rows whose tile has no key are not written"
        left = window_size - 1
    scale = query.shape[3] ** -0.5 if scale is None else scale

    def compute(left):
        visible = band(q_len, kv_len, left, right, at)
        wide = (x.transpose(1, 2) for x in (query, key, value))
        return attend(*wide, scale=scale, visible=visible, bias=bias, empty_lse=0.0)

    out, lse = compute(left)
    if left is not None and needs_grad:
        out = NoWindowInBackward.apply(out, compute(None)[0])
    return out.transpose(1, 2).contiguous(), padded_lse(lse, compute_log_sumexp), None, None, q_len, kv_len


STUB = Stub(
    file="torch_lower",
    library="torch",
    version=torch.__version__,
    patch=private({"cuda_flash_forward": flash, "cuda_efficient_forward": efficient}),
    refuses={
        "aten_flash": "top_left_wide top_left_tall softcap scale_zero scale_negative bool_mask bool_mask_keys float_mask"
        " mask_and_causal mask_grad float32 lse_mask lse_zero lse_mask_and_window window_top_left_tall",
        "aten_efficient": "softcap bottom_right_tall window window_left window_right window_tall window_left_past_keys"
        " lse_empty_rows grad_bottom_right grad_window window_top_left_tall",
    },
    cases={
        **LSE_WITH_MASK,
        "grad_window": {"window": (3, 0), "is_causal": True, "grad": True},
        "window_top_left_tall": {"sq": 19, "skv": 5, "window": (3, 0), "is_causal": True},
    },
    mutations=(
        ("is_causal=right == 0", "is_causal=True"),
        ("window_size_left=left", "window_size_left=left + 1"),
        ("window_size_right=right", "window_size_right=-1"),
        ("return_debug_mask=False, scale=a.scale", "return_debug_mask=False"),
        ("scale=a.scale, compute_log_sumexp", "compute_log_sumexp"),
        ("-1 if n is None else n", "n if n is None else n + 1"),
        ("return lse.masked_fill(lse == INF, -INF)", "return lse"),
        ("lse[..., :s].detach()", "lse.detach()"),
        ("0 if a.upper is None else 1 if a.upper == 0 else 2", "0 if a.upper is None else 1"),
        ("0 if a.upper is None else 1 if a.upper == 0 else 2", "0 if a.upper is None else 2"),
        ("a.upper - a.lower + 1", "a.upper - a.lower"),
        ("a.upper - a.lower + 1", "a.upper - a.lower + 2"),
        ("compute_log_sumexp=a.needs_grad or a.lse", "compute_log_sumexp=a.lse"),
        ("compute_log_sumexp=a.needs_grad or a.lse", "compute_log_sumexp=a.needs_grad"),
        ("as_bias(mask, q, (b, h, s, kv_len))", "mask"),
        ('p.causal == "bottom_right" and p.q_len > p.kv_len', "False"),
        ("bool(p.window and p.causal is None and p.window[1] != 0)", "False"),
        ("bool(p.window and p.q_len > p.kv_len)", "False"),
        ("bool(p.window and p.needs_grad)", "False"),
        ("sees_nothing(mask, s, kv_len, a.lower, a.upper)", "sees_nothing(mask, s, kv_len)"),
        ("lse.masked_fill(sees_nothing(mask, s, kv_len, a.lower, a.upper), -INF)", "lse"),
        ("lse.masked_fill(sees_nothing(mask, s, kv_len, a.lower, a.upper), -INF)", "lse.masked_fill(lse == 0, -INF)"),
        ('corner="bottom_right"', 'corner="top_left"'),
        ('layout="bshd"', 'layout="bhsd"'),
        ("equal_head_dims=True", "equal_head_dims=False"),
        ("head_dim_multiple=8", "head_dim_multiple=1"),
        ("head_dim_bytes=16", "head_dim_bytes=1"),
        ("aligned=True", "aligned=False"),
        ('gqa="2.14"', "gqa=True"),
    ),
)
