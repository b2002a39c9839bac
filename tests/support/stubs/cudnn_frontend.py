"""nvidia-cudnn-frontend 1.32: bhsd, either corner, a left bound that counts the query's own key."""

from __future__ import annotations

from stubs import Stub, attend, band, check_aligned, check_half, module, signed


@signed("cudnn_frontend", "sdpa")
def sdpa(query, key, value, scale, is_causal, causal_bottom_right, window_left, window_right, return_lse, **others):
    assert not any(x is not None and x != 0 for x in others.values())
    check_half(query, key, value)
    check_aligned(query, key, value)
    q_len, kv_len, head_dim = query.shape[2], key.shape[2], query.shape[3]
    assert head_dim % 8 == value.shape[3] % 8 == 0 and query.shape[1] % key.shape[1] == 0 and (q_len, kv_len) != (1, 1)
    if causal_bottom_right and not (is_causal or window_left >= 0 or window_right >= 0):
        raise ValueError("causal_bottom_right only re-anchors an active diagonal band")
    if is_causal and window_right > 0:
        raise ValueError("is_causal masks every future column")
    right = window_right if window_right >= 0 else 0 if is_causal else None
    left = window_left if window_left >= 0 else None
    assert left is None or left > 0, "Left bound (Sliding window length) should be greater than zero when set."
    assert left is None or right is not None, "Left and right bounds: the diagonal alignment must be set."
    assert left is None or q_len <= kv_len, "Sliding window attention is only supported with max_s_q <= max_s_kv."
    assert not causal_bottom_right or q_len <= kv_len, "Bottom right causal mask does not support max_s_q > max_s_kv."
    needs_grad = any(x.requires_grad for x in (query, key, value))
    assert return_lse or not needs_grad, "cudnn::sdpa_fwd autograd requires return_lse=True"
    at = kv_len - q_len if causal_bottom_right else 0
    visible = band(q_len, kv_len, None if left is None else left - 1, right, at)
    scale = head_dim**-0.5 if scale is None else scale
    out, lse = attend(query, key, value, scale=scale, visible=visible)
    order = sorted(range(4), key=lambda i: (-query.stride(i), i))  # O adopts Q's layout
    out = out.permute(order).contiguous().permute([order.index(i) for i in range(4)])
    return (out, lse[..., None]) if return_lse else out


STUB = Stub(
    file="cudnn_frontend",
    library="nvidia-cudnn-frontend",
    version="1.32.0",
    modules=lambda: {"cudnn": module("cudnn", sdpa_torch=sdpa)},
    cases={
        "window_left_wide": {"sq": 5, "skv": 19, "window": (3, 1)},
        "window_as_wide_as_the_corner": {"sq": 5, "skv": 7, "window": (3, 2)},
        "window_top_left_tall": {"sq": 19, "skv": 5, "window": (3, 0), "is_causal": True},
        "lse_grad": {"return_lse": True, "grad": True},
        "grad_window": {"window": (3, 0), "is_causal": True, "grad": True},
    },
    refuses={
        "cudnn_frontend": "one_key bottom_right_tall window_left window_tall window_left_past_keys softcap scale_zero"
        " scale_negative lse_empty_rows bool_mask bool_mask_keys float_mask mask_and_causal mask_grad grad_bottom_right"
        " float32 window_top_left_tall",
    },
    mutations=(
        ("is_causal=right == 0", "is_causal=True"),
        ("causal_bottom_right=is_bottom_right", "causal_bottom_right=False"),
        ("origin - a.lower + 1", "origin - a.lower"),
        ("origin - a.lower + 1", "origin - a.lower + 2"),
        ("origin = corner if is_bottom_right else 0", "origin = corner"),
        ("a.upper - origin\n", "0\n"),
        ("            scale=a.scale,\n", ""),
        ("return_lse=a.lse or a.needs_grad,", "return_lse=a.lse,"),
        ("lse.detach().squeeze(-1)", "lse.detach()"),
        ('p.causal == "bottom_right" and p.q_len > p.kv_len', "False"),
        ("bool(p.window and p.q_len > p.kv_len)", "False"),
        ("bool(p.window and p.causal is None and p.window[1] < 0)", "False"),
        ('corner="any"', 'corner="top_left"'),
        ("head_dim_multiple=8", "head_dim_multiple=1"),
        ("aligned=True", "aligned=False"),
        ('Range("kv_len", min=2)', 'Range("kv_len", min=1)'),
        ('dtypes=("float16", "bfloat16")', 'dtypes=("float16", "bfloat16", "float32")'),
    ),
)
