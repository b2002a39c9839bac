"""FlashAttention 4: bshd, bottom-right corner, None for no limit; -1 on one side is a limit. Always (out, lse)."""

from __future__ import annotations

import torch

from stubs import Stub, attend, band, check_aligned, check_half, for_each_sequence, in_one_piece, module, signed


def forward(q, k, v, *, softmax_scale, causal, window_size, softcap):
    """(out, lse) of _flash_attn_fwd."""
    check_half(q, k, v)
    check_aligned(q, k, v)  # b36 copies what is not; the betas before August 2026 did not look
    d, dv, (q_len, kv_len) = q.shape[3], v.shape[3], (q.shape[1], k.shape[1])
    assert d % 8 == dv % 8 == 0 and 8 <= d <= 256 and 8 <= dv <= 256 and k.shape == (*v.shape[:3], d)
    assert q.shape[2] % k.shape[2] == 0
    left, right = window_size
    if left is not None and right is not None and left < 0 and right < 0:
        left = right = None
    right = 0 if causal else right
    visible = band(q_len, kv_len, left, right, kv_len - q_len)
    scale = d**-0.5 if softmax_scale is None else softmax_scale
    assert scale > 0  # a row's maximum is taken before it is scaled
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = attend(q, k, v, scale=scale, visible=visible, softcap=softcap)
    return out.transpose(1, 2).contiguous(), lse


def is_training(q, k, v):
    found = any(x.requires_grad for x in (q, k, v))
    dims, heads = (q.shape[-1], v.shape[-1]), (q.shape[-2], k.shape[-2])
    assert not found or heads[0] == heads[1] or dims[0] == dims[1], "GQA backward requires head_dim == head_dim_v"
    return found


@signed("flash_attn_4", "flash_attn_func")
def flash_attn_func(
    q, k, v, softmax_scale, causal, window_size, softcap, num_splits, deterministic, return_lse, **others
):
    assert num_splits == 1 and not any(others.values())
    keeps_lse = is_training(q, k, v) or return_lse
    out, lse = forward(q, k, v, softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap)
    return out, lse if keeps_lse else None


@signed("flash_attn_4", "flash_attn_varlen_func")
def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size, softcap, num_splits,
    deterministic, return_lse, seqused_k, page_table, **others,
):  # fmt: skip
    assert num_splits == 1 and not any(others.values())
    if page_table is not None:
        return of_pages(q, k, v, seqused_k, page_table, softmax_scale, causal, window_size, softcap, return_lse)
    named = {"softmax_scale": softmax_scale, "causal": causal, "window_size": window_size, "softcap": softcap}
    keeps_lse = is_training(q, k, v) or return_lse
    out, lse = for_each_sequence(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, lambda *one: forward(*one, **named)
    )
    return out, lse if keeps_lse else None


def of_pages(q, k, v, seqused_k, page_table, softmax_scale, causal, window_size, softcap, return_lse):
    """Without cu_seqlens q is (batch, q_len, heads, dim). It multiplies what lies in a page behind the lengths by zero."""
    assert (
        seqused_k.dtype is torch.int32 and seqused_k.is_contiguous() and seqused_k.shape == q.shape[:1] and q.dim() == 4
    )
    assert not is_training(q, k, v)
    assert q.shape[3] % 16 == v.shape[3] % 16 == 0, "Paged KV does not support irregular head dim"
    check_aligned(k, v)
    k, v = (in_one_piece(x, page_table, seqused_k) for x in (k, v))
    assert v.isfinite().all()
    named = {"softmax_scale": softmax_scale, "causal": causal, "window_size": window_size, "softcap": softcap}
    parts = [forward(q[b, None], k[b, None, :n], v[b, None, :n], **named) for b, n in enumerate(seqused_k.tolist())]
    out, lse = (torch.cat(x) for x in zip(*parts, strict=True))
    return out, lse if return_lse else None


STUB = Stub(
    file="flash_attn_4",
    library="flash-attn-4",
    version="4.0.0b36",
    modules=lambda: {
        "flash_attn": module("flash_attn"),
        "flash_attn.cute": module(
            "flash_attn.cute", flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func
        ),
    },
    refuses={
        "flash_attn_4": "top_left_wide top_left_tall scale_zero scale_negative bool_mask bool_mask_keys float_mask"
        " mask_and_causal mask_grad float32 packed_top_left packed_scale_negative packed_float32 unread_top_left"
        " paged_head_dim_20 paged_head_dim_24 paged_head_dim_v_24 paged_scale_negative paged_grad paged_float32",
    },
    mutations=(
        ("a.window_sides(0, 0)", "a.window_sides(q.shape[1], k.shape[1])"),
        ("a.packed.cu_kv", "a.packed.cu_q"),
        ("a.packed.max_kv", "a.packed.max_q"),
        ("num_splits=1, deterministic", "num_splits=0, deterministic"),
        ("page_table=a.page_table", "page_table=a.page_table.flip(0)"),
        ('Range("head_dim", multiple_of=16)', 'Range("head_dim", multiple_of=8)'),
        ('Range("head_dim_v", multiple_of=16)', 'Range("head_dim_v", multiple_of=8)'),
        ("seqused_k=a.kv_lens", "seqused_k=a.kv_lens + 1"),
        ("(out[None], lse.detach()[None]) if a.lse else out[None]", "out[None], lse"),
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
