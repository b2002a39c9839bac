"""The matmul family beyond what all kernels are held to: float masks beside which half precision has no room for scores."""

from __future__ import annotations

import pytest
import torch
from fakes import qkv
from torch.nn.functional import scaled_dot_product_attention as sdpa

import fastattn

HALF = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("far", [torch.finfo(torch.float16).min, -1e4, -100.0, 1e4], ids=str)
def test_rows_whose_whole_mask_is_far_from_zero_are_as_f_sdpa_has_them(far, dtype):
    """Such a row is not hidden: its weights are those of its scores, which F.sdpa adds in float32."""
    q, k, v = (2 * x for x in qkv(64, head_dim=32, dtype=dtype))
    mask = torch.zeros(64, 64, dtype=dtype)
    mask[5:9], mask[20:30, 10:] = far, -torch.inf
    want = sdpa(*(x.double() for x in (q, k, v)), mask.double())
    of_sdpa = (sdpa(q, k, v, mask) - want).abs().max()
    assert (fastattn.attention(q, k, v, mask, kernel="matmul") - want).abs().max() <= 2 * of_sdpa


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
