"""The matmul family beyond what all kernels are held to: float masks beside which half precision has no room for scores."""

from __future__ import annotations

import pytest
import torch
from fakes import qkv
from torch.nn.functional import scaled_dot_product_attention as sdpa

import fastattn

HALF = [torch.float16, torch.bfloat16]


FARS = pytest.mark.parametrize("far", [torch.finfo(torch.float16).min, -1e4, -100.0, -63.0, -20.0, 1e4], ids=str)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@FARS
def test_rows_whose_whole_mask_is_far_from_zero_are_as_f_sdpa_has_them(far, dtype):
    """Such a row is not hidden: its weights are those of its scores, which F.sdpa adds in float32."""
    q, k, v = (2 * x for x in qkv(64, head_dim=32, dtype=dtype))
    mask = torch.zeros(64, 64, dtype=dtype)
    mask[5:9], mask[20:30, 10:] = far, -torch.inf
    want = sdpa(*(x.double() for x in (q, k, v)), mask.double())
    of_sdpa = (sdpa(q, k, v, mask) - want).abs().max()
    assert (fastattn.attention(q, k, v, mask, kernel="matmul") - want).abs().max() <= 2 * of_sdpa


@pytest.mark.parametrize("told", [{"is_causal": True}, {"window": (7, 0)}], ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@FARS
def test_the_keys_near_zero_may_be_those_that_a_band_hides(far, dtype, told):
    """Padding on the left: a row of it sees nothing but padding before itself."""
    q, k, v = (2 * x for x in qkv(64, head_dim=32, dtype=dtype, grad=True))
    mask = torch.zeros(1, 1, 1, 64, dtype=dtype)
    mask[..., :20] = far

    def both(attend):
        out = attend()
        return out, *torch.autograd.grad(out.float().sum() + out.float().square().sum(), given)

    i, j = torch.arange(64)[:, None], torch.arange(64)
    seen = (j <= i) & (j >= i - told.get("window", (64, 0))[0])
    dense = mask.double().masked_fill(~seen, -torch.inf)
    given = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = both(lambda: sdpa(*given, dense))
    given = [x.detach().requires_grad_() for x in (q, k, v)]
    stock = both(lambda: sdpa(*given, dense.to(dtype)))
    ours = both(lambda: fastattn.attention(*given, mask, kernel="matmul", **told))
    for found, of_sdpa, exact in zip(ours, stock, want, strict=True):
        assert (found - exact).abs().max() <= 4 * (of_sdpa - exact).abs().max()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_scores_stay_in_half_precision_beside_other_masks(dtype, monkeypatch):
    """To look costs a pass over the mask, float32 many times that."""
    from fastattn.kernels.adapters import matmul

    def refuse(*_):
        raise AssertionError("cast to float32")

    monkeypatch.setattr(matmul, "in_room", refuse)
    q, k, v = qkv(64, dtype=dtype)
    hidden = torch.zeros(64, 64, dtype=dtype).masked_fill(torch.ones(64, 64, dtype=torch.bool).triu(1), -torch.inf)
    hidden[3] = -torch.inf
    for mask in (None, torch.randn(64, 64, dtype=dtype), hidden, hidden == 0):
        fastattn.attention(q, k, v, mask, kernel="matmul")


def test_a_backward_works_in_the_memory_of_the_one_before(monkeypatch):
    """Whatever it holds, or returns, each of its rooms is free again when it is asked for."""
    from fastattn.kernels import workspace

    fresh = []
    monkeypatch.setattr(workspace, "_make_others_forget", lambda room: fresh.append(room))
    q, k, v = qkv(256, heads=64, head_dim=16, dtype=torch.bfloat16, grad=True)  # in several blocks
    bias = torch.zeros(256, 256, dtype=torch.bfloat16, requires_grad=True)

    def train():
        torch.autograd.grad(fastattn.attention(q, k, v, bias, kernel="matmul+recompute").sum(), (q, k, v, bias))

    train()
    fresh.clear()
    train()
    assert not fresh
