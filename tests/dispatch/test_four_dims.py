"""Calls of F.sdpa that are not (b, h, s, d), or that it broadcasts: served as views of such a call, and as F.sdpa answers.

F.sdpa takes its math for them: the output is contiguous, may be changed in place, and its gradients may be differentiated.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from building import expect
from fakes import FAST, quick_wins

import fastattn
from fastattn import sdpa
from fastattn.dispatch import drop_in, four_dims

F_sdpa = F.scaled_dot_product_attention
pytestmark = pytest.mark.usefixtures("one_thread")
SEEN = torch.rand(4, 5, 7) < 0.7
SEEN[..., 0] = True


def drawn(*shape):
    return torch.randn(*shape)


def qkv(*before, q_len=5, kv_len=7, d=8, kv=None):
    """q, k, v with these dimensions before the last two; kv: k's and v's, where they are others."""
    kv = before if kv is None else kv
    return [drawn(*dims, n, d) for dims, n in ((before, q_len), (kv, kv_len), (kv, kv_len))]


def sequence_first(*before, d=8):
    """(heads, s, d) views of (s, heads, d) memory, as nn.MultiheadAttention once made them."""
    return [drawn(n, *before, d).movedim(0, -2) for n in (5, 7, 7)]


CALLS = {
    "2-D, a mask": (qkv(), {"attn_mask": SEEN[0]}),
    "3-D, causal": (qkv(4), {"is_causal": True}),
    "3-D, a 3-D bias": (qkv(4), {"attn_mask": drawn(4, 5, 7)}),
    "3-D, an int scale": (qkv(4), {"scale": 1}),
    "3-D, sequence first": (sequence_first(4), {}),
    "3-D, GQA": (qkv(4, kv=(2,)), {"enable_gqa": True}),
    "3-D, one head of keys": (qkv(4, kv=(1,)), {}),
    "5-D, a 3-D mask": (qkv(2, 3, 4), {"attn_mask": SEEN}),
    "6-D": (qkv(2, 1, 3, 4), {"scale": 0.3}),
    "a 3-D mask": (qkv(2, 4), {"attn_mask": SEEN}),
    "keys of one batch entry, GQA": (qkv(3, 4, kv=(1, 2)), {"enable_gqa": True}),
    "one query for many keys": (qkv(1, 4, kv=(3, 4)), {"attn_mask": SEEN}),
    "one head and one batch entry": (qkv(3, 4, kv=(1, 1)), {}),
}


@pytest.fixture(autouse=True)
def counted_anew():
    fastattn.stats.reset()


@pytest.fixture
def quick(monkeypatch):
    return quick_wins(monkeypatch)


@pytest.fixture(params=["quick", "default"])
def winner(request, quick):
    """Each of these wins in turn: one that writes as it likes, and F.sdpa called on the views."""
    quick.costs[request.param] = FAST / 2
    return request.param


def as_four(name):
    """float64 attention's call of four dimensions for the same numbers, in plain words of each row."""
    (q, k, v), options = CALLS[name]
    mask = options.get("attn_mask")
    mask = mask[None] if mask is not None and mask.dim() == 3 else mask
    if q.dim() < 4:
        q, k, v = (x.reshape(1, -1, *x.shape[-2:]) for x in (q, k, v))
    if q.dim() > 4:
        q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
    batch = max(q.shape[0], k.shape[0])
    q, k, v = (x.expand(batch, *x.shape[1:]).clone() for x in (q, k, v))
    return expect(q, k, v, mask, scale=options.get("scale"), corners=("top_left",) if options.get("is_causal") else ())


@pytest.mark.parametrize("name", CALLS)
def test_fault_26_other_dimensions_are_served_as_views(name, winner):
    """Inputs of 2 to 6 dimensions, 3-D masks and broadcast batches are tuned and served as views, not passed on."""
    (q, k, v), options = CALLS[name]
    like = F_sdpa(q, k, v, **options)
    want = as_four(name)
    for _ in range(3):
        out = sdpa(q, k, v, **options)
        assert (out.shape, out.stride(), out.dtype) == (like.shape, like.stride(), like.dtype)
        assert want.forward(out.reshape(want.b, want.hq, want.sq, want.dv)) <= 1.0
    found = fastattn.stats()
    assert found["hits"] == 2 and found["misses"] == 1 and not found["passed_on"]
    assert all(served.startswith(winner) for served in found["served_by"])
    out.add_(torch.ones(1, requires_grad=True))  # as F.sdpa's may be, made without gradients


@pytest.mark.parametrize("name", CALLS)
def test_untuned_it_is_the_very_call_that_was_made(name, untuned):
    (q, k, v), options = CALLS[name]
    for _ in range(3):
        assert torch.equal(sdpa(q, k, v, **options), F_sdpa(q, k, v, **options))
    assert fastattn.stats()["hits"] == 2


TWICE = ("2-D, a mask", "3-D, causal", "3-D, GQA", "5-D, a 3-D mask", "keys of one batch entry, GQA")


@pytest.mark.parametrize("name", TWICE)
def test_fault_29_gradients_may_be_differentiated_as_those_of_f_sdpas_math(name, winner):
    """Of a call that F.sdpa answers by its math, gradients may be differentiated and outputs changed, whatever serves it."""
    (q, k, v), options = CALLS[name]
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    mask = options.get("attn_mask")
    if mask is not None and mask.dtype is not torch.bool:
        options = {**options, "attn_mask": mask.double()}

    def twice(attend):
        out = attend(q, k, v, **options)
        first = torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)
        return out, first, torch.autograd.grad(sum(x.square().sum() for x in first), (q, k, v))

    want = twice(F_sdpa)
    for _ in range(2):
        for ours, theirs in zip(twice(sdpa), want, strict=True):
            torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        out = sdpa(q, k, v, **options)
    out.mul_(2)
    out = sdpa(q, k, v, **options)
    out.mul_(2).sum().backward()  # changed in place, before its gradient is asked for
    theirs = torch.autograd.grad(2 * F_sdpa(q, k, v, **options).sum(), (q, k, v))
    torch.testing.assert_close((q.grad, k.grad, v.grad), theirs)


def test_a_growing_cache_in_three_dimensions_is_served_by_its_bucket(quick, monkeypatch):
    for n in range(100, 110):
        q, k, v = qkv(4, q_len=1, kv_len=n)
        torch.testing.assert_close(sdpa(q, k, v), F_sdpa(q, k, v))
        monkeypatch.setattr(drop_in, "drop_in", lambda *_: pytest.fail("a miss"))
    assert fastattn.stats()["hits"] == 9


def test_views_share_a_verdict_with_the_call_of_four_dimensions(quick):
    q, k, v = qkv(4)
    sdpa(q, k, v)
    sdpa(q[None], k[None], v[None])
    assert fastattn.stats()["tunings"] == 1


def test_a_view_that_would_be_a_copy_is_passed_on(quick):
    q, k, v = (drawn(2, 4, 3, 5, 8).transpose(1, 2) for _ in range(3))
    assert torch.equal(sdpa(q, k, v), F_sdpa(q, k, v))
    assert fastattn.stats()["passed_on"] == {four_dims.NO_VIEW.why: 1}


WRONG = {
    "2-D with enable_gqa": (qkv(), {"enable_gqa": True}),
    "2-D, a 3-D mask": (qkv(), {"attn_mask": SEEN}),
    "3-D, a 4-D mask": (qkv(4), {"attn_mask": SEEN[None]}),
    "3-D, other heads": (qkv(4, kv=(2,)), {}),
    "batches of two sizes": (qkv(3, 4, kv=(2, 4)), {}),
    "3-D, both": (qkv(4), {"attn_mask": SEEN[0], "is_causal": True}),
    "a 3-D mask, both": (qkv(2, 4), {"attn_mask": SEEN, "is_causal": True}),
    "broadcast, both": (qkv(2, 4, kv=(1, 4)), {"attn_mask": SEEN[0], "is_causal": True}),
    "another head_dim_v, both": ([*qkv(2, 4)[:2], drawn(2, 4, 7, 4)], {"attn_mask": SEEN[0], "is_causal": True}),
    "dropout, both": (qkv(2, 4), {"attn_mask": SEEN[0], "is_causal": True, "dropout_p": 0.5}),
    "a bias that asks for a gradient, both": (
        qkv(2, 4),
        {"attn_mask": drawn(5, 7).requires_grad_(), "is_causal": True},
    ),
    "a mask of two batches": (qkv(1, 4), {"attn_mask": torch.ones(2, 1, 5, 7, dtype=torch.bool)}),
}


@pytest.mark.parametrize("name", WRONG)
def test_fault_26_what_f_sdpa_refuses_is_still_refused(name, quick):
    (q, k, v), options = WRONG[name]
    with pytest.raises((RuntimeError, IndexError)) as theirs:
        F_sdpa(q, k, v, **options)
    for _ in range(2):
        with pytest.raises(theirs.type):
            sdpa(q, k, v, **options)


def test_a_torch_that_broadcasts_no_batch_says_so_itself(quick, monkeypatch):
    monkeypatch.setattr(four_dims, "f_sdpa_broadcasts", lambda: False)
    q, k, v = qkv(3, 4, kv=(1, 4))
    sdpa(q, k, v)
    assert list(fastattn.stats()["passed_on"]) == [
        "F.sdpa alone takes these arguments, or says what is wrong with them"
    ]


def test_what_is_stored_serves_deterministic_algorithms_too(quick):
    q, k, v = qkv(4)
    sdpa(q, k, v)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            sdpa(q, k, v)
    finally:
        torch.use_deterministic_algorithms(False)
    found = fastattn.stats()
    assert found["tunings"] == 1 and found["hits"] == 1 and not found["passed_on"]
