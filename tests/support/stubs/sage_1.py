"""SageAttention 1.0.6: takes the mean off the caller's k, and where not causal the tail of 64 keys scores 0."""

from __future__ import annotations

import torch

from stubs import Stub, attend, band, module, signed


@signed("sageattention", "sageattn")
def sageattn(q, k, v, tensor_layout, is_causal, sm_scale, smooth_k, kwargs):
    assert not kwargs, "swallowed"
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16, torch.float32)
    assert q.shape[3] == k.shape[3] == v.shape[3] and q.shape[3] in (64, 96, 128)
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    assert tensor_layout in ("HND", "NHD")
    heads, rows = (1, 2) if tensor_layout == "HND" else (2, 1)
    if smooth_k:
        k -= k.mean(dim=rows, keepdim=True)
    scale = q.shape[3] ** -0.5 if sm_scale is None else sm_scale
    assert scale != 0, "the quantiser divides by the largest"
    q, k, v = (x.permute(0, heads, rows, 3) for x in (q, k, v))
    q_len, kv_len = q.shape[2], k.shape[2]
    if is_causal:
        assert q_len == kv_len, "qo_len and kv_len must be equal for causal attention"
        out, _ = attend(q, k, v, scale=scale, visible=band(q_len, kv_len, None, 0, 0))
    else:
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, -kv_len % 64)) for x in (k, v))
        out, _ = attend(q, k, v, scale=scale)
    return out.permute(0, heads, rows, 3).contiguous()


STUB = Stub(
    file="sageattention",
    library="sageattention",
    version="1.0.6",
    modules=lambda: {"sageattention": module("sageattention", sageattn=sageattn)},
    kernels=("sage_1",),
    sizes={"d": 64, "sq": 64},
    refuses={
        "sage_1": "wide tall one_key top_left_wide top_left_tall bottom_right_wide bottom_right_tall decode window window_left"
        " window_right window_self window_causal window_wide window_tall window_left_past_keys softcap gqa_decode head_dim_20"
        " head_dim_v head_dim_v_small scale_zero lse lse_empty_rows lse_scale bool_mask bool_mask_keys float_mask"
        " mask_and_causal mask_grad grad grad_causal grad_bottom_right grad_head_dim bshd sbhd packed keys_96",
    },
    cases={
        "keys_96": {"skv": 96},
        "causal_off_tile": {"sq": 33, "is_causal": True},
        "head_dim_40": {"d": 40},
        "head_dim_120": {"d": 120, "dv": 64},
    },
    mutations=(
        ('{"k": k - k.mean(dim=1, keepdim=True), "smooth_k": False}', '{"k": k, "smooth_k": True}'),
        ("sm_scale=a.scale)", "sm_scale=None)"),
        ("is_causal=a.upper == 0", "is_causal=False"),
        ("is_causal=a.upper == 0", "is_causal=True"),
        ('**keys, tensor_layout="NHD"', '**keys, tensor_layout="HND"'),
        ("p.kv_len % 64 != 0", "p.kv_len % 32 != 0"),
        ("p.kv_len % 64 != 0", "False"),
        ("p.causal is None and p.kv_len", "p.kv_len"),
        ('corner="square"', 'corner="top_left"'),
        ('corner="square"', 'corner="bottom_right"'),
        ("head_dim_multiple=32", "head_dim_multiple=16"),
        ('Range("head_dim", min=33, max=128)', 'Range("head_dim", min=1, max=128)'),
        ("equal_head_dims=True", "equal_head_dims=False"),
        ("dense_last_dim=True", "dense_last_dim=False"),
        ('dtypes=("float16", "bfloat16", "float32")', 'dtypes=("float16", "bfloat16")'),
        ("grad=False", "grad=True"),
        ('OneOf("scale", ("positive", "negative"))', 'OneOf("scale", ("positive", "negative", "zero"))'),
    ),
)
