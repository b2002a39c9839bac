"""fa3-fwd 0.0.3: FlashAttention 3's forward, built without float16, windows and a backward."""

from __future__ import annotations

import torch

from stubs import Stub, for_each_sequence, module, signed
from stubs.flash_attn_3 import MUTATIONS, REFUSES, forward, with_kvcache


@signed("fa3_fwd", "flash_attn_func")
def flash_attn_func(q, k, v, return_attn_probs, deterministic, attention_chunk, pack_gqa, sm_margin, **named):
    named = {name: value for name, value in named.items() if value is not None or name == "softmax_scale"}
    assert q.dtype is torch.bfloat16, "This flash attention build does not support FP16."
    assert not any(x.requires_grad for x in (q, k, v)), "This flash attention build does not support backward."
    assert named["num_splits"] == 0
    out, lse = forward(q, k, v, **named, left_out=("LOCAL",))
    return (out, lse) if return_attn_probs else out


@signed("fa3_fwd", "flash_attn_varlen_func")
def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, return_attn_probs, deterministic, attention_chunk,
    pack_gqa, sm_margin, **named,
):  # fmt: skip
    named = {name: value for name, value in named.items() if value is not None or name == "softmax_scale"}
    assert q.dtype is torch.bfloat16 and not any(x.requires_grad for x in (q, k, v)) and named["num_splits"] == 1
    out, lse = for_each_sequence(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        lambda *one: forward(*one, **named, left_out=("LOCAL",), longest=(max_seqlen_q, max_seqlen_k)),
    )  # fmt: skip
    return (out, lse) if return_attn_probs else out


@signed("fa3_fwd", "flash_attn_with_kvcache")
def flash_attn_with_kvcache(**named):
    assert named["q"].dtype is torch.bfloat16
    return with_kvcache(**named, left_out=("LOCAL", "PAGEDKV"))


STUB = Stub(
    file="flash_attn_3",
    library="fa3-fwd",
    version="0.0.3",
    kernels=("fa3_fwd",),
    modules=lambda: {
        "fa3_fwd_interface": module(
            "fa3_fwd_interface",
            flash_attn_func=flash_attn_func,
            flash_attn_varlen_func=flash_attn_varlen_func,
            flash_attn_with_kvcache=flash_attn_with_kvcache,
        )
    },
    refuses={
        "fa3_fwd": f"{REFUSES} window window_left window_right window_self window_causal window_wide window_tall"
        " window_left_past_keys grad grad_causal grad_bottom_right grad_head_dim packed_window packed_window_left"
        " packed_window_right packed_window_causal packed_grad packed_grad_window packed_behind packed_nothing_grad unread_grad"
        " unread_longest_told unread_filled_window paged_window paged_window_decode",
    },
    mutations=(
        *MUTATIONS,
        ('dtypes=("bfloat16",)', 'dtypes=("float16",)'),
        ("grad=False", "grad=True"),
        ("grad=False,", "grad=False, window=True,"),
    ),
)
