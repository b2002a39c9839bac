"""xFormers' and SageAttention's functions by their definition, and the names of missing packages answered by ours."""

import importlib
import json
import sys
from inspect import signature
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn.compat import install, sageattention, uninstall, xformers
from fastattn.compat.sageattention import sageattn, sageattn_varlen

SIGNATURES = Path(__file__).parents[1] / "support" / "signatures"
SAME = {"atol": 1e-10, "rtol": 1e-8}


@pytest.fixture(autouse=True)
def untuned_calls():
    with fastattn.options.scope(mode="cached"):
        yield


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(q, k, v, seen=None, bias=None, scale=None):
    """xFormers' own: (b, m, h, k) tensors."""
    scores = torch.einsum("bmhk,bnhk->bhmn", q, k) * (scale or q.shape[3] ** -0.5)
    scores = scores if bias is None else scores + bias
    scores = scores if seen is None else scores.masked_fill(~seen, float("-inf"))
    return torch.einsum("bhmn,bnhk->bmhk", torch.softmax(scores, -1), v)


ROW, KEY = torch.arange(5)[:, None], torch.arange(7)
BIASES = {
    "LowerTriangularMask": (xformers.LowerTriangularMask(), ROW >= KEY),
    "LowerTriangularFromBottomRightMask": (xformers.LowerTriangularFromBottomRightMask(), ROW + 2 >= KEY),
    "LocalAttentionFromBottomRightMask": (
        xformers.LocalAttentionFromBottomRightMask(2, 1), (KEY >= ROW) & (KEY <= ROW + 3)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BIASES)
def test_biases(name):
    bias, seen = BIASES[name]
    q, k, v = draw(2, 5, 3, 8), draw(2, 7, 3, 8, seed=1), draw(2, 7, 3, 8, seed=2)
    torch.testing.assert_close(xformers.memory_efficient_attention(q, k, v, bias), reference(q, k, v, seen), **SAME)
    if name == "LocalAttentionFromBottomRightMask":
        seen = (torch.arange(7)[:, None] - KEY).abs() <= torch.where(torch.arange(7)[:, None] >= KEY, 2, 1)
        found = xformers.memory_efficient_attention(k, k, v, bias)
        torch.testing.assert_close(found, reference(k, k, v, seen), **SAME)


@pytest.mark.parametrize("corner", ["", "top_left", "bottom_right"])
def test_block_diagonal_masks(corner):
    queries, keys = [2, 3], [4, 3]
    bias = xformers.BlockDiagonalMask.from_seqlens(queries, keys)
    bias = {"": bias, "top_left": bias.make_causal(), "bottom_right": bias.make_causal_from_bottomright()}[corner]
    q, k, v = draw(1, 5, 3, 8), draw(1, 7, 3, 8, seed=1), draw(1, 7, 3, 8, seed=2)
    parts, i, j = [], 0, 0
    for n, m in zip(queries, keys, strict=True):
        rows, cols = torch.arange(n)[:, None] + (m - n if corner == "bottom_right" else 0), torch.arange(m)
        seen = rows >= cols if corner else None
        parts.append(reference(q[:, i : i + n], k[:, j : j + m], v[:, j : j + m], seen))
        i, j = i + n, j + m
    found = xformers.memory_efficient_attention(q, k, v, bias)
    torch.testing.assert_close(found, torch.cat(parts, 1), **SAME)
    assert [part.shape[1] for part in bias.split(found)] == queries
    bias, packed = xformers.BlockDiagonalMask.from_tensor_list([draw(2, 3, 4), draw(1, 5, 4)])
    assert bias.q_seqlen == (3, 3, 5) and packed.shape == (1, 11, 4)
    assert [part.shape for part in bias.split(packed)] == [(2, 3, 4), (1, 5, 4)]
    assert isinstance(bias.make_causal(), xformers.BlockDiagonalCausalMask)
    with pytest.raises(ValueError, match="the batch is 1, got"):
        xformers.memory_efficient_attention(draw(1, 4, 3, 8), draw(2, 4, 3, 8), draw(2, 4, 3, 8), bias)
    causal = xformers.BlockDiagonalCausalMask.from_seqlens([2, 3])
    assert causal.corner == "top_left" and causal.make_causal_from_bottomright().corner == "bottom_right"


def test_what_dinov2_asks_of_xformers():
    """It makes a bias of lengths, writes the batch sizes into it, and gathers and adds by xFormers' functions."""
    x = [draw(2, 3, 4), draw(1, 5, 4, seed=1)]
    bias = xformers.BlockDiagonalMask.from_seqlens([3, 3, 5])
    bias._batch_sizes = [2, 1]
    packed = xformers.index_select_cat([one.flatten(1) for one in x], [torch.tensor([1]), torch.tensor([0])]).view(
        1, -1, 4
    )
    assert torch.equal(packed, torch.cat([x[0][1], x[1][0]])[None])
    assert [part.shape for part in bias.split(torch.cat([one.flatten(0, 1) for one in x])[None])] == [
        (2, 3, 4),
        (1, 5, 4),
    ]
    assert all(map(torch.equal, xformers.unbind(x[0], 1), x[0].unbind(1)))
    more, scaling = draw(1, 3, 4, seed=2), draw(4, seed=3)
    found = xformers.scaled_index_add(x[0], torch.tensor([1]), more, scaling=scaling, alpha=0.5)
    assert torch.equal(found[0], x[0][0])
    torch.testing.assert_close(found[1], x[0][1] + 0.5 * scaling * more[0])


def test_tensors_of_three_and_five_dimensions_and_a_bias_that_is_added():
    q, k, v = draw(2, 5, 8), draw(2, 7, 8, seed=1), draw(2, 7, 8, seed=2)
    bias = draw(2, 5, 7, seed=3)
    found = xformers.memory_efficient_attention(q, k, v, bias, scale=0.3)
    want = reference(q[:, :, None], k[:, :, None], v[:, :, None], bias=bias[:, None], scale=0.3)[:, :, 0]
    torch.testing.assert_close(found, want, **SAME)
    q, k, v = draw(2, 5, 2, 3, 8), *(draw(2, 7, 2, 1, 8, seed=i).expand(-1, -1, -1, 3, -1) for i in (1, 2))
    found = xformers.memory_efficient_attention(q, k, v, output_dtype=torch.float32)
    want = reference(*(x.flatten(2, 3) for x in (q, k, v))).unflatten(2, (2, 3))
    torch.testing.assert_close(found, want.float())


def test_a_bias_of_groups_is_one_of_all_heads():
    q, k, v = draw(2, 5, 2, 3, 8), draw(2, 7, 2, 3, 8, seed=1), draw(2, 7, 2, 3, 8, seed=2)
    bias = draw(2, 2, 3, 5, 7, seed=3)
    want = reference(*(x.flatten(2, 3) for x in (q, k, v)), bias=bias.flatten(1, 2)).unflatten(2, (2, 3))
    torch.testing.assert_close(xformers.memory_efficient_attention(q, k, v, bias), want, **SAME)
    k = draw(2, 7, 2, 1, 8, seed=1).expand(-1, -1, -1, 3, -1)  # a key head for a group, and a value head for each
    want = reference(*(x.flatten(2, 3) for x in (q, k, v)), bias=bias.flatten(1, 2)).unflatten(2, (2, 3))
    torch.testing.assert_close(xformers.memory_efficient_attention(q, k, v, bias), want, **SAME)
    for query, given in ((q, bias[:, 0]), (q[:, :, 0], bias), (q[:, :, 0, 0], bias[:, 0])):
        with pytest.raises(ValueError, match=f"attn_bias must have {query.dim()} dimensions"):
            xformers.memory_efficient_attention(query, query, query, given)


def test_a_triangle_with_a_tensor_that_is_added():
    q, k, v = draw(2, 5, 3, 8), draw(2, 7, 3, 8, seed=1), draw(2, 7, 3, 8, seed=2)
    added = draw(2, 3, 5, 7, seed=3)
    bias = xformers.LowerTriangularMask().add_bias(added)
    want = reference(q, k, v, ROW >= KEY, added)
    torch.testing.assert_close(xformers.memory_efficient_attention(q, k, v, bias), want, **SAME)
    dense = bias.materialize((2, 3, 5, 7), torch.float64)
    torch.testing.assert_close(xformers.memory_efficient_attention(q, k, v, dense), want, **SAME)


# what xFormers' documentation prints for LocalAttentionFromBottomRightMask(window_left=1, window_right=2)
PRINTED = {
    (4, 4): [[1, 1, 1, 0], [1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]],
    (4, 5): [[1, 1, 1, 1, 0], [0, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1]],
}


@pytest.mark.parametrize("shape", PRINTED)
def test_materialize_is_what_xformers_documentation_prints(shape):
    bias = xformers.LocalAttentionFromBottomRightMask(window_left=1, window_right=2)
    assert bias.materialize(shape=shape).exp().tolist() == PRINTED[shape]


@pytest.mark.parametrize(
    "name", [*BIASES, "BlockDiagonalMask", "BlockDiagonalCausalMask", "BlockDiagonalCausalFromBottomRightMask"]
)
def test_a_bias_that_is_materialized_says_the_same(name):
    bias = BIASES[name][0] if name in BIASES else getattr(xformers, name).from_seqlens([2, 3], [4, 3])
    q, k, v = draw(1, 5, 3, 8), draw(1, 7, 3, 8, seed=1), draw(1, 7, 3, 8, seed=2)
    dense = bias.materialize((1, 3, 5, 7), torch.float64)
    assert dense.shape == (1, 3, 5, 7) and dense.dtype is torch.float64
    want = xformers.memory_efficient_attention(q, k, v, bias)
    torch.testing.assert_close(xformers.memory_efficient_attention(q, k, v, dense), want, **SAME)
    assert bias.materialize((5, 7)).dtype is torch.float32
    if name not in BIASES:
        with pytest.raises(ValueError, match=r"shape must end in \(5, 7\), got \(5, 6\)"):
            bias.materialize((5, 6))


def test_what_xformers_has_and_we_have_not_is_refused():
    q = draw(1, 4, 2, 8)
    with pytest.raises(NotImplementedError, match="op is not chosen here"):
        xformers.memory_efficient_attention(q, q, q, op="cutlass")
    with pytest.raises(TypeError, match="attn_bias str"):
        xformers.memory_efficient_attention(q, q, q, "causal")


def test_sageattn_is_exact():
    q, k, v = draw(2, 3, 5, 8), draw(2, 3, 5, 8, seed=1), draw(2, 3, 5, 8, seed=2)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(sageattn(q, k, v, is_causal=True), want, **SAME)
    found, lse = sageattn(*(x.transpose(1, 2) for x in (q, k, v)), "NHD", True, return_lse=True, smooth_k=False)
    torch.testing.assert_close(found.transpose(1, 2), want, **SAME)
    assert lse.shape == (2, 3, 5)
    ends = torch.tensor([0, 2, 5])
    found = sageattn_varlen(*(x[0].transpose(0, 1) for x in (q, k, v)), ends, ends, 3, 3, is_causal=True)
    two = torch.nn.functional.scaled_dot_product_attention(q[:1, :, :2], k[:1, :, :2], v[:1, :, :2], is_causal=True)
    torch.testing.assert_close(found[:2], two[0].transpose(0, 1), **SAME)
    for bad, kind in (({"tensor_layout": "BHSD"}, ValueError), ({"is_casual": True}, TypeError)):
        with pytest.raises(kind, match=next(iter(bad))):
            sageattn(q, k, v, **bad)


def test_sageattn_may_stand_in_the_place_of_f_sdpa(monkeypatch):
    """As SageAttention's own README has it; its callers pass what F.sdpa takes."""
    q, k, v = draw(2, 4, 5, 8), draw(2, 2, 5, 8, seed=1), draw(2, 2, 5, 8, seed=2)
    mask = torch.tensor([True, True, False, True, True]).expand(5, 5)
    stock = torch.nn.functional.scaled_dot_product_attention
    calls = (
        {"attn_mask": mask, "dropout_p": 0.0, "is_causal": False, "enable_gqa": True},
        {"scale": 0.3, "enable_gqa": True},
    )
    wanted = [stock(q, k, v, **options) for options in calls]
    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "scaled_dot_product_attention", sageattn)
        found = [torch.nn.functional.scaled_dot_product_attention(q, k, v, **options) for options in calls]
    torch.testing.assert_close(found, wanted, **SAME)
    with pytest.raises(TypeError, match="scale is F.sdpa's name of sm_scale"):
        sageattn(q, k, v, sm_scale=0.3, scale=0.2)


SIBLINGS = {
    # positional arguments behind is_causal, or behind the layout
    "sageattn_qk_int8_pv_fp16_cuda": (True, "per_warp", 0.3, "fp32", False, False, True),
    "sageattn_qk_int8_pv_fp8_cuda": (True, "per_thread", 0.3, "fp32+fp16", True, True, True),
    "sageattn_qk_int8_pv_fp8_cuda_sm90": (True, "per_thread", 0.3, "fp32+fp32", True, True),
    "sageattn_qk_int8_pv_fp16_triton": ("cuda", True, None, 0.3, True, True),
}


@pytest.mark.parametrize("name", SIBLINGS)
def test_sageattns_siblings_are_exact_too(name):
    function = getattr(sageattention, name)
    real = json.loads((SIGNATURES / "sageattention.json").read_text())["functions"][name]
    ours = [
        str(p).split(":")[0] + (f"={p.default!r}" if p.default is not p.empty else "")
        for p in signature(function).parameters.values()
    ]
    assert ", ".join(ours).replace("**options", "**kwargs") == real
    q, k, v = draw(2, 3, 5, 8), draw(2, 3, 5, 8, seed=1), draw(2, 3, 5, 8, seed=2)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    found, lse = function(q, k, v, "HND", *SIBLINGS[name])
    torch.testing.assert_close(found, want, **SAME)
    assert lse.shape == (2, 3, 5)
    for bad, kind in (({"tensor_layout": "BHSD"}, ValueError), ({"is_casual": True}, TypeError)):
        with pytest.raises(kind, match=f"{name}.*{next(iter(bad))}"):
            function(q, k, v, **bad)


def test_sageattns_mask_is_a_bool_one():
    q, k, v = draw(2, 3, 5, 8), draw(2, 3, 7, 8, seed=1), draw(2, 3, 7, 8, seed=2)
    seen = ROW >= KEY - 2
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen)
    found = sageattention.sageattn_qk_int8_pv_fp16_triton(q, k, v, attn_mask=seen)
    torch.testing.assert_close(found, want, **SAME)
    with pytest.raises(NotImplementedError, match=r"attn_mask must be bool, got torch\.float64"):
        sageattention.sageattn_qk_int8_pv_fp16_triton(q, k, v, attn_mask=seen.double())


USES = {
    "flash_attn": """
from flash_attn import flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func
from flash_attn.bert_padding import pad_input, unpad_input
from flash_attn.flash_attn_interface import flash_attn_with_kvcache
qkv = torch.randn(2, 6, 3, 4, 8)
out = flash_attn_qkvpacked_func(qkv, dropout_p=0.0, softmax_scale=None, causal=True)
assert torch.equal(out, flash_attn_func(*qkv.unbind(2), causal=True))
mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
tokens, indices, ends, longest, _ = unpad_input(qkv, mask)
packed = flash_attn_varlen_func(*tokens.unbind(1), ends, ends, longest, longest, causal=True)
assert torch.allclose(pad_input(packed, indices, 2, 6), out * mask[..., None, None], atol=1e-6)
""",
    "xformers": """
import xformers.ops as xops
from xformers.ops import fmha
from xformers.ops.fmha.attn_bias import BlockDiagonalMask
q = torch.randn(1, 6, 4, 8)
y = xops.memory_efficient_attention(q, q, q, attn_bias=xops.LowerTriangularMask())
bias = fmha.BlockDiagonalMask.from_seqlens([2, 4])
assert isinstance(bias, BlockDiagonalMask)
assert xops.memory_efficient_attention(q, q, q, bias.make_causal()).shape == y.shape
""",
    "sageattention": """
from sageattention import sageattn
q = torch.randn(1, 4, 6, 8)
attn_output = sageattn(q, q, q, tensor_layout="HND", is_causal=False)
""",
}


@pytest.mark.parametrize("name", USES)
def test_code_that_was_written_for_a_missing_package_runs(name):
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    install(name)
    install(name)
    try:
        exec(USES[name], {"torch": torch})  # as its README has it
        assert importlib.util.find_spec(name) is not None
        assert sys.modules[name].__version__.endswith("+fastattn") and not hasattr(sys.modules[name], "torch")
    finally:
        uninstall(name)
    assert name not in sys.modules and importlib.util.find_spec(name) is None
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(name)


def test_a_package_that_is_there_is_not_replaced(monkeypatch):
    monkeypatch.setitem(sys.modules, "sageattention", sys)
    with pytest.raises(ImportError, match="sageattention is installed"):
        install("sageattention")
    uninstall("sageattention")
    assert sys.modules["sageattention"] is sys
    with pytest.raises(ValueError, match="stands in for 'flash_attn', 'xformers', 'sageattention', got 'jax'"):
        install("jax")
