"""NATTEN 0.21.6: bshd, the top-left corner, `scale or default`, a log-sum-exp (b, s, h), and each backend's own limits."""

from __future__ import annotations

import torch

from stubs import Stub, attend, band, module, signed

CAPABILITIES = {"natten_cutlass": 86, "natten_hopper": 90, "natten_blackwell": 100}


@signed("natten", "attention")
def attention(query, key, value, is_causal, scale, backend, backward_kv_splits, return_lse, **others):
    assert all(others[name] is None for name in others if "seqlen" in name)
    q, k, v = query, key, value
    half = (torch.float16, torch.bfloat16)
    width, width_v = q.shape[3], v.shape[3]
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if backend == "cutlass-fmha":
        assert q.dtype in (*half, torch.float32) and width % 8 == width_v % 8 == 0
    elif backend == "hopper-fmha":
        assert q.dtype in half and width == width_v and width in (32, 64, 128, 256) and not (trains and width == 256)
        assert not (trains and torch.are_deterministic_algorithms_enabled()) and backward_kv_splits is None
    else:
        assert backend == "blackwell-fmha" and q.dtype in half and width == width_v <= 128 and width % 8 == 0
        assert backward_kv_splits is None
    assert q.shape[2] % k.shape[2] == 0 and q.shape[0] == k.shape[0]
    for x in (q, k, v):
        assert x.contiguous().data_ptr() % 16 == 0, "misaligned address"
    scale = scale or width**-0.5
    visible = band(q.shape[1], k.shape[1], None, 0 if is_causal else None, 0)
    out, lse = attend(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale, visible=visible)
    out = out.transpose(1, 2).contiguous()
    return (out, lse.transpose(1, 2).contiguous()) if return_lse else out


BANDS = "bottom_right_wide bottom_right_tall window window_left window_right window_self window_causal window_wide window_tall"
MORE = " window_left_past_keys softcap scale_zero scale_negative lse_empty_rows grad_bottom_right"
REFUSED = BANDS + MORE + " bool_mask bool_mask_keys float_mask mask_and_causal mask_grad"
STUB = Stub(
    file="natten",
    library="natten",
    version="0.21.6",
    modules=lambda: {"natten": module("natten", attention=attention, HAS_LIBNATTEN=True)},
    capabilities=CAPABILITIES,
    sizes={"d": 32},
    cases={
        "lse_grad": {"return_lse": True, "grad": True},
        "misaligned_bshd": {"memory": "misaligned", "layout": "bshd"},
        "head_dim_v_64": {"d": 32, "dv": 64},
    },
    refuses={"natten_cutlass": REFUSED, "natten_hopper": REFUSED + " float32", "natten_blackwell": REFUSED + " float32"},
    mutations=(
        ("is_causal=a.upper is not None", "is_causal=False"),
        ("is_causal=a.upper is not None", "is_causal=True"),
        ("scale=a.scale", "scale=None"),
        ('OneOf("scale", ("positive",))', 'OneOf("scale", ("positive", "zero"))'),
        ("lse.detach().transpose(1, 2)", "lse.detach()"),
        ('layout="bshd"', 'layout="bhsd"'),
        ('corner="top_left"', 'corner="bottom_right"'),
        ("dense=True, aligned=True", "dense=True"),
        ('"float32"), head_dim_multiple=8', '"float32")'),
        ("head_dim_multiple=32", "head_dim_multiple=8"),
        ("head_dim_multiple=32, equal_head_dims=True", "head_dim_multiple=32, equal_head_dims=False"),
        ("head_dim_multiple=8, equal_head_dims=True", "head_dim_multiple=8, equal_head_dims=False"),
        ("dtypes=HALF, head_dim_multiple=32", 'dtypes=(*HALF, "float32"), head_dim_multiple=32'),
        ('"hopper-fmha"', '"cutlass-fmha-of-hopper"'),
    ),
)  # fmt: skip
