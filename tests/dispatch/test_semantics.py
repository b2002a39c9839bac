"""What attention() computes, against float64: every rule of the call, in fp32, bf16 and fp16, forward and backward."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from building import DTYPES, HALF, MEMORY, accepted, back, corner, expect, hold, mask_of, name_of, qkv, rung_of, to
from fakes import add, honest, made_up
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from fastattn import attention
from fastattn.planning.conversions import blocks
from fastattn.problems import masks

pytestmark = pytest.mark.usefixtures("untuned", "one_thread")  # test_random_problems.py uses several threads
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
LAYOUTS = ("bhsd", "bshd", "sbhd")
BOTTOM = masks.Causal("bottom_right")

# name -> (arguments of qkv, mask: (letters, kind) or a structured value, options). "float" is the dtype of q.
CASES = {
    "plain": ({}, None, {}),
    "one query": ({"sq": 1, "skv": 33}, None, {}),
    "one key": ({"sq": 9, "skv": 1}, None, {}),
    "one of each": ({"sq": 1, "skv": 1, "hq": 1, "b": 1}, None, {}),
    "GQA": ({"hq": 6, "hkv": 2}, None, {}),
    "GQA decode": ({"hq": 6, "hkv": 2, "sq": 1, "skv": 40}, None, {}),
    "GQA decode, mask per head": ({"hq": 6, "hkv": 2, "sq": 1, "skv": 40}, ("bh1k", torch.bool), {}),
    "GQA, bias per head": ({"hq": 6, "hkv": 2}, ("1hqk", "float"), {}),
    "MQA": ({"hq": 4, "hkv": 1, "skv": 50}, None, {}),
    "as many heads as queries": ({"hq": 5, "sq": 5, "skv": 7}, None, {}),
    "batch = heads = lengths = dims": ({"b": 4, "hq": 4, "sq": 4, "skv": 4, "d": 4}, ("bhqk", torch.bool), {}),
    "GQA, heads = lengths": ({"hq": 6, "hkv": 3, "sq": 6, "skv": 6}, ("bhqk", "float"), {"is_causal": True}),
    "wide v": ({"dv": 40}, None, {}),
    "narrow v": ({"dv": 8, "hq": 4, "hkv": 2}, ("11qk", torch.bool), {"is_causal": True}),
    "odd head dims": ({"d": 7, "dv": 3}, None, {}),
    "head dim 1": ({"d": 1}, None, {"is_causal": True}),
    "scale given": ({}, None, {"scale": 0.7}),
    "scale int": ({"d": 4}, None, {"scale": 1}),
    "scale 0": ({}, ("qk", torch.bool), {"scale": 0.0}),
    "scale 0, causal": ({}, None, {"scale": 0.0, "is_causal": True}),
    "scale negative": ({}, ("11qk", "float"), {"scale": -0.4}),
    "scale negative, causal GQA": ({"hkv": 2}, None, {"scale": -0.4, "is_causal": True}),
    "causal": ({}, None, {"is_causal": True}),
    "causal, more queries": ({"sq": 40, "skv": 21}, None, {"is_causal": True}),
    "causal, more keys": ({"sq": 21, "skv": 40}, None, {"is_causal": True}),
    "causal, one query": ({"sq": 1, "skv": 9}, None, {"is_causal": True}),
    "top left": ({"sq": 21, "skv": 40}, masks.Causal(), {}),
    "bottom right": ({}, BOTTOM, {}),
    "bottom right, more queries": ({"sq": 40, "skv": 21}, BOTTOM, {}),
    "bottom right, more keys": ({"sq": 21, "skv": 40, "hkv": 2}, BOTTOM, {}),
    "bottom right, one query": ({"sq": 1, "skv": 9}, BOTTOM, {}),
    "both corners": ({}, BOTTOM, {"is_causal": True}),
    "both corners, more queries": ({"sq": 40, "skv": 21}, BOTTOM, {"is_causal": True}),
    "both corners, more keys": ({"sq": 21, "skv": 40}, BOTTOM, {"is_causal": True}),
    "both corners, one query": ({"sq": 1, "skv": 9}, BOTTOM, {"is_causal": True}),
    "torch's upper left": ({"sq": 21, "skv": 40}, causal_upper_left(21, 40), {}),
    "torch's lower right": ({"sq": 21, "skv": 40}, causal_lower_right(21, 40), {}),
    "torch's lower right, more queries": ({"sq": 40, "skv": 21}, causal_lower_right(40, 21), {}),
    "torch's lower right and is_causal": ({"sq": 21, "skv": 40}, causal_lower_right(21, 40), {"is_causal": True}),
    "bool mask": ({}, ("bhqk", torch.bool), {}),
    "padding mask": ({"hkv": 2}, ("b11k", torch.bool), {}),
    "float mask": ({}, ("bhqk", "float"), {}),
    "float32 mask": ({}, ("11qk", torch.float32), {}),
    "mask and causal": ({"sq": 21, "skv": 40}, ("bhqk", torch.bool), {"is_causal": True}),
    "padding and causal": ({"sq": 40, "skv": 21}, ("b11k", torch.bool), {"is_causal": True}),
    "bias and causal": ({"hq": 4, "hkv": 2}, ("1hqk", "float"), {"is_causal": True}),
    "bias 1 and causal": ({}, ("11", "float"), {"is_causal": True}),
}
by_case = pytest.mark.parametrize("case", CASES)


def made(case, dtype, layout="bhsd", *, grad=False, mask_grad=False, **more):
    """(q, k, v, mask, options) of a row."""
    shape, mask, options = CASES[case]
    q, k, v = qkv(**{**shape, **more}, dtype=dtype, layout=layout, grad=grad)
    if isinstance(mask, tuple):
        b, h, sq, _ = back(layout, q).shape
        kind = dtype if mask[1] == "float" else mask[1]
        mask = mask_of(mask[0], kind, b, h, sq, back(layout, k).shape[2])
        if mask_grad and mask.dtype is not torch.bool:
            mask.requires_grad_()
    return q, k, v, mask, options


def held(q, k, v, mask, options, layout="bhsd", names=("",), cast=None):
    """Hold attention(), and the candidates named, to float64 with these arguments. Returns the last output."""
    drawn = corner(mask, options.get("is_causal", False))
    want = expect(q, k, v, mask, layout=layout, scale=options.get("scale"), corners=drawn, cast=cast)
    for name in names:
        call = partial(attention, layout=layout, kernel=name or None, **options)
        out = hold(want, call, q, k, v, mask, rung_of(name, want.dtype))
    return out


@by_case
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
def test_every_case(case, grad):
    """Without an order the default serves: what it is told is checked where the budgets are the smallest, in float32.

    test_every_candidate holds it in every dtype, as one of the candidates.
    """
    q, k, v, mask, options = made(case, torch.float32, grad=grad, mask_grad=grad)
    held(q, k, v, mask, options)
    held(q, k, v, mask, options)  # and as a hit


LENGTHS = (1, 2, 8, 33)


def without_flex(names):
    """Its import takes seconds; test_every_candidate has it."""
    return [name for name in names if name.split("+")[0] != "flex"]


@pytest.mark.parametrize("q_len", LENGTHS)
def test_fault_01_causal_is_torchs_triangle_at_any_lengths(q_len):
    """`is_causal` is torch's triangle, from the top left, at any two lengths; the other corner is asked for by name."""
    for kv_len in LENGTHS:
        q, k, v = qkv(b=1, hq=2, sq=q_len, skv=kv_len, d=8)
        for given, is_causal, diagonal in ((None, True, 0), (BOTTOM, False, kv_len - q_len)):
            visible = torch.ones(q_len, kv_len, dtype=torch.bool).tril(diagonal)
            want = expect(q, k, v, visible)
            names = without_flex(accepted(q, k, v, given, is_causal=is_causal))
            for name in (None, *names):
                out = attention(q, k, v, given, is_causal=is_causal, kernel=name)
                assert want.forward(out) <= 1.0, (name, kv_len, diagonal)


@pytest.mark.parametrize("d, dv", [(1, 1), (3, 40), (40, 40), (59, 59), (72, 64), (111, 128), (320, 320)])
def test_fault_14_any_head_dim(d, dv):
    """Head dims of any width are right, also where v's is another: the scale is the caller's, whatever is padded."""
    q, k, v = qkv(b=1, hq=2, sq=5, skv=9, d=d, dv=dv)
    held(q, k, v, None, {"is_causal": True}, names=["", *without_flex(accepted(q, k, v, is_causal=True))])


@pytest.mark.parametrize("given", [None, 0.3])
@pytest.mark.parametrize("d, dv", [(3, 3), (13, 16), (16, 5)])
def test_fault_14_a_padded_head_dim_changes_no_scale(d, dv, given, monkeypatch):
    widths = []

    def run(q, k, v, mask, a):
        widths.append((q.shape[3], k.shape[3], v.shape[3]))
        return honest(q, k, v, mask, a)

    add(monkeypatch, made_up("in_eights", run, head_dim_multiple=8))
    q, k, v = qkv(d=d, dv=dv)
    held(q, k, v, None, {"scale": given}, names=["in_eights+head_dim_pad"])
    assert widths and all(width % 8 == 0 for width in widths[-1])


@by_case
def test_fault_22_every_case_in_the_third_layout(case):
    """Every rule of the call holds in every layout, also where heads equal lengths and no shape could tell.

    test_every_candidate has the other two.
    """
    q, k, v, mask, options = made(case, torch.float32, "sbhd", grad=True, memory="transposed")
    held(q, k, v, mask, options, "sbhd")


@by_dtype
@by_case
def test_every_candidate(case, dtype, small_blocks):
    """Every candidate obeys every rule: with kernel=, forward and, where it has gradients, backward."""
    seen, ways = 0, (("bhsd", False), ("bshd", True))
    if dtype is not torch.float32:  # one of them, the other half dtype has the other
        ways = (ways[HALF.index(dtype)],)
    for layout, grad in ways:
        q, k, v, mask, options = made(case, dtype, layout, grad=grad, mask_grad=True)
        with nullcontext() if grad else torch.no_grad():
            names = accepted(q, k, v, mask, layout, **options)
            assert any(name.split("+")[0] == "default" for name in names)
            held(q, k, v, mask, options, layout, names)
            seen += len(names)
    assert seen >= 2 * len(ways)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 1 KiB of scores, so that small problems are cut too."""
    monkeypatch.setattr(blocks, "CHUNK_BYTES", 1024)
    monkeypatch.setattr(blocks, "CAST_BYTES", 1024)


MASKS_4D = ["".join(m) for m in itertools.product("b1", "h1", "q1", "k1")]


@by_dtype
@pytest.mark.parametrize("letters", ["qk", "1k", "q1", "11", *MASKS_4D])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_every_broadcast_of_a_mask(letters, kind, dtype, small_blocks):
    q, k, v = qkv(sq=6, skv=11, hkv=2, dtype=dtype, grad=True)
    mask = mask_of(letters, torch.bool if kind == "bool" else dtype, 2, 4, 6, 11)
    held(q, k, v, mask.requires_grad_(kind == "float"), {})
    with torch.no_grad():
        held(q, k, v, mask, {}, names=accepted(q, k, v, mask))


@by_dtype
@pytest.mark.parametrize("memory", MEMORY)
def test_fault_03_every_memory_form(memory, dtype):
    """However q, k and v lie in memory (strided, packed, expanded), the answer is that of float64."""
    forms_of = ((memory,) * 3, ("contiguous", memory, memory), (memory, "contiguous", "contiguous"))
    each = list(itertools.product(LAYOUTS, (16, 7), forms_of))
    for at, (layout, head_dim, forms) in enumerate(each):
        if at % len(DTYPES) == DTYPES.index(dtype):  # the other dtypes have the others
            q, k, v = qkv(b=3, hq=4, sq=4, skv=6, d=head_dim, memory=forms, dtype=dtype, layout=layout)
            held(q, k, v, None, {}, layout, ["", *accepted(q, k, v, None, layout)])


@pytest.mark.parametrize("memory", ["transposed", "packed", "cache_bshd", "seq_first"])
def test_gradients_of_views(memory):
    for layout in LAYOUTS:
        q, k, v = qkv(hq=4, hkv=2, sq=4, skv=9, memory=memory, layout=layout, grad=True)
        held(q, k, v, None, {"is_causal": True}, layout)


def test_packed_qkv_as_one_tensor():
    packed = torch.randn(2, 9, 3, 4, 16)
    q, k, v = packed.unbind(2)
    held(q, k, v, None, {"is_causal": True}, "bshd")


def test_one_tensor_as_q_k_and_v():
    x = torch.randn(2, 4, 9, 16)
    held(x, x, x, None, {})
    held(x, x.clone(), x, None, {})


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_can_be_viewed_with_heads_merged(memory, layout):
    """Wherever F.sdpa's own can: models do out.transpose(1, 2).view(b, s, heads * head_dim)."""
    q, k, v = qkv(b=3, hq=4, sq=9, memory=memory, layout=layout)
    theirs = F.scaled_dot_product_attention(*(back(layout, x) for x in (q, k, v)))
    can = can_merge(to(layout, theirs), layout)
    for name in accepted(q, k, v, None, layout):
        out = attention(q, k, v, layout=layout, kernel=name)
        assert can_merge(out, layout) or not can, name


def can_merge(out, layout):
    out = out.transpose(1, 2) if layout == "bhsd" else out
    try:
        out.view(*out.shape[:2], -1)
    except RuntimeError:
        return False
    return True


@by_dtype
def test_fault_02_rows_that_see_nothing_are_zeros_with_zero_gradients(dtype, small_blocks):
    """A row that sees nothing is zeros, with zero gradients, whichever kernel answers."""
    visible = torch.rand(2, 1, 9, 9) < 0.5
    visible[:, :, 2] = visible[:, :, 7] = False
    visible[1, :, :, :] = False
    bias = torch.randn(2, 1, 9, 9).masked_fill(~visible, float("-inf")).to(dtype)
    for mask, options in ((visible, {}), (bias, {}), (visible, {"is_causal": True})):
        q, k, v = qkv(sq=9, dtype=dtype, grad=True)
        for name in (None, *accepted(q, k, v, mask, **options)):
            out = attention(q, k, v, mask, kernel=name, **options)
            assert not out[:, :, [2, 7]].any() and not out[1].any()
            dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
            assert not dq[:, :, [2, 7]].any() and not any(g[1].any() for g in (dq, dk, dv))
            assert all(g.isfinite().all() and g[0].any() for g in (dq, dk, dv))


@pytest.mark.parametrize("dtype", HALF, ids=name_of)
def test_a_row_that_a_wider_mask_makes_very_low_is_not_hidden(dtype):
    """The lowest float32 has no like in half precision, where it would become -inf; transformers' masks have such rows."""
    q, k, v = qkv(sq=9, skv=9, dtype=dtype)
    mask = torch.zeros(2, 1, 9, 9).masked_fill(torch.rand(2, 1, 9, 9) < 0.5, torch.finfo(torch.float32).min)
    mask[0, 0, 3] = torch.finfo(torch.float32).min
    mask[1, 0, 4] = float("-inf")
    want = expect(q, k, v, mask)
    for kernel in accepted(q, k, v, mask):
        out = attention(q, k, v, mask, kernel=kernel)
        assert torch.allclose(out.double(), want.exact["out"], atol=0.05), kernel


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("empty", ["b", "hq", "sq", "skv", "d", "dv"])
def test_fault_17_lengths_of_zero(empty, grad):
    """Batches, heads, lengths and head dims of zero give what the definition gives, forward and backward."""
    sizes = {"b": 2, "hq": 4, "hkv": 4, "sq": 5, "skv": 6, "d": 8, "dv": 8, empty: 0}
    if empty == "hq":
        if torch.__version__ < "2.12":
            pytest.skip("F.sdpa of torch 2.11 ends the process where there are no heads (SIGFPE)")
        sizes["hkv"] = 0
    q, k, v = qkv(**sizes, grad=grad)
    for options in ({}, {"kernel": "sdpa_math"}):
        out = attention(q, k, v, **options)
        assert out.shape == (sizes["b"], sizes["hq"], 5 * (empty != "sq"), sizes["dv"])
        if empty == "skv":
            assert not out.any()  # a row without keys attends to nothing
        if empty == "d":
            torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out))
        if grad:
            found = torch.autograd.grad(out.sum(), (q, k, v), allow_unused=True)
            assert all(g is None or g.isfinite().all() for g in found)


@pytest.mark.parametrize("q_len, kv_len", [(5, 0), (0, 6), (1, 0)])
def test_every_candidate_takes_lengths_of_zero(q_len, kv_len):
    q, k, v = qkv(sq=q_len, skv=kv_len, hkv=2)
    for mask in (None, torch.ones(q_len, kv_len, dtype=torch.bool)):
        for name in accepted(q, k, v, mask):
            out = attention(q, k, v, mask, kernel=name)
            assert out.shape == q.shape and not out.any()


@pytest.mark.parametrize("cast", HALF, ids=name_of)
@pytest.mark.parametrize("kind", [None, "bool", "float32"])
def test_autocast_casts_as_f_sdpa_does(cast, kind):
    q, k, v = qkv(hkv=2, grad=True)
    mask = mask_of("11qk", torch.bool if kind == "bool" else torch.float32, 2, 4, 19, 19) if kind else None
    with torch.autocast("cpu", dtype=cast):
        theirs = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
        assert held(q, k, v, mask, {}, cast=cast).dtype is theirs.dtype is cast
        held(q, k, v, mask, {}, names=accepted(q, k, v, mask), cast=cast)


def test_fault_31_autocast_unites_mixed_dtypes_and_spares_float64():
    """Under autocast q, k and v of several dtypes are cast to one, as F.sdpa casts them, and float64 is left alone."""
    q, k, v = qkv(grad=True)
    mixed = (q, k.detach().bfloat16().requires_grad_(), v.detach().half().requires_grad_())
    wide = qkv(dtype=torch.float64, grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        held(*mixed, None, {}, cast=torch.bfloat16)
        assert attention(*wide).dtype is F.scaled_dot_product_attention(*wide).dtype is torch.float64


def test_autocast_that_is_left_leaves_no_trace():
    q, k, v = qkv()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(q, k, v).dtype is torch.bfloat16
    assert attention(q, k, v).dtype is torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(q, k, v).dtype is torch.bfloat16


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("hide", ["bool", "float", "causal", "bottom right"])
def test_bad_numbers_behind_a_mask_are_as_in_f_sdpa_or_finite(bad, where, hide):
    q, k, v = qkv(sq=70, skv=80 if hide == "bottom right" else 70)
    q, k, v = q[:1], k[:1], v[:1]
    {"k": k, "v": v}[where][:, :, -20:] = bad
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    visible[:, -20:] = False
    mask = {"bool": visible, "float": torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))}.get(hide)
    mask = BOTTOM if hide == "bottom right" else mask
    options = {"is_causal": hide == "causal"}
    dense = torch.ones_like(visible).tril(10) if mask is BOTTOM else mask
    theirs = F.scaled_dot_product_attention(q, k, v, dense, **options)
    whole = ("torch_math", "flex")  # they multiply everything: all of it is F.sdpa's own elsewhere
    names = [name for name in accepted(q, k, v, mask, **options) if name.split("+")[0] not in whole]
    assert len(names) >= 3
    for name in (None, *names):
        ours = attention(q, k, v, mask, kernel=name, **options)
        assert (ours.isfinite() | ~theirs.isfinite()).all(), name


def test_float64_and_parameters_are_served_too():
    q, k, v = (torch.nn.Parameter(x) for x in qkv(dtype=torch.float64))
    for name in accepted(q, k, v):
        out = attention(q, k, v, kernel=name)
        s = (q @ k.mT * 0.25).softmax(-1) @ v
        assert out.dtype is torch.float64 and (out - s).abs().max() < 40 * 2**-53
