"""FlashAttention 2.8: bshd, bottom-right corner, -1 for no limit, a log-sum-exp of +inf where nothing is visible."""

from __future__ import annotations

import torch

from stubs import INF, Stub, attend, band, check_aligned, check_half, for_each_sequence, in_one_piece, module, signed


def forward(q, k, v, scale, causal, window_size, softcap, longest=None):
    """(out, lse) of flash_api.cpp; longest: its seqlen_k, of packed sequences the longest."""
    check_half(q, k, v)
    check_aligned(q, k, v)
    assert q.shape[3] == k.shape[3] == v.shape[3] <= 256 and k.shape[1:3] == v.shape[1:3]
    assert q.shape[2] % k.shape[2] == 0 and q.shape[0] > 0
    q_len, kv_len = q.shape[1], k.shape[1]
    longest = kv_len if longest is None else longest
    left, right = (-1 if side >= longest else side for side in window_size)  # as long as the keys is none
    right = 0 if causal and q_len > 1 else right
    left = longest if left < 0 <= right else left
    right = longest if right < 0 <= left else right
    visible = None if left < 0 else band(q_len, kv_len, left, right, kv_len - q_len)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    assert scale > 0  # a row's maximum is taken before it is scaled
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = attend(q, k, v, scale=scale, visible=visible, softcap=softcap, empty_lse=INF)
    return out.transpose(1, 2).contiguous(), lse


@signed("flash_attn_2", "flash_attn_func")
def flash_attn_func(
    q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
):
    assert q.shape[1] and k.shape[1] and dropout_p == 0.0 and alibi_slopes is None
    out, lse = forward(q, k, v, softmax_scale, causal, window_size, softcap)
    return (out, lse, None) if return_attn_probs else out


@signed("flash_attn_2", "flash_attn_varlen_func")
def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size, softcap,
    alibi_slopes, deterministic, return_attn_probs, block_table,
):  # fmt: skip
    assert dropout_p == 0.0 and alibi_slopes is None and block_table is None
    if max_seqlen_q == 1 and q.shape[1] > k.shape[1] and tuple(window_size) == (-1, -1):
        assert len(q) == len(cu_seqlens_q) - 1, "q is reshaped to one token a sequence"
        cu_seqlens_q = torch.arange(len(q) + 1, dtype=torch.int32)  # seqlenq_ngroups_swapped: cu_seqlens_q_d = nullptr
    out, lse = for_each_sequence(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        lambda *one: forward(*one, softmax_scale, causal, window_size, softcap, max_seqlen_k),
    )  # fmt: skip
    return (out, lse, None) if return_attn_probs else out


@signed("flash_attn_2", "flash_attn_with_kvcache")
def flash_attn_with_kvcache(
    q, k_cache, v_cache, cache_seqlens, softmax_scale, causal, window_size, softcap, num_splits, return_softmax_lse,
    rotary_interleaved, block_table, **others,
):  # fmt: skip
    """fwd_kvcache: of each entry's keys those that are filled; tiles are cleared behind them."""
    assert not any(x is not None for x in others.values()) and num_splits == 0
    assert not any(x.requires_grad for x in (q, k_cache, v_cache)), "no backward"
    assert cache_seqlens.dtype is torch.int32 and cache_seqlens.is_contiguous() and cache_seqlens.shape == q.shape[:1]
    check_aligned(k_cache, v_cache)
    if block_table is not None:
        k_cache, v_cache = (in_one_piece(x, block_table, cache_seqlens, 256) for x in (k_cache, v_cache))
    told = softmax_scale, causal, window_size, softcap, k_cache.shape[1]
    filled = enumerate(cache_seqlens.tolist())
    entries = [forward(q[b, None], k_cache[b, None, :n], v_cache[b, None, :n], *told) for b, n in filled]
    out, lse = (torch.cat(parts) for parts in zip(*entries, strict=True))
    return (out, lse) if return_softmax_lse else out


STUB = Stub(
    file="flash_attn_2",
    library="flash-attn",
    version="2.8.3",
    modules=lambda: {
        "flash_attn": module(
            "flash_attn",
            flash_attn_func=flash_attn_func,
            flash_attn_varlen_func=flash_attn_varlen_func,
            flash_attn_with_kvcache=flash_attn_with_kvcache,
        )
    },
    refuses={
        "flash_attn_2": "top_left_wide top_left_tall scale_zero scale_negative bool_mask bool_mask_keys float_mask"
        " mask_and_causal mask_grad float32 packed_top_left packed_scale_negative packed_float32 unread_top_left"
        " filled_scale_negative filled_grad filled_float32 filled_causal paged_scale_negative paged_grad paged_float32",
    },
    mutations=(
        ("a.window_sides(0, 0)", "a.window_sides(q.shape[1], k.shape[1])"),
        ("a.packed.cu_kv", "a.packed.cu_q"),
        ("a.packed.max_kv", "a.packed.max_q"),
        ("max(2, a.packed.max_q)", "a.packed.max_q"),
        ("cache_seqlens=a.kv_lens", "cache_seqlens=None"),
        ('{"block_table": a.page_table}', '{"block_table": a.page_table.flip(0)}'),
        ("multiple_of=256", "multiple_of=1"),
        ("window_size=(-1 if left is None else left, -1)", "window_size=(-1, -1)"),
        ("return_softmax_lse=a.lse", "return_softmax_lse=False"),
        ("-1 if right is None else right", "-1"),
        ("lse.masked_fill(lse == INF, -INF)[None]", "lse[None]"),
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
