"""Transformer Engine beyond the grid: what TE is asked first, FlashAttention 4's windows, memory that cuDNN would misread."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from inspect import Signature

import pytest
import stubs
import torch
from building import expect, facts_of, hold, mask_of, problem_of, qkv
from fakes import problem
from library_grid import installed, misaligned, row_of, silicon
from stubs import transformer_engine as te

from fastattn.environment.settings import Settings
from fastattn.kernels.libraries import availability, catalogue
from fastattn.planning import binding, candidates
from fastattn.planning.decision import Accepted, Rejected
from fastattn.problems.masks import Causal, PackedUnread
from fastattn.problems.masks.unread import Sequences

BR = Causal("bottom_right")


@pytest.fixture
def te_is_there(monkeypatch):
    with installed(te.STUB, monkeypatch):
        stubs.calls.clear()
        yield


def bound(name, q, k, v, mask=None, layout="bhsd", **changes):
    options = {key: changes.pop(key) for key in ("window", "is_causal") if key in changes}
    p = problem_of(q, k, v, mask, layout, **options).replace(device="cuda", threads=0, **changes)
    facts = facts_of(q, k, v, mask, layout, **options)
    found = candidates.decide(row_of(te.STUB, name), p, silicon(te.STUB, name), Settings(), facts=facts)
    return found[0].name, binding.bind(found[0], p, None, facts, structured=isinstance(mask, Causal))


@pytest.mark.parametrize("major", [2, 3, 4])
@pytest.mark.parametrize("window", [None, (16, 2), (3, -1), (-1, 2), (2, 2)])
def test_flash_draws_bands_of_the_bottom_right_corner_in_every_version(te_is_there, monkeypatch, major, window):
    monkeypatch.setattr(te, "flash_major", [major])
    q, k, v = qkv(sq=5, skv=19, dtype=torch.float16)
    name, call = bound("te_flash", q, k, v, BR, **({"window": window} if window else {}))
    assert name == "te_flash"
    hold(expect(q, k, v, corners=("bottom_right",), window=window), call, q, k, v)


def test_flash_four_is_told_none_for_no_limit(te_is_there, monkeypatch):
    monkeypatch.setattr(te, "flash_major", [4])
    q, k, v = qkv(dtype=torch.float16)
    bound("te_flash", q, k, v, is_causal=True)[1](q, k, v, None)
    assert stubs.calls[-1][1]["window_size"] == (None, 0)


@pytest.mark.parametrize("layout", ["bhsd", "bshd", "sbhd"])
@pytest.mark.parametrize("memory", ["contiguous", "transposed", "seq_first", "cache", "packed", "last_stride_2"])
def test_fused_gets_dense_memory_from_any(te_is_there, layout, memory):
    q, k, v = qkv(hq=4, hkv=2, memory=memory, layout=layout, dtype=torch.bfloat16)
    name, call = bound("te_fused", q, k, v, None, layout)
    assert name == ("te_fused" if memory == "transposed" else "te_fused+dense")
    hold(expect(q, k, v, layout=layout), call, q, k, v)


def test_fused_gets_aligned_memory(te_is_there):
    q, k, v = (misaligned(x).transpose(1, 2) for x in qkv(layout="bshd", dtype=torch.float16))
    name, call = bound("te_fused", q, k, v)
    assert name == "te_fused+dense"
    hold(expect(q, k, v), call, q, k, v)


def test_what_te_would_not_consider_raises_with_its_reason(te_is_there, monkeypatch):
    q, k, v = qkv(dtype=torch.float16)

    def without(attention_params):
        return True, te.SimpleNamespace(major=2), False, None, False, [True, False, True]

    utils = sys.modules["transformer_engine.pytorch.attention.dot_product_attention.utils"]
    monkeypatch.setattr(utils, "get_attention_backend", without)
    call = bound("te_fused", q, k, v)[1]
    with pytest.raises(
        RuntimeError, match="would run FlashAttention or UnfusedDotProductAttention here, not FusedAttention"
    ):
        call(q, k, v, None)


@pytest.mark.parametrize("name", ["te_fused", "te_flash", "te_unfused"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_te_is_asked_once_for_a_kind_of_call_and_told_what_it_would_ask(te_is_there, name, deterministic):
    q, k, v = qkv(dtype=torch.float16, grad=True)
    call = bound(name, q, k, v, deterministic=deterministic)[1]
    for _ in range(3):
        call(q, k, v, None)
    [asked] = [told for function, told in stubs.calls if function == "AttentionParams"]
    assert asked["is_training"] and asked["deterministic"] is deterministic
    assert asked["core_attention_bias_shape"] is None and not asked["core_attention_bias_requires_grad"]
    [made] = [told for function, told in stubs.calls if function.endswith("__init__")]
    assert made.get("deterministic", deterministic) is deterministic


@pytest.mark.parametrize("name", ["te_fused", "te_unfused"])
@pytest.mark.parametrize("letters", ["bhqk", "1hqk", "11qk"])
def test_the_shape_of_a_bias_is_told_by_name_up_to_2_19(te_is_there, monkeypatch, name, letters):
    parameters = stubs.signature(te.FILE, "AttentionParams").parameters
    old = [p.replace(default="1hss") if p.name == "core_attention_bias_shape" else p for p in parameters.values()]
    old = Signature([p for p in old if p.name != "softmax_scale"])
    describe = stubs.signed(te.FILE, "AttentionParams", real=old)(lambda **fields: te.SimpleNamespace(**fields))
    monkeypatch.setattr(sys.modules[f"{te.ROOT}.utils"], "AttentionParams", describe)
    availability.forget_libraries()
    q, k, v = qkv(dtype=torch.float16)
    mask = mask_of(letters, torch.float16, *q.shape[:3], k.shape[2])
    hold(expect(q, k, v, mask), bound(name, q, k, v, mask)[1], q, k, v, mask)
    [asked] = [told for function, told in stubs.calls if function == "AttentionParams"]
    assert asked["core_attention_bias_shape"] == letters.replace("qk", "ss")


@pytest.mark.parametrize("name", ["te_fused", "te_unfused"])
@pytest.mark.parametrize("low", [-20_000.0, -60_000.0])
def test_hidden_keys_stay_below_visible_ones_however_low_these_are(te_is_there, name, low):
    """TE writes -10000 over hidden scores, and the adapter a number of that kind over -inf."""
    q, k, v = qkv(dtype=torch.float16)
    mask = torch.zeros(2, 4, q.shape[2], k.shape[2], dtype=torch.float16)
    mask[:, :, 3], mask[:, :, 3, 5:], mask[:, :, 4], mask[:, :, 5, 2:] = low, -torch.inf, -torch.inf, low
    hold(expect(q, k, v, mask), bound(name, q, k, v, mask)[1], q, k, v, mask)


def test_nothing_of_nvte_is_set(te_is_there, monkeypatch):
    before = dict(os.environ)
    q, k, v = qkv(dtype=torch.float16)
    for name in ("te_fused", "te_flash", "te_unfused"):
        bound(name, q, k, v)[1](q, k, v, None)
    assert dict(os.environ) == before
    assert catalogue.library_of("transformer-engine").environment == ("NVTE_",)


@pytest.mark.parametrize("name, capability, found", [
    ("te_fused", 90, ["te_fused+packed"]), ("te_fused", 89, ["on sm89: cuDNN takes them from sm90 on"]),
    ("te_flash", 89, ["te_flash+packed"]),
])  # fmt: skip
def test_cudnn_takes_packed_sequences_from_sm90_on(te_is_there, name, capability, found):
    p = problem(device="cuda", dtype="bfloat16", structure="Causal() & Document(8)", mask="bool", mask_shape="11qk")
    silicon_ = replace(silicon(te.STUB, name), capability=capability)
    [told] = candidates.decide(row_of(te.STUB, name), p, silicon_, Settings())
    assert [part for part in found if part in (told.name if isinstance(told, Accepted) else str(told.reasons))] == found


@pytest.mark.parametrize("are_same, is_refused", [(True, False), (False, True)])
def test_a_fault_of_masks_is_none_of_packed_sequences_that_need_no_mask(te_is_there, are_same, is_refused):
    """Sequences with keys of their own become a mask for cuDNN, and then it is."""
    structure = f"PackedUnread(8, 8, 'bottom_right', are_same={are_same})"
    p = problem(device="cuda", dtype="bfloat16", structure=structure, mask="bool", mask_shape="11qk", needs_grad=True)
    p = p.replace(q_len=192, kv_len=192)
    [told] = candidates.decide(row_of(te.STUB, "te_fused"), p, silicon(te.STUB, "te_fused"), Settings())
    assert isinstance(told, Rejected) is is_refused
    assert ("with a mask and q_len % 128 == 64" in str(told)) is is_refused and (
        is_refused or "packed" in told.conversions
    ), told


@pytest.mark.parametrize("name", ["te_fused", "te_flash"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_sequences_are_told_as_they_lie(te_is_there, name, is_causal):
    """Lengths that lie on a GPU stay there: TE reads none where it is told the longest ones."""
    lengths = (5, 0, 9)
    cu = torch.tensor([0, 5, 5, 14], dtype=torch.int32)
    q, k, v = qkv(b=1, hq=4, hkv=2, sq=14, skv=14, dtype=torch.bfloat16, memory="transposed")
    corner = "top_left" if is_causal else ""
    mask = PackedUnread(5, 5, corner, are_same=True, sequences=Sequences(cu, cu, 9, 9, (14, 14)))
    found, call = bound(name, q, k, v, mask)
    assert found == f"{name}+packed"
    seen = torch.block_diag(*(torch.ones(n, n).tril() if is_causal else torch.ones(n, n) for n in lengths)).bool()
    hold(expect(q, k, v, seen[None, None]), call, q, k, v, mask)
    [asked] = [one for function, one in stubs.calls if function == "AttentionParams"]
    assert asked["qkv_layout"] == "thd_thd_thd" and (asked["num_tokens_q"], asked["batch_size"]) == (14, 3)
    told = next(
        one for function, one in stubs.calls if function.endswith(".forward") and one["qkv_layout"] == "thd_thd_thd"
    )
    assert told["cu_seqlens_q"] is cu and told["cu_seqlens_kv"] is cu and told["query_layer"].data_ptr() == q.data_ptr()
    assert told["attn_mask_type"] == ("padding_causal" if is_causal else "padding")
