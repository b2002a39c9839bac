"""FlashAttention 2.8: bshd, bottom-right corner, -1 for no limit, a log-sum-exp of +inf where nothing is visible."""

from __future__ import annotations

from stubs import INF, Stub, attend, band, check_aligned, check_half, module, signed


@signed("flash_attn_2", "flash_attn_func")
def flash_attn_func(
    q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
):
    check_half(q, k, v)
    check_aligned(q, k, v)
    assert q.shape[3] == k.shape[3] == v.shape[3] <= 256 and k.shape[1:3] == v.shape[1:3]
    assert q.shape[2] % k.shape[2] == 0 and q.shape[0] > 0 and dropout_p == 0.0 and alibi_slopes is None
    q_len, kv_len = q.shape[1], k.shape[1]
    assert q_len and kv_len
    left, right = (-1 if side >= kv_len else side for side in window_size)  # flash_api.cpp: as long as the keys is none
    right = 0 if causal and q_len > 1 else right
    left = kv_len if left < 0 <= right else left
    right = kv_len if right < 0 <= left else right
    visible = None if left < 0 else band(q_len, kv_len, left, right, kv_len - q_len)
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    assert scale > 0  # a row's maximum is taken before it is scaled
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = attend(q, k, v, scale=scale, visible=visible, softcap=softcap, empty_lse=INF)
    out = out.transpose(1, 2).contiguous()
    return (out, lse, None) if return_attn_probs else out


STUB = Stub(
    file="flash_attn_2",
    library="flash-attn",
    version="2.8.3",
    modules=lambda: {"flash_attn": module("flash_attn", flash_attn_func=flash_attn_func)},
    refuses={
        "flash_attn_2": "top_left_wide top_left_tall scale_zero scale_negative bool_mask bool_mask_keys float_mask"
        " mask_and_causal mask_grad float32",
    },
    mutations=(
        ("causal=right == 0", "causal=False"),
        ("causal=right == 0", "causal=True"),
        ("-1 if left is None else left", "-1 if left is None else left + 1"),
        ("right or -1", "-1"),
        ("right or -1", "(right or 0) - 1"),
        ("softmax_scale=a.scale", "softmax_scale=None"),
        ('OneOf("scale", ("positive",))', 'OneOf("scale", ("positive", "negative"))'),
        ("softcap=a.softcap", "softcap=0.0"),
        ("lse.masked_fill(lse == INF, -INF)", "lse"),
        ('layout="bshd"', 'layout="bhsd"'),
        ('corner="bottom_right"', 'corner="top_left"'),
        ('corner="bottom_right"', 'corner="any"'),
        ('("float16", "bfloat16")', '("float16", "bfloat16", "float32")'),
        ("window=True", "window=False"),
        ("softcap=True", "softcap=False"),
        ("aligned=True", "aligned=False"),
        ("equal_head_dims=True", "equal_head_dims=False"),
        ("dense_last_dim=True", "dense_last_dim=False"),
    ),
)
