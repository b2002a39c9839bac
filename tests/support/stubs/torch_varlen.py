"""torch 2.13's varlen_attn: packed sequences and caches by torch's flash kernel; its corner is the bottom-right one."""

from __future__ import annotations

import inspect

import torch
from torch.nn.attention import varlen

from stubs import Stub, for_each_sequence, in_one_piece, module, signed
from stubs.torch_lower import STUB as LOWER
from stubs.torch_lower import run_flash


def _with_later_parameters(real):
    """The signature of torch 2.13: an older torch has fewer parameters, and the adapter refuses that one."""
    later = {"enable_gqa": False, "seqused_k": None, "block_table": None, "num_splits": None}
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
        for name, default in later.items()
        if name not in real.parameters
    ]
    return real.replace(parameters=[*real.parameters.values(), *more])


@signed("torch", "varlen_attn", real=_with_later_parameters(inspect.signature(varlen.varlen_attn)))
def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, return_aux, scale, window_size, enable_gqa, seqused_k,
                block_table, num_splits):  # fmt: skip
    """As aten::_flash_attention_forward with cu_seqlens."""
    if block_table is not None:
        key, value = (in_one_piece(x, block_table, seqused_k, 256).flatten(0, 1) for x in (key, value))
    assert enable_gqa | (query.shape[1] == key.shape[1])
    if max_q == 1 and query.shape[1] > key.shape[1] and tuple(window_size) == (-1, -1):
        assert len(query) == len(cu_seq_q) - 1, "q is reshaped to one token a sequence"
        cu_seq_q = torch.arange(len(query) + 1, dtype=torch.int32)
    is_causal = window_size == (-1, 0)
    if seqused_k is not None:
        assert not any(x.requires_grad for x in (query, key, value)), "no backward"
        assert seqused_k.dtype is torch.int32 and seqused_k.is_contiguous() and len(seqused_k) == len(cu_seq_k) - 1
        kept = [slice(first, first + n) for first, n in zip(cu_seq_k.tolist(), seqused_k.tolist(), strict=False)]
        key, value = (torch.cat([x[keys] for keys in kept]) for x in (key, value))
        cu_seq_k = torch.nn.functional.pad(seqused_k.cumsum(0, dtype=torch.int32), (1, 0))
    out, lse = for_each_sequence(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, lambda *one: run_flash(*one, scale, is_causal, *window_size, max_k)
    )  # fmt: skip
    return (out, lse) if return_aux is not None and return_aux.lse else out


STUB = Stub(
    file="torch_varlen",
    library="torch",
    version=torch.__version__,
    modules=lambda: {
        "torch.nn.attention.varlen": module(
            "torch.nn.attention.varlen", varlen_attn=varlen_attn, AuxRequest=varlen.AuxRequest
        )
    },
    refuses={
        "torch_varlen": "top_left_wide top_left_tall softcap scale_zero scale_negative bool_mask bool_mask_keys float_mask"
        " mask_and_causal mask_grad float32 lse_mask lse_zero lse_mask_and_window window_top_left_tall"
        " packed_softcap packed_top_left packed_scale_negative packed_float32 unread_top_left filled_softcap"
        " filled_scale_negative filled_grad filled_float32 filled_causal paged_softcap paged_scale_negative paged_grad"
        " paged_float32",
    },
    cases=LOWER.cases,
    mutations=(
        ("seqused_k=a.kv_lens", "seqused_k=None"),
        ('{"block_table": a.page_table}', '{"block_table": a.page_table.flip(0)}'),
        ("kv_len * a.page_table.shape[1]", "kv_len"),
        ("multiple_of=256", "multiple_of=1"),
        ("a.window_sides(0, 0)", "a.window_sides(q.shape[1], k.shape[1])"),
        ("a.packed.cu_kv", "a.packed.cu_q"),
        ("a.packed.max_kv", "a.packed.max_q"),
        ("max(2, a.packed.max_q)", "a.packed.max_q"),
        ("found[1])[None]", "found[1])"),
        ("scale=a.scale, return_aux", "return_aux"),
        ("window_size=(left, right)", "window_size=(left + 1, right)"),
        ("window_size=(left, right)", "window_size=(left, -1)"),
        ("dtype=int32", "dtype=int64"),
        ('"enable_gqa": True', '"enable_gqa": False'),
        (".unflatten(1, (batch, q_len)).transpose(0, 1)", ".unflatten(1, (q_len, batch)).permute(2, 0, 1)"),
        ("-1 if n is None else n", "n if n is None else n + 1"),
        ("torch_lower.natural(lse)", "lse"),
    ),
)
