"""window, softcap, return_lse, score_mod and BlockMask: every option x layout x GQA x dtype, or refused by name.

Dropout has test_dropout.py, the compiled flex kernel test_flex.py.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from building import (
    DTYPES,
    HALF,
    accepted,
    corner,
    expect,
    hold,
    lse_is_coarse,
    mask_of,
    name_of,
    qkv,
    rung_of,
    without_lse,
)
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn import NoKernelError, attention, sdpa
from fastattn.dispatch.attention import entries
from fastattn.dispatch.explain import explain
from fastattn.kernels import registry
from fastattn.planning.conversions import blocks
from fastattn.problems import masks

pytestmark = pytest.mark.usefixtures("untuned", "one_thread")  # test_random_problems.py uses several threads
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
BOTTOM = masks.Causal("bottom_right")

# name -> (mask: (letters, kind) or a structured value, options)
OPTIONS = {
    "window": (None, {"window": (5, 2)}),
    "window to the left": (None, {"window": (5, -1)}),
    "window to the right": (None, {"window": (None, 3)}),
    "window of one key": (None, {"window": (0, 0)}),
    "window, causal": (None, {"window": (6, 0), "is_causal": True}),
    "window, bottom right": (BOTTOM, {"window": (6, -1)}),
    "window and mask": (("b11k", torch.bool), {"window": (6, 6)}),
    "window and bias": (("1hqk", "float"), {"window": (6, 0), "is_causal": True}),
    "softcap": (None, {"softcap": 1.5}),
    "softcap, causal": (None, {"softcap": 1.5, "is_causal": True}),
    "softcap and mask": (("bhqk", torch.bool), {"softcap": 1.5}),
    "softcap and bias": (("1hqk", "float"), {"softcap": 1.5}),
    "softcap and window": (BOTTOM, {"softcap": 2, "window": (7, 0)}),
    "lse": (None, {"return_lse": True}),
    "lse, causal": (None, {"return_lse": True, "is_causal": True}),
    "lse, bottom right": (BOTTOM, {"return_lse": True}),
    "lse and mask": (("bhqk", torch.bool), {"return_lse": True}),
    "lse and bias, causal": (("1hqk", "float"), {"return_lse": True, "is_causal": True}),
    "lse, window and softcap": (None, {"return_lse": True, "window": (4, 4), "softcap": 1.5}),
}
SHAPES = {
    "MHA": {"sq": 19, "skv": 19},
    "GQA": {"hq": 6, "hkv": 2, "sq": 21, "skv": 13},
    "more keys": {"hq": 4, "hkv": 2, "sq": 9, "skv": 30, "dv": 24},
    "decode": {"hq": 4, "hkv": 2, "sq": 1, "skv": 40},
}
# shape -> (layout, with gradients): every layout with GQA both ways, the other shapes once each way
WAYS = {
    "MHA": (("bhsd", True), ("sbhd", False)),
    "GQA": tuple((layout, grad) for layout in ("bhsd", "bshd", "sbhd") for grad in (False, True)),
    "more keys": (("bhsd", False), ("bshd", True)),
    "decode": (("bshd", False), ("bhsd", True)),
}


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 1 KiB of scores, so that small problems are cut too."""
    monkeypatch.setattr(blocks, "CHUNK_BYTES", 1024)
    monkeypatch.setattr(blocks, "CAST_BYTES", 1024)


def made(name, shape, dtype, layout, grad):
    """(q, k, v, mask, options) of a row."""
    mask, options = OPTIONS[name]
    q, k, v = qkv(**SHAPES[shape], dtype=dtype, layout=layout, grad=grad)
    if isinstance(mask, tuple):
        sizes = SHAPES[shape]
        kind = dtype if mask[1] == "float" else mask[1]
        mask = mask_of(mask[0], kind, 2, sizes.get("hq", 4), sizes["sq"], sizes["skv"])
        mask.requires_grad_(grad and kind is not torch.bool)
    return q, k, v, mask, options


def held(q, k, v, mask, options, layout, names):
    drawn = corner(mask, options.get("is_causal", False))
    more = {"window": options.get("window"), "softcap": options.get("softcap", 0.0)}
    want = expect(q, k, v, mask, layout=layout, corners=drawn, **more)
    for name in names:
        rung = rung_of(name or "", q.dtype)
        call = partial(attention, layout=layout, kernel=name, **options)
        if name and options.get("return_lse") and lse_is_coarse(name, q.dtype):
            call = without_lse(call)
        hold(want, call, q, k, v, mask, rung)


@by_dtype
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(name, shape, dtype, small_blocks):
    """Every candidate that accepts an option obeys it, forward and backward, in every layout."""
    ways = WAYS[shape]
    if dtype is not torch.float32:  # half of them, the other half dtype has the others
        ways = ways[HALF.index(dtype) :: 2]
    for layout, grad in ways:
        q, k, v, mask, options = made(name, shape, dtype, layout, grad)
        with nullcontext() if grad else torch.no_grad():
            names = [n for n in accepted(q, k, v, mask, layout, **options) if n.split("+")[0] != "flex"]
            assert names
            held(q, k, v, mask, options, layout, [None, *names])


@by_dtype
@pytest.mark.parametrize("name", ["window, causal", "softcap, causal", "window, bottom right", "softcap and window"])
def test_flex_unfused(name, dtype):
    """flex_attention's own math, which small problems take; compiled it is in test_flex.py."""
    q, k, v, mask, options = made(name, "GQA", dtype, "bshd", False)
    held(q, k, v, mask, options, "bshd", ["flex"])


REFUSED = {
    "softcap": (
        {"softcap": 2.0},
        {"default", "torch_flash", "torch_math", "matmul_shifted"},
        "softcap (2) is not supported",
    ),
    "lse": (
        {"return_lse": True},
        {"default", "torch_math", "matmul_shifted"},
        "return_lse: the log-sum-exp is not supported",
    ),
    "dropout": ({"dropout_p": 0.5}, {"torch_flash", "matmul", "matmul_mixed", "flex"}, "dropout is not supported"),
    "score_mod": ({"score_mod": lambda s, *_: s}, {"default", "matmul", "sdpa_math"}, "a score_mod is not supported"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_kernel_cannot_do_it_refuses_by_name(what):
    options, refusing, reason = REFUSED[what]
    q, k, v = qkv(dtype=torch.bfloat16)
    said = {t.candidate: t.reason or "" for t in explain(q, k, v, **options).rows}
    assert {name for name, why in said.items() if reason in why} >= refusing
    for name in refusing:
        with pytest.raises(NoKernelError, match="is not supported"):
            attention(q, k, v, kernel=name, **options)


CHANGES = {
    "a mask bit": ({}, {"mask": True}),
    "the scale": ({"scale": 0.25}, {"scale": 0.3}),
    "the window": ({"window": (3, 3)}, {"window": (3, 4)}),
    "the window's left": ({"window": (3, 0), "is_causal": True}, {"window": (4, 0), "is_causal": True}),
    "the softcap": ({"softcap": 1.0}, {"softcap": 1.1}),
    "is_causal": ({}, {"is_causal": True}),
    "the corner": ({"mask": masks.Causal()}, {"mask": BOTTOM}),
    "dropout": ({}, {"dropout_p": 0.5}),
    "score_mod": ({"score_mod": lambda s, b, h, i, j: s}, {"score_mod": lambda s, b, h, i, j: s + 0.1 * j}),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kernel", [k.name for k in registry.rows() if "cpu" in k.devices])
def test_fault_05_no_option_is_silently_dropped(kernel, change):
    """No option is silently dropped: with a mask or option changed a kernel's output changes, or it refuses it by name."""
    dtype = torch.bfloat16 if kernel in ("matmul_mixed", "matmul_shifted") else torch.float32
    q, k, v = qkv(sq=16, skv=20, dtype=dtype)
    outs = []
    for options in CHANGES[change]:
        options = dict(options)
        mask = options.pop("mask", None)
        if mask is True:
            mask = torch.ones(16, 20, dtype=torch.bool)
            mask[3, 2] = False
        names = [n for n in accepted(q, k, v, mask, **options) if n.split("+")[0] == kernel]
        if not names:
            with pytest.raises(NoKernelError):
                attention(q, k, v, mask, kernel=kernel, **options)
            return
        outs.append([attention(q, k, v, mask, kernel=name, **options) for name in names])
    for before in outs[0]:
        assert all((before.float() - after.float()).abs().max() > 1e-3 for after in outs[1])


@by_dtype
def test_the_log_sum_exp_merges_two_halves(dtype):
    """What it is for: attention over keys in two parts is attention over all of them."""
    q, k, v = qkv(sq=17, skv=48, dtype=dtype)
    parts = [attention(q, k[:, :, i : i + 24], v[:, :, i : i + 24], return_lse=True) for i in (0, 24)]
    total = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum((lse - total).exp()[..., None] * out.float() for out, lse in parts)
    whole, lse = attention(q, k, v, return_lse=True)
    assert (lse - total).abs().max() < 16 * 2**-24 * (1 + lse.abs().max())
    u = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert (merged - whole.float()).abs().max() <= 8 * u * v.float().abs().max()


def test_the_log_sum_exp_is_minus_infinity_where_nothing_is_visible():
    q, k, v = qkv(sq=6, skv=5)
    mask = torch.ones(6, 5, dtype=torch.bool)
    mask[2] = False
    bias = torch.zeros(6, 5).masked_fill(~mask, -math.inf)
    for given in (mask, bias):
        for name in accepted(q, k, v, given, return_lse=True):
            out, lse = attention(q, k, v, given, return_lse=True, kernel=name)
            assert (lse[:, :, 2] == -math.inf).all() and not out[:, :, 2].any(), name
            assert lse[:, :, [0, 1, 3, 4, 5]].isfinite().all(), name


BAD = {
    "window of three": ({"window": (1, 2, 3)}, ValueError, r"window must be \(left, right\).*got \(1, 2, 3\)"),
    "window of -2": ({"window": (-2, 0)}, ValueError, "numbers of keys >= 0"),
    "window of floats": ({"window": (1.0, 2)}, ValueError, "window must be"),
    "window as a number": ({"window": 4}, ValueError, "got 4"),
    "softcap below 0": ({"softcap": -1.0}, ValueError, "softcap must be >= 0"),
    "softcap that is no number": ({"softcap": "2"}, TypeError, "softcap must be float, got str"),
    "dropout above 1": ({"dropout_p": 1.5}, RuntimeError, "dropout_p must be between 0 and 1, got 1.5"),
    "return_lse=1": ({"return_lse": 1}, TypeError, "return_lse must be bool, got int"),
    "score_mod no function": ({"score_mod": 3}, TypeError, "score_mod must be a function"),
    "softcap and score_mod": ({"softcap": 1.0, "score_mod": lambda s, *_: s}, ValueError, "ambiguous"),
    "two diagonals": ({"mask": BOTTOM, "is_causal": True, "window": (2, 0)}, ValueError, "either diagonal"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_options_are_refused_with_their_value(what):
    options, kind, text = BAD[what]
    q, k, v = qkv(sq=8, skv=11)
    with pytest.raises(kind, match=text):
        attention(q, k, v, **options)


def test_a_window_that_hides_nothing_is_none():
    q, k, v = qkv()
    assert torch.equal(attention(q, k, v, window=(-1, None)), attention(q, k, v))


def test_decoding_in_a_window_is_decoding_on_a_slice():
    """One entry serves a growing cache, and its kernel sees only the keys of the window."""
    for layout, dim in (("bhsd", 2), ("bshd", 1)):
        q, k, v = qkv(hq=4, hkv=2, sq=1, skv=90, layout=layout)
        for kv_len in (20, 40, 60, 61, 62, 90):
            kc, vc = k.narrow(dim, 0, kv_len), v.narrow(dim, 0, kv_len)
            first = max(0, kv_len - 51)
            out = attention(q, kc, vc, BOTTOM, layout, window=(50, 0))
            want = attention(
                q, kc.narrow(dim, first, kv_len - first), vc.narrow(dim, first, kv_len - first), None, layout
            )
            assert torch.equal(out, want), kv_len
    assert "x 51" in str(explain(q, k, v, BOTTOM, "bshd", window=(50, 0)).problem).replace("on 51", "x 51")


@pytest.mark.parametrize("name", [n for n in OPTIONS if "lse" not in n or n == "lse"])
def test_where_nothing_may_be_learnt_options_hold_too(name):
    """Under a dispatch mode or torch.func the plain form serves: the same numbers, and no more entries."""
    q, k, v, mask, options = made(name, "GQA", torch.float32, "bhsd", False)
    ours = outputs(attention(q, k, v, mask, **options))
    met = dict(entries.table)

    def call(q, k, v):
        return attention(q, k, v, mask, **options)

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Mode():
        inside = outputs(call(q, k, v))
    mapped = outputs(torch.vmap(call)(q[None], k[None], v[None]))
    assert entries.table == met
    for want, once, many in zip(ours, inside, mapped, strict=True):
        torch.testing.assert_close(once, want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(many[0], want, atol=1e-5, rtol=1e-5)
    if isinstance(mask, torch.Tensor):
        both = outputs(torch.vmap(lambda mask: attention(q, k, v, mask, **options))(torch.stack([mask, mask.flip(-1)])))
        flipped = outputs(attention(q, k, v, mask.flip(-1), **options))
        for many, want, other in zip(both, ours, flipped, strict=True):
            torch.testing.assert_close(many[0], want, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(many[1], other, atol=1e-5, rtol=1e-5)
            assert not torch.equal(want, other)


def outputs(found):
    return found if isinstance(found, tuple) else (found,)


def test_the_drop_in_never_takes_more_than_f_sdpa_does():
    q, k, v = qkv(sq=8, skv=11)
    with pytest.raises(TypeError):
        sdpa(q, k, v, window=(1, 1))
    assert torch.equal(sdpa(q, k, v, is_causal=True), F.scaled_dot_product_attention(q, k, v, is_causal=True))


def test_decoding_in_a_window_is_tuned_on_the_keys_it_sees():
    q, k, v = qkv(hq=4, hkv=2, sq=1, skv=90)
    e = explain(q, k, v, BOTTOM, window=(50, 0), tune=True)
    assert any(t.time_us for t in e.rows), str(e)
