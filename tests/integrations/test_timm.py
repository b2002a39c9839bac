"""timm's models under patch(model): the same numbers, every call of fused attention served, and report() says which blocks.

The models are random, by their registry names at small sizes. What timm computes without F.sdpa (Swin, unless it is asked to)
is not served, and report() does not name it.
"""

from __future__ import annotations

import copy

import pytest
import torch

timm = pytest.importorskip("timm", reason="timm is not installed", exc_type=ImportError)

from fakes import FAST, Clock, add, honest, made_up, turn

import fastattn

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"img_size": 32, "depth": 2}
NARROW = {**SMALL, "embed_dim": 64, "num_heads": 4}
MODELS = {
    # registry name: (options, edge of the image, calls of attention)
    "vit_tiny_patch16_224": (SMALL, 32, 2),
    "deit3_small_patch16_224": (SMALL, 32, 2),
    "beit_base_patch16_224": (NARROW, 32, 2),  # a bias of relative positions
    "eva02_tiny_patch14_224": ({"img_size": 28, "depth": 2}, 28, 2),  # rotary positions
    "vit_base_patch16_siglip_224": (NARROW, 32, 3),  # and an attention pool
    "vit_relpos_small_patch16_224": (SMALL, 32, 2),
    "cait_xxs24_224": (SMALL, 32, 2),  # its class attention; the talking heads are no F.sdpa
    "pvt_v2_b0": ({}, 64, 8),  # keys of a smaller image
}
LONG = {
    "swin_tiny_patch4_window7_224": ({"img_size": 56, "window_size": 7}, 56, 12),  # only where it is asked to
    "maxvit_rmlp_pico_rw_256": ({"img_size": 64}, 64, 22),
    "hieradet_small": ({}, 64, 16),
    "mobilenetv4_hybrid_medium": ({}, 64, 8),  # one head of keys, broadcast
    "davit_tiny": ({}, 64, 6),
    "hiera_tiny_224": ({"img_size": 64}, 64, 12),
    "twins_svt_small": ({"img_size": 64}, 64, 18),
    "tiny_vit_5m_224": ({}, 64, 10),
    "crossvit_tiny_240": ({}, 64, 15),
    "volo_d1_224": ({"img_size": 64}, 64, 14),
}
NAMES = [*MODELS, *(pytest.param(name, marks=pytest.mark.long) for name in LONG)]


@pytest.fixture(autouse=True)
def fused():
    fastattn.stats.reset()
    timm.layers.set_fused_attn(True, experimental=True)  # before a model is made: Swin's too
    yield
    timm.layers.set_fused_attn(True)


def built(name):
    options, edge, calls = (MODELS | LONG)[name]
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=5, **options).eval()
    return model, torch.randn(1, 3, edge, edge), calls


@pytest.mark.parametrize("name", NAMES)
def test_untuned_the_bits_are_those_of_stock(name, untuned):
    model, x, calls = built(name)
    with torch.no_grad():
        want = model(x)
        with fastattn.patch(model):
            assert torch.equal(model(x), want)
    assert fastattn.stats()["calls"] == calls and not fastattn.stats()["passed_on"]


@pytest.mark.parametrize("name", NAMES)
def test_every_call_is_served_by_what_won_within_the_budget(name, monkeypatch):
    """The gate's rule for float32: four times the error that stock has, and the last bits."""
    add(monkeypatch, made_up("quick", honest))
    turn(monkeypatch, Clock({"default": 4e-3, "quick": FAST}))
    model, x, calls = built(name)
    with torch.no_grad():
        stock, exact = model(x), copy.deepcopy(model).double()(x.double())
        with fastattn.patch(model):
            ours = model(x)
    assert fastattn.stats()["served_by"] == {"quick": calls}
    budget = (stock.double() - exact).abs().max() + 2**-23 * exact.abs().max()
    assert (ours.double() - exact).abs().max() <= 4 * budget


def test_the_report_says_which_blocks_are_served(untuned):
    model, x, _ = built("vit_base_patch16_siglip_224")
    layers = {at for row in fastattn.report(model, x).rows for at in row.layers}
    assert layers == {"blocks.0.attn", "blocks.1.attn", "attn_pool"}
    timm.layers.set_fused_attn(False)
    plain, x, _ = built("vit_base_patch16_siglip_224")
    assert not fastattn.report(plain, x).rows, "it writes its attention out: nothing there is F.sdpa"
