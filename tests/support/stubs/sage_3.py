"""SageAttention 3: HND, takes the mean off the caller's k, one scale, and the causal corner of lengths padded to 128."""

from __future__ import annotations

from stubs import Stub, attend, band, check_aligned, check_half, module, signed


@signed("sageattention", "sageattn3_blackwell")
def sageattn3_blackwell(q, k, v, attn_mask, is_causal, per_block_mean, kwargs):
    assert not kwargs, "swallowed"
    check_half(q, k, v)
    assert q.shape[3] == k.shape[3] == v.shape[3] and q.shape[3] in (64, 128), f"Unsupported head dim: {q.shape[3]}"
    assert q.shape[1] == k.shape[1] == v.shape[1], "We do not support MQA/GQA yet"
    if v.is_contiguous() and v.shape[2] % 128 == 0:  # what is padded or not contiguous is copied
        check_aligned(v)
    k -= k.mean(dim=-2, keepdim=True)
    q_len, kv_len = (-(-x.shape[2] // 128) * 128 for x in (q, k))
    visible = band(q_len, kv_len, None, 0, kv_len - q_len)[: q.shape[2], : k.shape[2]] if is_causal else None
    assert q.abs().max() > 0, "the quantiser divides by the largest"
    return attend(q, k, v, scale=q.shape[3] ** -0.5, visible=visible)[0]


STUB = Stub(
    file="sageattention",
    library="sageattn3",
    version="1.0.0",
    modules=lambda: {"sageattn3": module("sageattn3", sageattn3_blackwell=sageattn3_blackwell)},
    capability=120,
    kernels=("sage_3",),
    sizes={"d": 64, "sq": 128},
    copies=("sage_3",),
    refuses={
        "sage_3": "top_left_wide top_left_tall bottom_right_wide bottom_right_tall window window_left window_right window_self"
        " window_causal window_wide window_tall window_left_past_keys softcap scale_zero lse lse_empty_rows lse_scale bool_mask"
        " bool_mask_keys float_mask mask_and_causal mask_grad grad grad_causal grad_bottom_right grad_head_dim float32",
    },
    cases={"head_dim_120": {"d": 120, "sq": 19}, "head_dim_v_128": {"d": 64, "dv": 128, "sq": 19}},
    mutations=(
        ("k=k.clone()", "k=k"),
        ("q = q if abs(more - 1) < 1e-6 else q * more", "pass"),
        ("a.scale * q.shape[3] ** 0.5", "a.scale * 8"),
        ("is_causal=a.upper == 0", "is_causal=False"),
        ("is_causal=a.upper == 0", "is_causal=True"),
        ('layout="bhsd"', 'layout="bshd"'),
        ('corner="square"', 'corner="bottom_right"'),
        ('corner="square"', 'corner="top_left"'),
        ("gqa=False", "gqa=True"),
        ("aligned=True", "aligned=False"),
        ("head_dim_multiple=64", "head_dim_multiple=32"),
        ("equal_head_dims=True", "equal_head_dims=False"),
        ('OneOf("scale", ("positive", "negative"))', 'OneOf("scale", ("positive", "negative", "zero"))'),
    ),
)
