"""SageAttention 2.2.0: masks in units of log 2 for the Triton function, whose hidden keys are -1e6 away and no further."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from stubs import INF, Stub, attend, band, check_aligned, check_half, module, signed

LOG2E = 1.44269504
FILE = "sageattention"


def _checked(q, k, v, tensor_layout, sm_scale, kwargs):
    """(q, k, v) in (b, h, s, d), the scale, and the order of the layout."""
    assert not kwargs, "swallowed"
    check_half(q, k, v)
    assert q.shape[3] == k.shape[3] == v.shape[3] <= 128 and all(x.stride(-1) == 1 for x in (q, k, v))
    order = {"HND": (0, 1, 2, 3), "NHD": (0, 2, 1, 3)}[tensor_layout]
    scale = q.shape[3] ** -0.5 if sm_scale is None else sm_scale
    return [x.permute(order) for x in (q, k, v)], scale, order


def _cuda(q, k, v, tensor_layout, is_causal, sm_scale, return_lse, kwargs):
    (q4, k4, v4), scale, order = _checked(q, k, v, tensor_layout, sm_scale, kwargs)
    if q.shape[3] in (64, 128):  # the others are padded
        check_aligned(q, k, v)
    assert scale > 0, "the maximum is taken before the scale"
    out, lse = attend(
        q4, k4, v4, scale=scale, visible=band(q4.shape[2], k4.shape[2], None, 0, 0) if is_causal else None
    )
    out = out.permute(order).contiguous()
    return (out, lse) if return_lse else out


@signed(FILE, "sageattn_qk_int8_pv_fp16_cuda")
def fp16_cuda(
    q, k, v, tensor_layout, is_causal, qk_quant_gran, sm_scale, pv_accum_dtype, smooth_k, smooth_v, return_lse, kwargs
):
    assert pv_accum_dtype in ("fp32", "fp16+fp32", "fp16")
    return _cuda(q, k, v, tensor_layout, is_causal, sm_scale, return_lse, kwargs)


@signed(FILE, "sageattn_qk_int8_pv_fp8_cuda")
def fp8_cuda(
    q, k, v, tensor_layout, is_causal, qk_quant_gran, sm_scale, pv_accum_dtype, smooth_k, smooth_v, return_lse, kwargs
):
    return _cuda(q, k, v, tensor_layout, is_causal, sm_scale, return_lse, kwargs)


@signed(FILE, "sageattn_qk_int8_pv_fp8_cuda_sm90")
def sm90(q, k, v, tensor_layout, is_causal, sm_scale, return_lse, kwargs, **more):
    return _cuda(q, k, v, tensor_layout, is_causal, sm_scale, return_lse, kwargs)


@signed(FILE, "sageattn_qk_int8_pv_fp16_triton")
def triton(
    q, k, v, tensor_layout, quantization_backend, is_causal, attn_mask, sm_scale, smooth_k, return_lse, kwargs
):  # fmt: skip
    (q4, k4, v4), scale, order = _checked(q, k, v, tensor_layout, sm_scale, kwargs)
    assert scale != 0, "the quantiser divides by the largest"
    (b, h, q_len, _), kv_len = q4.shape, k4.shape[2]
    if is_causal:
        assert q_len == kv_len and attn_mask is None
        out, lse = attend(q4, k4, v4, scale=scale, visible=band(q_len, kv_len, None, 0, 0))
    elif attn_mask is None:
        out, lse = attend(q4, k4, v4, scale=scale)
    else:
        assert attn_mask.dtype in (torch.bool, q.dtype)
        out, lse = _masked(q4, k4, v4, scale, attn_mask.expand(b, h, q_len, kv_len))
    out = out.permute(order).contiguous()
    return (out, lse) if return_lse else out


def _masked(q, k, v, scale, mask):
    """Blocks of 128 queries and 64 keys, as _attn_fwd_inner goes through them."""
    group, tail = q.shape[1] // k.shape[1], -k.shape[2] % 64
    k, v = (pad(x.double().repeat_interleave(group, 1), (0, 0, 0, tail)) for x in (k, v))
    scores = q.double() @ k.mT * scale * LOG2E
    if mask.dtype is torch.bool:
        mask = pad(mask, (0, tail), value=False)
        scores = scores + torch.where(mask, 0.0, -1.0e6)
        tiles = pad(mask, (0, 0, 0, -q.shape[2] % 128)).unflatten(3, (-1, 64)).unflatten(2, (-1, 128))
        skipped = ~tiles.any(5).any(3)  # (b, h, blocks of queries, blocks of keys)
        skipped = skipped.repeat_interleave(64, 3).repeat_interleave(128, 2)[:, :, : q.shape[2]]
        scores = scores.masked_fill(skipped, -INF)
    else:
        scores = scores + pad(mask.double(), (0, tail), value=-1.0e6)
        scores = scores.masked_fill((scores[..., :64] == -INF).all(-1, keepdim=True), float("nan"))
    none = (scores == -INF).all(-1, keepdim=True)
    weights = (scores.masked_fill(none, 0.0) / LOG2E).softmax(-1).masked_fill(none, 0.0)
    return (weights @ v).to(q.dtype), (scores / LOG2E).logsumexp(-1).float()


def _hides_64():
    """Every other row sees the last keys alone, of those every other one by float16's smallest number."""
    mask = torch.zeros(1, 1, 19, 130, dtype=torch.float16)
    mask[:, :, ::2, :64] = -INF
    mask[:, :, ::4, :64] = -65504.0
    return mask


def _modules():
    core = module(
        "sageattention.core", SM80_ENABLED=True, SM89_ENABLED=True, SM90_ENABLED=True, sageattn_qk_int8_pv_fp16_cuda=fp16_cuda,
        sageattn_qk_int8_pv_fp8_cuda=fp8_cuda, sageattn_qk_int8_pv_fp8_cuda_sm90=sm90, sageattn_qk_int8_pv_fp16_triton=triton,
    )  # fmt: skip
    return {"sageattention": module("sageattention", core=core), "sageattention.core": core}


_TRITON = "softcap scale_zero grad grad_causal grad_bottom_right grad_head_dim mask_grad float32"
_CUDA = (
    f"{_TRITON} top_left_wide top_left_tall bottom_right_wide bottom_right_tall scale_negative lse_empty_rows bool_mask"
    " bool_mask_keys float_mask mask_and_causal window window_left window_right window_self window_causal window_wide"
    " window_tall window_left_past_keys float_mask_hides_64"
)

CUDA_KERNELS = (
    "sage_2_fp16",
    "sage_2_fp16_in_fp16",
    "sage_2_fp16_mixed",
    "sage_2_fp8",
    "sage_2_fp8_sm120",
    "sage_2_fp8_sm90",
)
STUB = Stub(
    file=FILE,
    library="sageattention",
    version="2.2.0",
    modules=_modules,
    capabilities={"sage_2_fp16_in_fp16": 80, "sage_2_fp16_mixed": 80, "sage_2_fp8": 89, "sage_2_fp8_sm120": 120},
    kernels=(*CUDA_KERNELS, "sage_2_triton"),
    sizes={"d": 64},
    refuses={**dict.fromkeys(CUDA_KERNELS, _CUDA), "sage_2_triton": _TRITON},
    cases={
        "head_dim_128": {"d": 128},
        "float_mask_hides_64": {"mask": _hides_64(), "sq": 19, "skv": 130},
    },
    mutations=(
        ('"is_causal": a.upper == 0', '"is_causal": False'),
        ('"sm_scale": a.scale', '"sm_scale": None'),
        ('"return_lse": a.lse', '"return_lse": False'),
        ('q=q, k=k, v=v, tensor_layout="NHD", **given', 'q=q, k=k, v=v, tensor_layout="HND", **given'),
        ("mask if is_bool else (mask.float()", "~mask if is_bool else (mask.float()"),
        ("(mask.float() * LOG2E)", "(mask.float() * 1)"),
        (".clamp_min(HIDDEN)", ""),
        (".to(q.dtype)", ""),
        ("-60000.0", "-6.0"),
        ("-60000.0", "-70000.0"),
        ("(mask if is_bool else mask > -INF)", "(mask > -INF)"),
        ("out = out.masked_fill(empty.transpose(1, 2)[..., None], 0.0)", "pass"),
        ("lse.masked_fill(empty, -INF)", "lse"),
        ('corner="square"', 'corner="bottom_right"'),
        ('corner="square"', 'corner="top_left"'),
        ('masks=("bool", "additive")', 'masks=("bool",)'),
        ("aligned=True", "aligned=False"),
        ("equal_head_dims=True", "equal_head_dims=False"),
        ("dense_last_dim=True", "dense_last_dim=False"),
        ("lse=True", "lse=False"),
        ('OneOf("scale", ("positive",))', 'OneOf("scale", ("positive", "negative"))'),
    ),
)
