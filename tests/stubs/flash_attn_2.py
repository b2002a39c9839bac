"""FlashAttention 2.8: bshd, bottom-right corner, -1 for no limit, a log-sum-exp of +inf where nothing is visible."""

from __future__ import annotations

from stubs import INF, Stub, attend, band, check_aligned, check_half, module, signed


@signed("flash_attn_2", "flash_attn_func")
def flash_attn_func(
    q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
):
    check_half(q, k, v)
    check_aligned(q, k, v)
    assert q.shape[3] == k.shape[3] == v.shape[3] <= 256 and q.shape[2] % k.shape[2] == 0 and q.shape[0] > 0
    assert dropout_p == 0.0 and alibi_slopes is None
    q_len, kv_len = q.shape[1], k.shape[1]
    left, right = window_size
    right = 0 if causal else right
    left = -1 if left >= kv_len else left  # flash_api.cpp: a window as long as the keys is none
    right = -1 if right >= kv_len else right
    visible = band(q_len, kv_len, None if left < 0 else left, None if right < 0 else right, kv_len - q_len)
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
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
        ("-1 if right is None else right", "-1 if right is None else right + 1"),
        ("softmax_scale=a.scale", "softmax_scale=None"),
        ("softcap=a.softcap", "softcap=0.0"),
        ("lse.masked_fill(lse == INF, -INF)", "lse"),
        ('layout="bshd"', 'layout="bhsd"'),
        ('corner="bottom_right"', 'corner="top_left"'),
        ("aligned=True", "aligned=False"),
        ("equal_head_dims=True", "equal_head_dims=False"),
        ("dense_last_dim=True", "dense_last_dim=False"),
    ),
)
