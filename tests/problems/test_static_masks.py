"""masks.Static: a dense mask that is declared to be constant, read once."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from building import Expected, expect, hold, qkv
from fakes import Clock, turn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fastattn
from fastattn import attention, masks
from fastattn.problems.tilings.of_mask import tiling_of_mask

ROWS, KEYS = torch.arange(300)[:, None], torch.arange(300)
WINDOW = (ROWS - KEYS).abs() <= 20


def drawn(seed, entries, q_len, kv_len):
    """Blocks of rows and keys that are seen, some of them with holes."""
    g = torch.Generator().manual_seed(seed)
    seen = torch.zeros(entries, 1, q_len, kv_len, dtype=torch.bool)
    for _ in range(4):
        b, i, j, h, w = (int(torch.randint(n, (), generator=g)) for n in (entries, q_len, kv_len, q_len, kv_len))
        block = torch.rand(1, generator=g) < torch.rand(h, w, generator=g)
        seen[b, 0, i : i + h, j : j + w] |= block[: q_len - i, : kv_len - j]
    return seen


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**20), st.sampled_from([1, 3]), st.integers(1, 300), st.integers(1, 300), st.sampled_from([1, 3])
)
def test_it_says_what_the_tensor_says_and_every_visible_pair_lies_in_one_tile(seed, entries, q_len, kv_len, step):
    seen = drawn(seed, entries, q_len, kv_len)
    mask = masks.Static(seen)
    assert torch.equal(mask.dense(3, q_len, kv_len), seen)
    combined = mask & masks.Dilated(step) if step > 1 else mask
    dense = combined.dense(3, q_len, kv_len).expand(3, 1, q_len, kv_len)
    count, bare = torch.zeros(3, q_len, kv_len), torch.zeros(3, q_len, kv_len, dtype=torch.bool)
    for tile in tiling_of_mask(combined, 3, q_len, kv_len).tiles:
        for first, last in tile.keys:
            count[tile.batch, tile.rows, first : last : tile.rows.step or 1] += 1
            bare[tile.batch, tile.rows, first : last : tile.rows.step or 1] |= not tile.is_masked
    assert count.max() <= 1
    assert (count[dense[:, 0]] == 1).all()
    assert not (bare & ~dense[:, 0]).any(), "a hidden pair lies in a tile without a mask"


def test_it_is_a_value_that_later_writes_do_not_reach():
    tensor = WINDOW.clone()
    mask, same = masks.Static(tensor), masks.Static(WINDOW[None, None].expand(1, 1, 300, 300))
    assert mask == same
    assert hash(mask) == hash(same)
    tensor.zero_()
    assert torch.equal(mask.dense(1, 300, 300)[0, 0], WINDOW)
    assert mask == copy.deepcopy(mask) == pickle.loads(pickle.dumps(mask)) != masks.Static(~WINDOW)
    assert repr(mask) == "Static(1x300x300, 13% seen)"
    with torch.inference_mode():
        assert not masks.Static(WINDOW).seen.is_inference()


WRONG = [
    (lambda: masks.Static(WINDOW.float()), TypeError, "what is added to the scores is a Bias. Got Tensor of float32"),
    (lambda: masks.Static([[True]]), TypeError, "made of a bool Tensor.*Got list"),
    (lambda: masks.Static(torch.ones(2, 3, 3, dtype=torch.bool)), ValueError, r"Got shape \(2, 3, 3\)"),
    (lambda: masks.Static(torch.ones(1, 2, 3, 3, dtype=torch.bool)), ValueError, "where heads differ pass the tensor"),
    (lambda: masks.Static(torch.ones(0, 3, dtype=torch.bool)), ValueError, r"Got shape \(0, 3\)"),
    (lambda: masks.Static(WINDOW[:7]) & masks.Causal("bottom_right"), ValueError, "different corners"),
    (lambda: attention(*qkv(sq=299, skv=300), masks.Static(WINDOW)), ValueError, r"\(300, 300\), got \(299, 300\)"),
    (lambda: attention(*qkv(b=3, sq=2), masks.Static(torch.ones(2, 1, 2, 2, dtype=torch.bool))), ValueError, "2 batch"),
    (lambda: masks.parse("Static(3)"), ValueError, "there is no mask 'Static'"),
]


@pytest.mark.parametrize("make, kind, text", WRONG, ids=[text for *_, text in WRONG])
def test_what_is_no_static_mask_is_refused_in_words(make, kind, text):
    with pytest.raises(kind, match=text):
        make()


@pytest.mark.parametrize("kernel", [None, "torch_flash", "sdpa_math"])
def test_attention_and_its_gradients_are_those_of_the_tensor(kernel):
    seen = torch.stack([WINDOW & (KEYS < 250), (ROWS >= KEYS) & (ROWS // 90 == KEYS // 90)])[:, None]
    seen[0, 0, 7] = False  # a row that sees nothing
    q, k, v = (x.requires_grad_() for x in qkv(b=2, hq=4, hkv=2, sq=300, d=16))
    for dense, told in ((seen, masks.Static(seen)), (seen & (ROWS >= KEYS), masks.Static(seen) & masks.Causal())):
        hold(expect(q, k, v, dense), lambda q, k, v, _, told=told: attention(q, k, v, told, kernel=kernel), q, k, v)


def test_masks_that_leave_about_as_much_share_a_verdict_but_not_an_answer(monkeypatch):
    turn(monkeypatch, Clock())
    q, k, v = qkv(b=1, hq=2, sq=300, d=16)
    other, before = (ROWS - KEYS).abs() <= 15, fastattn.stats()["tunings"]
    mask, narrower = masks.Static(WINDOW), masks.Static(other)
    assert mask.like(300) == narrower.like(300) == masks.Window(256, 256)
    for seen, told in ((WINDOW, mask), (other, narrower), (WINDOW, mask)):
        assert Expected(q, k, v, seen).forward(attention(q, k, v, told)) <= 1
    assert fastattn.stats()["tunings"] == before + 1


def test_it_stands_for_a_window_that_leaves_as_many_squares():
    rows, keys = torch.arange(4096)[:, None], torch.arange(4096)
    assert masks.Static((rows - keys).abs() <= 300).like(4096) == masks.Window(512, 512)
    assert masks.Static(torch.rand(512, 512) < 0.1).like(512) == masks.Window(512, 512)  # scattered: nothing is hidden
    assert masks.Static(torch.zeros(8, 8, dtype=torch.bool)).like(8) == masks.Window(1, 1)


def test_clear_lets_go_of_it():
    mask = masks.Static(WINDOW)
    q, k, v = qkv(b=1, hq=1, sq=300, d=16)
    for kernel in ("torch_flash", "flex"):
        attention(q, k, v, mask, kernel=kernel)
    held = weakref.ref(mask.seen)
    del mask
    fastattn.clear()
    gc.collect()
    assert held() is None


def test_in_a_graph_it_is_a_constant():
    q, k, v = qkv(b=1, hq=2, sq=300, d=16)
    mask = masks.Static(WINDOW)
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, mask), fullgraph=True, backend="aot_eager")
    assert Expected(q, k, v, WINDOW).forward(compiled(q, k, v)) <= 1


def test_under_fake_tensor_mode_it_has_the_shapes_of_the_tensor():
    mask, q = masks.Static(WINDOW), torch.randn(2, 3, 300, 16)
    for told in (mask, mask & masks.Padding([300, 100]), masks.Global(3) | mask):
        with FakeTensorMode() as mode:
            fake = mode.from_tensor(q)
            dense = told.dense(2, 300, 300, fake.device, rows=torch.arange(300, device=fake.device))
            out = attention(fake, fake, fake, told)
        assert (dense.shape, dense.dtype) == (told.dense(2, 300, 300).shape, torch.bool)
        assert (out.shape, out.dtype) == (q.shape, q.dtype)


def test_under_fake_tensor_mode_it_is_not_read(monkeypatch):
    """A list of its numbers would take eight bytes for each and more."""
    mask = masks.Static(WINDOW)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: pytest.fail("read"))
    with FakeTensorMode():
        assert mask.dense(2, 300, 300, torch.device("cpu"), rows=torch.arange(300)).shape == (1, 1, 300, 300)


def test_in_a_graph_of_fake_tensors_it_is_a_constant():
    q, k, v = qkv(b=1, hq=2, sq=300, d=16)
    mask = masks.Static(WINDOW)
    graph = make_fx(lambda q, k, v: attention(q, k, v, mask), tracing_mode="fake")(q, k, v)
    assert Expected(q, k, v, WINDOW).forward(graph(q, k, v)) <= 1


@pytest.mark.parametrize("make", [torch.ones, partial(torch.ones, device="meta")], ids=["FakeTensorMode", "meta"])
def test_what_holds_nothing_is_refused_in_words(make):
    mode = FakeTensorMode() if make is torch.ones else nullcontext()
    with mode, pytest.raises(ValueError, match=r"FakeTensorMode, holds nothing to read.*before.*Got shape \(3, 4\)"):
        masks.Static(make(3, 4, dtype=torch.bool))
    with FakeTensorMode(), pytest.raises(ValueError, match="holds nothing to read"):
        masks.Static(WINDOW)
