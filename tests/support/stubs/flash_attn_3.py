"""FlashAttention 3: bshd, bottom-right corner, -1 for no limit, windows clamped exactly; pads nothing."""

from __future__ import annotations

import torch

from fastattn.kernels.adapters import flash_attn_3
from stubs import Stub, attend, band, check_aligned, check_half, for_each_sequence, in_one_piece, module, signed

FLAGS = ("VARLEN", "BACKWARD", "LOCAL", "SOFTCAP", "FP16", "HDIM256", "SM8x", "PAGEDKV")


def config(left_out=()):
    flags = {f"FLASHATTENTION_DISABLE_{flag}": flag in left_out for flag in FLAGS}
    flags |= {f"FLASH_ATTENTION_DISABLE_{flag}": flag in left_out for flag in ("HDIMDIFF64", "HDIMDIFF192")}
    return module("flash_attn_config", CONFIG={"build_flags": flags})


def forward(q, k, v, *, softmax_scale, causal, window_size, softcap, num_splits, left_out=(), longest=None):
    """(out, lse) of hopper/flash_api.cpp; longest: its (seqlen_q, seqlen_k), of packed sequences the longest ones."""
    check_half(q, k, v)
    check_aligned(q, k, v)
    d, dv, (q_len, kv_len) = q.shape[3], v.shape[3], (q.shape[1], k.shape[1])
    assert d % 8 == dv % 8 == 0 and d <= 256 and q.shape[2] % k.shape[2] == 0 and k.shape == (*v.shape[:3], d)
    assert d == dv or (128 < d <= 192 and 96 < dv <= 128) or (d <= 64 and dv <= 512)
    assert not softcap or "SOFTCAP" not in left_out, "This flash attention build does not support tanh softcapping."
    left, right = window_size
    most_q, most_kv = longest or (q_len, kv_len)
    left, right = -1 if left >= most_kv - 1 else left, -1 if right >= most_q - 1 else right
    causal = causal and not (most_q == 1 and left == right == -1)
    right = 0 if causal else right
    is_causal = left < 0 and right == 0
    assert is_causal or (left < 0 and right < 0) or "LOCAL" not in left_out, "... does not support local attention."
    left, right = most_kv - 1 if left < 0 else left, most_q - 1 if right < 0 else right
    visible = None if window_size == (-1, -1) and not causal else band(q_len, kv_len, left, right, kv_len - q_len)
    visible = band(q_len, kv_len, None, 0, kv_len - q_len) if is_causal else visible
    scale = d**-0.5 if softmax_scale is None else softmax_scale
    assert scale > 0  # a row's maximum is taken before it is scaled
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = attend(q, k, v, scale=scale, visible=visible, softcap=softcap)
    return out.transpose(1, 2).contiguous(), lse


@signed("flash_attn_3", "flash_attn_func")
def flash_attn_func(q, k, v, return_attn_probs, deterministic, attention_chunk, pack_gqa, sm_margin, **named):
    named = {name: value for name, value in named.items() if value is not None or name == "softmax_scale"}
    assert attention_chunk == sm_margin == 0 and pack_gqa is None
    is_training = any(x.requires_grad for x in (q, k, v))
    assert not (is_training and deterministic and max(q.shape[3], v.shape[3]) > 192)
    assert named["num_splits"] == (1 if is_training else 0), "the default never splits the keys, and decoding starves"
    out, lse = forward(q, k, v, **named)
    return (out, lse) if return_attn_probs else out


@signed("flash_attn_3", "flash_attn_varlen_func")
def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, return_attn_probs, deterministic, attention_chunk,
    pack_gqa, sm_margin, **named,
):  # fmt: skip
    named = {name: value for name, value in named.items() if value is not None or name == "softmax_scale"}
    assert attention_chunk == sm_margin == 0 and pack_gqa is None and named["num_splits"] == 1
    out, lse = for_each_sequence(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        lambda *one: forward(*one, **named, longest=(max_seqlen_q, max_seqlen_k)),
    )  # fmt: skip
    return (out, lse) if return_attn_probs else out


def with_kvcache(
    q, k_cache, v_cache, cache_seqlens, softmax_scale, causal, window_size, softcap, num_splits, return_softmax_lse,
    page_table, left_out=(), **others,
):  # fmt: skip
    """Tiles are loaded to the cache's end: what lies behind the filled keys is multiplied by a weight of zero."""
    others = {name: value for name, value in others.items() if value is not None}
    assert others == {"attention_chunk": 0, "rotary_interleaved": True, "sm_margin": 0} and num_splits == 0
    assert not any(x.requires_grad for x in (q, k_cache, v_cache)), "no backward"
    check_half(q, k_cache, v_cache)
    check_aligned(q, k_cache, v_cache)
    assert cache_seqlens.dtype is torch.int32 and cache_seqlens.is_contiguous() and cache_seqlens.shape == q.shape[:1]
    assert "LOCAL" not in left_out or window_size == (-1, -1), "... does not support local attention."
    if page_table is not None:
        assert "PAGEDKV" not in left_out, "This flash attention build does not support paged KV."
        k_cache, v_cache = (in_one_piece(x, page_table, cache_seqlens) for x in (k_cache, v_cache))
    (q_len, kv_len), left = (q.shape[1], k_cache.shape[1]), window_size[0]
    seen = []
    for n in cache_seqlens.tolist():
        right = 0 if causal and q_len > 1 else None
        near = band(q_len, n, left if 0 <= left < kv_len - 1 else None, right, n - q_len)
        seen.append(torch.nn.functional.pad(near, (0, kv_len - n)))
    q, k, v = (x.transpose(1, 2) for x in (q, k_cache, v_cache))
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    assert scale > 0
    out, lse = attend(q, k, v, scale=scale, visible=torch.stack(seen)[:, None], softcap=softcap)
    out = out.transpose(1, 2).contiguous()
    return (out, lse, None, None) if return_softmax_lse else out


@signed("flash_attn_3", "flash_attn_with_kvcache")
def flash_attn_with_kvcache(**named):
    return with_kvcache(**named)


REFUSES = (
    "top_left_wide top_left_tall scale_zero scale_negative bool_mask bool_mask_keys float_mask mask_and_causal"
    " mask_grad float32 packed_top_left packed_scale_negative packed_float32 unread_top_left"
    " filled filled_rows filled_corner filled_window filled_window_decode filled_short filled_empty"
    " filled_softcap filled_scale filled_scale_negative filled_head_dim_20 filled_grad filled_float32 filled_causal"
    " paged_scale_negative paged_grad paged_float32"
)
MUTATIONS = (
    ("a.window_sides(0, 0)", "a.window_sides(q.shape[1], k.shape[1])"),
    ("a.packed.cu_kv", "a.packed.cu_q"),
    ("a.packed.max_kv", "a.packed.max_q"),
    ("num_splits=1,  #", "num_splits=0,  #"),
    ("lambda x: x[None]", "lambda x: x"),
    ("causal=right == 0", "causal=False"),
    ("causal=right == 0", "causal=True"),
    ("softmax_scale=a.scale", "softmax_scale=None"),
    ("softcap=a.softcap", "softcap=0.0"),
    ("num_splits=1 if a.needs_grad or is_compiling() else 0", "num_splits=1"),
    ('{"return_attn_probs": a.lse}', "{}"),
    ('layout="bshd"', 'layout="bhsd"'),
    ('corner="bottom_right"', 'corner="top_left"'),
    ('corner="bottom_right"', 'corner="any"'),
    ('OneOf("scale", ("positive",))', 'OneOf("scale", ("positive", "negative"))'),
    ("head_dim_multiple=8", "head_dim_multiple=1"),
    ("aligned=True", "aligned=False"),
    ("dense_last_dim=True", "dense_last_dim=False"),
    ("softcap=True", "softcap=False"),
)
STUB = Stub(
    file="flash_attn_3",
    library="flash-attn-3",
    version="3.0.0",
    kernels=("flash_attn_3",),
    modules=lambda: {
        "flash_attn_interface": module(
            "flash_attn_interface",
            flash_attn_func=flash_attn_func,
            flash_attn_varlen_func=flash_attn_varlen_func,
            flash_attn_with_kvcache=flash_attn_with_kvcache,
        ),
        "flash_attn_config": config(),
    },
    patch=lambda _: flash_attn_3.flags.cache_clear(),
    refuses={"flash_attn_3": REFUSES},
    mutations=(
        *MUTATIONS,
        ("-1 if left is None else left", "-1 if left is None else left + 1"),
        ("right or -1", "-1"),
        ("-1 if right is None else right", "-1"),
        ("right or -1", "(right or 0) - 1"),
        ('("float16", "bfloat16")', '("float16", "bfloat16", "float32")'),
        ("window=True", "window=False"),
        ('{"page_table": a.page_table}', '{"page_table": a.page_table.flip(0)}'),
    ),
)
