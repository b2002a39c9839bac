"""FlashAttention 4: bshd, bottom-right corner, None for no limit; -1 on one side is a limit. Always (out, lse)."""

from __future__ import annotations

from stubs import Stub, attend, band, check_aligned, check_half, module, signed


@signed("flash_attn_4", "flash_attn_func")
def flash_attn_func(
    q, k, v, softmax_scale, causal, window_size, softcap, num_splits, deterministic, return_lse, **others
):
    check_half(q, k, v)
    check_aligned(q, k, v)  # b36 copies what is not; the betas before August 2026 did not look
    assert num_splits == 1 and not any(others.values())
    d, dv, (q_len, kv_len) = q.shape[3], v.shape[3], (q.shape[1], k.shape[1])
    assert d % 8 == dv % 8 == 0 and 8 <= d <= 256 and 8 <= dv <= 256 and k.shape == (*v.shape[:3], d)
    assert q.shape[2] % k.shape[2] == 0
    is_training = any(x.requires_grad for x in (q, k, v))
    assert not is_training or q.shape[2] == k.shape[2] or d == dv, "GQA backward requires head_dim == head_dim_v"
    left, right = window_size
    if left is not None and right is not None and left < 0 and right < 0:
        left = right = None
    right = 0 if causal else right
    visible = band(q_len, kv_len, left, right, kv_len - q_len)
    scale = d**-0.5 if softmax_scale is None else softmax_scale
    assert scale > 0  # a row's maximum is taken before it is scaled
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = attend(q, k, v, scale=scale, visible=visible, softcap=softcap)
    return out.transpose(1, 2).contiguous(), lse if return_lse or is_training else None


STUB = Stub(
    file="flash_attn_4",
    library="flash-attn-4",
    version="4.0.0b36",
    modules=lambda: {
        "flash_attn": module("flash_attn"),
        "flash_attn.cute": module("flash_attn.cute", flash_attn_func=flash_attn_func),
    },
    refuses={
        "flash_attn_4": "top_left_wide top_left_tall scale_zero scale_negative bool_mask bool_mask_keys float_mask"
        " mask_and_causal mask_grad float32",
    },
    mutations=(
        ("causal=right == 0", "causal=False"),
        ("causal=right == 0", "causal=True"),
        ("(left, right or None)", "(-1 if left is None else left, right or None)"),
        ("(left, right or None)", "(left, right or -1)"),
        ("(left, right or None)", "(left, None)"),
        ("(left, right or None)", "(None if left is None else left + 1, right or None)"),
        ("softmax_scale=a.scale", "softmax_scale=None"),
        ('OneOf("scale", ("positive",))', 'OneOf("scale", ("positive", "negative"))'),
        ("softcap=a.softcap", "softcap=0.0"),
        ("return_lse=a.lse", "return_lse=False"),
        ("(out, lse.detach()) if a.lse else out", "out, lse"),
        ('layout="bshd"', 'layout="bhsd"'),
        ('corner="bottom_right"', 'corner="top_left"'),
        ('corner="bottom_right"', 'corner="any"'),
        ("head_dim_multiple=8", "head_dim_multiple=1"),
        ("aligned=True", "aligned=False"),
        ("dense_last_dim=True", "dense_last_dim=False"),
        ('("float16", "bfloat16")', '("float16", "bfloat16", "float32")'),
        ("window=True", "window=False"),
        ("softcap=True", "softcap=False"),
    ),
)
