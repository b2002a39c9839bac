"""FlashInfer's prefill of one request, 0.6.13: no batch, a log-sum-exp in base 2, hidden scores of -5e4."""

from __future__ import annotations

import math

import torch

from stubs import Stub, attend, band, check_aligned, check_half, module, signed

HEAD_DIMS = ((64, 64), (128, 128), (256, 256), (192, 128))


def one_request(q, k, v, backend, causal, window_left, softcap, scale, mask=None):
    """(out, lse in base 2) of (tokens, heads, head_dim). A mask takes the place of the triangle, not of the window."""
    check_half(q, k, v)
    check_aligned(q, k, v)
    assert q.dim() == k.dim() == v.dim() == 3 and (q.shape[2], v.shape[2]) in HEAD_DIMS and k.shape[2] == q.shape[2]
    assert q.shape[1] % k.shape[1] == 0 and k.shape[:2] == v.shape[:2]
    assert not any(x.requires_grad for x in (q, k, v)), "Can't export tensors that require gradient"
    q_len, kv_len = q.shape[0], k.shape[0]
    scale = q.shape[2] ** -0.5 if scale is None else scale
    assert scale > 0, "the maximum is taken before the scale"
    if mask is not None:
        assert backend == "fa2" and mask.dtype is torch.bool and mask.shape == (q_len, kv_len)
        causal = False
    assert backend != "cutlass" or q.shape[2] != 256, "Unsupported head dimensions"
    if causal and kv_len < q_len and backend == "fa2":
        raise RuntimeError("When mask_mode is set to MaskMode::kCausal, kv_len must be greater than or equal to qo_len")
    visible = band(q_len, kv_len, window_left if window_left >= 0 else None, 0 if causal else None, kv_len - q_len)
    visible = visible if mask is None else visible & mask
    visible = visible | ~visible.any(1, keepdim=True)  # all scores are the sentinel: a mean
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out, lse = attend(q, k, v, scale=scale, visible=visible, softcap=softcap or 0.0)
    return out[0].transpose(0, 1).contiguous(), lse[0].T.contiguous() / math.log(2)


@signed("flashinfer", "single_prefill_with_kv_cache")
def single_prefill_with_kv_cache(
    q, k, v, causal, kv_layout, pos_encoding_mode, use_fp16_qk_reduction, sm_scale, window_left, logits_soft_cap, backend,
    return_lse, custom_mask, **more,
):  # fmt: skip
    assert all(value is None for value in more.values()) and pos_encoding_mode == "NONE" and not use_fp16_qk_reduction
    assert backend in ("fa2", "fa3") and kv_layout in ("NHD", "HND")
    if kv_layout == "HND":
        assert backend == "fa2", "csrc/single_prefill_sm90.cu takes k.size(0) for the length"
        k, v = k.transpose(0, 1), v.transpose(0, 1)
    out, lse = one_request(q, k, v, backend, causal, window_left, logits_soft_cap, sm_scale, custom_mask)
    return (out, lse) if return_lse else out


REFUSES = (
    "top_left_wide top_left_tall bottom_right_tall window window_right window_tall window_left_past_keys lse_empty_rows"
    " head_dim_20 head_dim_v head_dim_v_small scale_zero scale_negative bool_mask bool_mask_keys float_mask mask_and_causal"
    " mask_grad grad grad_causal grad_bottom_right grad_head_dim packed float32 head_dim_192 head_dim_v_64"
)
CASES = {
    "head_dim_192_128": {"d": 192, "dv": 128, "is_causal": True},
    "head_dim_192": {"d": 192},
    "head_dim_v_64": {"d": 128, "dv": 64},
    "lse_softcap_window": {"return_lse": True, "softcap": 2.0, "window": (3, 0), "is_causal": True},
    "head_dim_256": {"d": 256},
}
MUTATIONS = (
    ("right == 0", "False"),
    ("right == 0", "True"),
    ("-1 if left is None else left", "-1"),
    ("-1 if left is None else left", "-1 if left is None else left + 1"),
    ("a.softcap, a.scale)", "None, a.scale)"),
    ("a.softcap, a.scale)", "a.softcap, None)"),
    ("a.softcap, a.scale)", "a.scale, a.softcap)"),
    (" * math.log(2)", ""),
    (".transpose(1, 2) * math", " * math"),
    ("return_lse=a.lse", "return_lse=False"),
    ('layout="bshd"', 'layout="bhsd"'),
    ('corner="bottom_right"', 'corner="top_left"'),
    ('corner="bottom_right"', 'corner="any"'),
    ("p.window[1] > 0", "False"),
    ("p.window[1] > 0", "p.window[1] >= 0"),
    ("p.q_len > p.kv_len", "False"),
    ("p.head_dim_v != (128", "p.head_dim_v == (128"),
    ("(64, 128, 192, 256)", "(64, 128, 256)"),
    ("p.head_dim_v != (128 if p.head_dim == 192 else p.head_dim)", "False"),
    ('OneOf("scale", ("positive",))', 'OneOf("scale", ("positive", "negative", "zero"))'),
    ("aligned=True", "aligned=False"),
    ("dense_last_dim=True", "dense_last_dim=False"),
    ("softcap=FA[0] in more", "softcap=False"),
    ("window=FA[0] in more", "window=False"),
    ("grad=False", "grad=True"),
)

MASKED = {
    "mask_rows_and_lse": {"mask": ("11qk", torch.bool), "skv": 33, "return_lse": True},
    "mask_of_queries": {"mask": ("11q1", torch.bool), "skv": 33},
    "tall_mask_and_causal": {"sq": 19, "skv": 5, "mask": ("11qk", torch.bool), "is_causal": True},
    "float_mask_for_all": {"mask": ("11qk", None), "skv": 33},
}
TAKEN = ("top_left_wide", "top_left_tall", "bool_mask_keys", "mask_and_causal")

STUB = Stub(
    file="flashinfer",
    library="flashinfer-python",
    version="0.6.13",
    modules=lambda: {"flashinfer": module("flashinfer", single_prefill_with_kv_cache=single_prefill_with_kv_cache)},
    kernels=("flashinfer_single_fa3", "flashinfer_single_fa2"),
    sizes={"b": 1},
    refuses={
        "flashinfer_single_fa3": f"{REFUSES} batch_of_two {' '.join(MASKED)}",
        "flashinfer_single_fa2": " ".join(
            c for c in f"{REFUSES} batch_of_two float_mask_for_all".split() if c not in TAKEN
        ),
    },
    cases={**CASES, **MASKED, "batch_of_two": {"b": 2}},
    mutations=(
        *MUTATIONS,
        ('OneOf("batch", (1,))', 'OneOf("batch", (1, 2))'),
        ('kv_layout="NHD", backend=backend, return_lse', 'kv_layout="HND", backend=backend, return_lse'),
        ("custom_mask=seen", "custom_mask=None"),
        (".expand(q.shape[1], k.shape[1])", ""),
        ("out.masked_fill(empty[:, None, None], 0.0)", "out"),
        ("lse.masked_fill(empty, -INF)", "lse"),
        ('("bool",) if MASK', '("bool", "additive") if MASK'),
        ('"h" in p.mask_shape', "False"),
    ),
)
