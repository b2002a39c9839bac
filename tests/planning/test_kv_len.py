"""Keys padded to a multiple of 32: right wherever it is tried, and tried on a CPU with AMX alone."""

from dataclasses import replace

import pytest
import torch
from building import accepted, corner, expect, hold, qkv, without_lse

import fastattn
from fastattn import attention
from fastattn.environment.device import Device
from fastattn.planning.conversions import kv_len
from fastattn.problems.masks import Causal

NAME = "torch_flash+pad_lengths"


@pytest.fixture
def amx(monkeypatch):
    """A CPU that has AMX, for all that fastattn knows."""
    real = Device.of(torch.device("cpu"))
    made_up = replace(real, name=real.name + " amx_bf16")
    monkeypatch.setattr(Device, "of", staticmethod(lambda device: made_up))


@pytest.mark.parametrize("lengths", [(77, 77), (19, 33), (197, 31), (64, 509)], ids=str)
@pytest.mark.parametrize("case", ["plain", "causal", "lse", "gqa", "grad", "bshd"])
def test_padded_keys_are_not_seen(case, lengths, amx):
    is_causal, layout = case == "causal", "bshd" if case == "bshd" else "bhsd"
    q, k, v = qkv(2, 4, 2 if case == "gqa" else 4, *lengths, 16, dtype=torch.bfloat16, layout=layout)
    q, k, v = (x.requires_grad_(case == "grad") for x in (q, k, v))
    options = {"is_causal": is_causal, "layout": layout, "return_lse": case == "lse"}
    found = [name for name in accepted(q, k, v, **options) if "pad_lengths" in name]
    if is_causal and lengths[0] != lengths[1]:
        assert not found
        return
    assert NAME in found
    want = expect(q, k, v, None, layout=layout, corners=corner(None, is_causal))
    for name in found:
        call = lambda q, k, v, _, name=name: attention(q, k, v, kernel=name, **options)  # noqa: E731
        hold(want, without_lse(call) if case == "lse" else call, q, k, v)
        if case == "lse":
            whole = attention(q, k, v, kernel="sdpa_math", **options)[1]
            torch.testing.assert_close(attention(q, k, v, kernel=name, **options)[1], whole, atol=1e-2, rtol=1e-3)


def test_keys_that_would_be_seen_if_they_were_not_hidden(amx):
    """All scores are far below zero, the score of a key of zeros."""
    q, k, v = torch.full((1, 1, 20, 16), 8.0), torch.full((1, 1, 33, 16), -8.0), torch.randn(1, 1, 33, 16)
    q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
    hold(expect(q, k, v), lambda q, k, v, _: attention(q, k, v, kernel=NAME), q, k, v)


def test_where_it_is_tried(amx):
    def is_tried(q_len, keys, *more, dtype=torch.bfloat16, **options):
        return NAME in accepted(*qkv(1, 2, 2, q_len, keys, 16, dtype=dtype), *more, **options)

    assert is_tried(77, 77) and is_tried(kv_len.FEWEST, 77)
    assert not is_tried(64, 96) and not is_tried(1, 77)
    assert not is_tried(77, 77, dtype=torch.float32)
    assert not is_tried(77, 77, window=(4, 4)) and not is_tried(64, 77, Causal("bottom_right"))
    assert not is_tried(77, 77, torch.ones(77, 77, dtype=torch.bool))


def test_it_is_not_tried_without_amx():
    q, k, v = qkv(1, 2, 2, 77, 77, 16, dtype=torch.bfloat16)
    with fastattn.options.scope(mode="cached"):
        rows = fastattn.explain(q, k, v).rows
    is_amx = "amx_bf16" in Device.of(torch.device("cpu")).name
    assert is_amx or not [row for row in rows if "pad_lengths" in row.candidate]
