"""Transformer Engine's DotProductAttention by its documented meaning, pair by pair, in every format and mask type."""

from __future__ import annotations

import pytest
import torch

import fastattn
from fastattn.compat.transformer_engine import MASK_TYPES, DotProductAttention

SAME = {"atol": 1e-10, "rtol": 1e-8}
B, H, G, S, T, D, DV = 2, 4, 2, 5, 7, 8, 6
LENGTHS = ((5, 3), (7, 4))  # of queries and keys in each batch entry


@pytest.fixture(autouse=True)
def untuned_calls():
    with fastattn.options.scope(mode="cached"):
        yield


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Q, K, V = draw(B, S, H, D), draw(B, T, G, D, seed=1), draw(B, T, G, DV, seed=2)
PADDING = tuple(
    (torch.arange(n)[None] >= torch.tensor(of)[:, None])[:, None, None] for n, of in zip((S, T), LENGTHS, strict=True)
)
ENDS = tuple(torch.tensor([0, *torch.tensor(of).cumsum(0)], dtype=torch.int32) for of in LENGTHS)
HIDDEN = torch.rand(B, 1, S, T, generator=torch.Generator().manual_seed(3)) < 0.3


def sees(kind, window, b, i, j):
    """Whether query i sees key j of batch entry b."""
    q_len, kv_len = (LENGTHS[0][b], LENGTHS[1][b]) if "padding" in kind else (S, T)
    if i >= q_len or j >= kv_len or (kind == "arbitrary" and HIDDEN[b, 0, i, j]):
        return False
    at = i if kind in ("causal", "padding_causal") else i + kv_len - q_len
    left, right = window or (-1, -1)
    right = 0 if "causal" in kind else right
    return (left < 0 or j >= at - left) and (right < 0 or j <= at + right)


def reference(kind, window=None, bias=None, scale=D**-0.5):
    seen = torch.tensor([[[sees(kind, window, b, i, j) for j in range(T)] for i in range(S)] for b in range(B)])[
        :, None
    ]
    k, v = (x.repeat_interleave(H // G, 2) for x in (K, V))
    scores = torch.einsum("bihd,bjhd->bhij", Q, k) * scale
    scores = (scores if bias is None else scores + bias).masked_fill(~seen, float("-inf"))
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1).nan_to_num(0.0), v).flatten(2)


def in_format(form, *tensors):
    return [x.transpose(0, 1) if form == "sbhd" else x for x in tensors]


WINDOWS = [None, (2, 0), (2, 1), (-1, 2)]


@pytest.mark.parametrize("form", ["sbhd", "bshd"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("kind", MASK_TYPES)
def test_mask_types_windows_and_formats(kind, window, form):
    layer = DotProductAttention(H, (D, DV), G, attn_mask_type=kind, qkv_format=form)
    given = {
        "attention_mask": PADDING if "padding" in kind else HIDDEN if kind == "arbitrary" else None,
        "window_size": window,
    }
    if window is not None and (kind == "arbitrary" or ("causal" in kind and window == (-1, 2))):
        if kind == "arbitrary":
            with pytest.raises(ValueError, match="window_size"):
                layer(*in_format(form, Q, K, V), **given)
        return
    [found] = in_format(form, layer(*in_format(form, Q, K, V), **given))
    torch.testing.assert_close(found, reference(kind, window), **SAME)


@pytest.mark.parametrize("kind", [kind for kind in MASK_TYPES if "padding" in kind])
def test_lengths_by_cu_seqlens_say_the_same(kind):
    layer = DotProductAttention(H, (D, DV), G, qkv_format="bshd")
    found = layer(Q, K, V, cu_seqlens_q=ENDS[0], cu_seqlens_kv=ENDS[1], attn_mask_type=kind)
    torch.testing.assert_close(found, reference(kind), **SAME)


@pytest.mark.parametrize("window", [None, (2, 0)], ids=str)
@pytest.mark.parametrize("kind", [kind for kind in MASK_TYPES if "padding" in kind])
def test_packed_tokens(kind, window):
    layer = DotProductAttention(H, (D, DV), G, qkv_format="thd", attn_mask_type=kind)
    tokens = [x[~pad[:, 0, 0]] for x, pad in ((Q, PADDING[0]), (K, PADDING[1]), (V, PADDING[1]))]
    given = {"max_seqlen_q": S, "max_seqlen_kv": T, "window_size": window}
    if window is not None and kind == "padding":
        with pytest.raises(NotImplementedError, match="window_size with thd"):
            layer(*tokens, None, None, *ENDS, **given)
        return
    found = layer(*tokens, None, None, *ENDS, **given)
    torch.testing.assert_close(found, reference(kind, window)[~PADDING[0][:, 0, 0]], **SAME)


@pytest.mark.parametrize("kind", ["no_mask", "causal", "padding"])
def test_a_bias_a_scale_and_gradients(kind):
    bias = draw(1, H, S, T, seed=4)
    layer = DotProductAttention(H, (D, DV), G, qkv_format="bshd", attn_mask_type=kind, softmax_scale=0.3)
    q = Q.clone().requires_grad_()
    mask = PADDING if kind == "padding" else None
    found = layer(q, K, V, mask, core_attention_bias_type="post_scale_bias", core_attention_bias=bias)
    torch.testing.assert_close(found, reference(kind, bias=bias, scale=0.3), **SAME)
    assert torch.autograd.grad(found.sum(), q)[0].isfinite().all()


def test_dropout_is_of_training_alone():
    layer = DotProductAttention(H, (D, DV), G, 0.5, qkv_format="bshd")
    assert not torch.equal(layer(Q, K, V), layer(Q, K, V))
    torch.testing.assert_close(layer.eval()(Q, K, V), reference("causal"), **SAME)


REFUSED = {
    "an unknown format": (
        {"qkv_format": "bhsd"},
        {},
        ValueError,
        "qkv_format must be one of sbhd, bshd, thd, got 'bhsd'",
    ),
    "an unknown mask type": ({"attn_mask_type": "causual"}, {}, ValueError, "attn_mask_type must be one of"),
    "an unknown option": ({"windows": 1}, {}, TypeError, "unexpected keyword argument 'windows'"),
    "context parallelism": ({"cp_group": object()}, {}, NotImplementedError, "cp_group"),
    "a sink": ({"softmax_type": "learnable"}, {}, NotImplementedError, "softmax_type='learnable'"),
    "fp8": ({}, {"fp8_output": True}, NotImplementedError, "fp8_output=True"),
    "a cache": ({}, {"inference_params": object()}, NotImplementedError, "inference_params"),
    "ALiBi": ({}, {"alibi_slopes": torch.ones(4)}, NotImplementedError, "alibi_slopes"),
    "another diagonal": (
        {},
        {"bottom_right_diagonal": True},
        NotImplementedError,
        "bottom_right_diagonal=True with 'causal'",
    ),
    "a bias before the scale": (
        {},
        {"core_attention_bias_type": "pre_scale_bias"},
        NotImplementedError,
        "pre_scale_bias",
    ),
    "a bias without its type": (
        {},
        {"core_attention_bias": torch.ones(1)},
        ValueError,
        "core_attention_bias does not go",
    ),
    "padding without lengths": ({}, {"attn_mask_type": "padding"}, ValueError, "padding needs an attention_mask"),
    "arbitrary without a mask": ({}, {"attn_mask_type": "arbitrary"}, ValueError, "needs an attention_mask"),
    "other heads": ({"num_gqa_groups": 4}, {}, ValueError, r"made for \(query heads, groups\) \(4, 4\), got \(4, 2\)"),
    "packed without ends": ({"qkv_format": "thd"}, {}, ValueError, "thd goes with cu_seqlens_q"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_served_is_refused_by_name(name):
    made, given, kind, words = REFUSED[name]
    with pytest.raises(kind, match=words):
        DotProductAttention(H, (D, DV), **{"num_gqa_groups": G, "qkv_format": "bshd", **made})(Q, K, V, **given)


def test_what_changes_no_number_is_taken():
    layer = DotProductAttention(
        H, (D, DV), G, qkv_format="bshd", layer_number=3, name="attention", attention_type="cross"
    )
    torch.testing.assert_close(layer(Q, K, V, num_splits=1, fast_zero_fill=False), reference("causal"), **SAME)
