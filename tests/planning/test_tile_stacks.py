"""The conversion `stacked`: tiles of like size in one call, copied side by side and filled up."""

from functools import lru_cache

import fakes
import pytest
import torch
from building import accepted, expect, hold, qkv
from hypothesis import example, given, settings
from hypothesis import strategies as st

import fastattn
from fastattn import attention, masks
from fastattn.planning.conversions import tile_stacks, tiles
from fastattn.problems.tilings.of_mask import tiling_of_mask
from fastattn.problems.tilings.stack import SIZES, STACK_BYTES, filled_up, of_like_size

CPU = torch.device("cpu")
LENGTHS = [4 + 36 * (7 * i % 16) // 15 for i in range(16)]  # 4 to 40
TOKENS = sum(LENGTHS)
KERNELS = ["torch_flash+stacked+tiles+mask_dense+mask_additive", "matmul+stacked+tiles+mask_dense+recompute"]


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch):
    monkeypatch.setattr(tiles, "PAIRS", 1)
    monkeypatch.setattr(tiles, "WORK", 1)


def named(kernel, q, k, v, mask, layout="bhsd"):
    """The candidate that this problem has of those that begin so: what a kernel needs depends on the problem."""
    (name,) = [name for name in accepted(q, k, v, mask, layout) if name == kernel or name + "+recompute" == kernel]
    return name


@lru_cache(1)  # the next test has the other kernel
def drawn(mask, layout, grad):
    """((q, k, v), what is right)."""
    given = qkv(2, 4, 2, TOKENS, TOKENS, 16, layout=layout, grad=grad)
    return given, expect(*given, mask.dense(2, TOKENS, TOKENS), layout=layout)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize(
    "mask",
    [
        masks.Document(LENGTHS),
        masks.Document(LENGTHS) & masks.Causal(),
        masks.Document(LENGTHS) & masks.Causal() & masks.Window(9, 0),
        masks.Document(LENGTHS) & masks.Window(3, 20),
        masks.Document([LENGTHS, LENGTHS[::-1]]),
        masks.Document(LENGTHS) & masks.Padding([TOKENS - 40, TOKENS]),
    ],
    ids=str,
)
def test_agrees_with_float64(mask, layout, grad, kernel):
    (q, k, v), want = drawn(mask, layout, grad)
    name = named(kernel, q, k, v, mask, layout)
    hold(want, lambda *given: attention(*given, layout, kernel=name), q, k, v, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_caches_agree_with_float64(dtype):
    q, k, v = (x.to(dtype) for x in qkv(16, 8, 2, 1, 80, 16))
    want = expect(q, k, v, masks.Filled(LENGTHS).dense(16, 1, 80))
    k, v = k.clone(), v.clone()
    for b, n in enumerate(LENGTHS):
        k[b, :, n:] = v[b, :, n:] = float("nan")
    rows = fastattn.explain(q, k, v, kv_lens=LENGTHS).rows
    names = [row.candidate for row in rows if "+stacked" in row.candidate and row.outcome != "refused"]
    assert "torch_flash+stacked+tiles+mask_dense+mask_additive+gqa_fold" in names
    for name in names:
        hold(want, lambda q, k, v, _, name=name: attention(q, k, v, kv_lens=LENGTHS, kernel=name), q, k, v)


@given(st.lists(st.sampled_from([*range(1, 41), 48, 49, 96, 97, 129, 300]), min_size=1, max_size=60))
@example([17] * 20 + [32])
@settings(deadline=None)
def test_a_stack_is_filled_up_by_half_at_most(lengths):
    tokens = sum(lengths)
    found = tiling_of_mask(masks.Document(lengths), 1, tokens, tokens, 1).tiles
    alone, stacks = of_like_size(found, 1024, 1024, 4)
    assert sorted(t.rows.start for t in (*alone, *(t for some in stacks for t in some))) == sorted(
        t.rows.start for t in found
    )
    for some in stacks:
        at, is_real = filled_up([(t.rows.start, t.rows.stop) for t in some], CPU)
        assert is_real.sum() == sum(t.row_count for t in some) and at.numel() <= max(
            1.5 * is_real.sum(), SIZES[0] * len(some)
        )
        for tile, row, real in zip(some, at, is_real, strict=True):
            assert row[real].tolist() == [*range(tile.rows.start, tile.rows.stop)]
            assert (row[~real] == tile.rows.start).all(), "nothing is read but what is its own"


def test_short_and_long_sequences_are_apart():
    lengths = [10, 1000, 12, 60, 50, 1, 2000]
    found = tiling_of_mask(masks.Document(lengths), 1, sum(lengths), sum(lengths), 1).tiles
    alone, stacks = of_like_size(found, 1024, 1024, 4)
    assert [t.row_count for t in alone] == [1000, 2000]
    assert [[t.row_count for t in some] for some in stacks] == [[10, 12, 1], [60, 50]]
    assert all(len(some) == 2 for some in of_like_size(found, STACK_BYTES // 40, 0, 0)[1]), "copies stay small"


@pytest.fixture
def seen(monkeypatch):
    """(tiles, rows, keys) of each run of a made-up kernel."""
    runs = []

    def run(q, k, v, mask, a):
        runs.append((q.shape[0], q.shape[2], k.shape[2]))
        return fakes.honest(q, k, v, mask, a)

    fakes.add(monkeypatch, fakes.made_up("tiler", run, tiles=True))
    with fastattn.options.scope(kernels="tiler"):
        yield runs


def packed(grad=False):
    q, k, v = fakes.qkv(TOKENS, head_dim=8, grad=grad)
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    return [x[0].transpose(0, 1) for x in (q, k, v)], {"layout": "thd", "cu_seqlens_q": ends, "is_causal": True}


@pytest.mark.parametrize("faster", ["tiler+stacked+tiles+mask_dense", "tiler+tiles+mask_dense"])
def test_the_clock_chooses(faster, seen, monkeypatch):
    fakes.turn(monkeypatch, fakes.Clock({"default": 4e-3, faster: 1e-3}))
    tensors, told = packed()
    assert fastattn.explain(*tensors, **told, tune=True).served_by == faster
    attention(*tensors, **told)
    seen.clear()
    attention(*tensors, **told)
    assert (len(seen) <= 8) == ("stacked" in faster)
    assert (sum(n for n, _, _ in seen) >= len(LENGTHS)) == ("stacked" in faster)


def test_what_is_written_into_lengths_is_read_anew(seen):
    tensors, told = packed()
    for first in (8, 20, 3, 8):
        told["cu_seqlens_q"].numpy()[1] = first
        found = attention(*tensors, **told, kernel="tiler+stacked+tiles+mask_dense")
        torch.testing.assert_close(found, attention(*tensors, **told, kernel="sdpa_math"))


def test_it_is_tried_where_calls_are_saved():
    def is_tried(mask, b=1, n=1024):
        return any("stacked" in name for name in accepted(*qkv(b, 2, 2, n, n, 8), mask))

    assert is_tried(masks.Document([16] * 64)) and is_tried(masks.Document([64] * 16) & masks.Causal())
    assert not is_tried(masks.Document([512, 512])), "large ones are worth a call each"
    assert not is_tried(masks.Window(64, 0)), "neighbours that share their keys are few"
    assert not is_tried(masks.Document([64] * 16) & masks.ALiBi([0.5, 0.25])), "heads differ"
    assert not is_tried(torch.ones(1024, 1024, dtype=torch.bool)), "a tensor is looked at in each call"


def test_a_stack_asks_its_mask_once(monkeypatch):
    """A packing comes once: a question for each of its sequences would cost more than they do."""
    asked, sees = [], masks.Document.sees

    def counted(self, *given):
        asked.append(given)
        return sees(self, *given)

    monkeypatch.setattr(masks.Document, "sees", counted)
    q, k, v = qkv(1, 2, 2, TOKENS, TOKENS, 8)
    parts = tile_stacks._in_stacks(masks.Document(LENGTHS) & masks.Padding([TOKENS - 3]), q, k, v).parts
    assert len(asked) <= len(parts) < len(LENGTHS) / 2, (len(asked), len(parts))


@pytest.mark.parametrize(
    "lengths, is_kept", [([16] * 32, True), ([1, 1, 1, 16] * 80, False)], ids=["even", "filled_up"]
)
def test_copies_that_would_be_more_than_twice_the_tensors_are_made_again_in_the_backward(lengths, is_kept, seen):
    """What graphs hold counts: the copies of a stack beside its mask."""
    q, k, v = fakes.qkv(sum(lengths), head_dim=64, grad=True)
    kernel = "tiler+stacked+tiles+mask_dense"
    out = attention(q, k, v, masks.Document(lengths), kernel=kernel)
    attention(q, k, v, masks.Document(lengths), kernel=kernel)
    seen.clear()
    out.sum().backward()
    assert (not seen) is is_kept
    want = torch.autograd.grad(attention(q, k, v, masks.Document(lengths), kernel="sdpa_math").sum(), (q, k, v))
    for x, of_x in zip((q, k, v), want, strict=True):
        torch.testing.assert_close(x.grad, of_x)


@pytest.mark.parametrize("every, is_kept", [(8, True), (3, False)])
def test_keys_that_are_gathered_count_too(every, is_kept, seen):
    """A tile whose keys lie apart has copies of them."""
    q, k, v = fakes.qkv(4096, heads=1, head_dim=16, grad=True)
    square = torch.arange(16)
    mask = ((square[:, None] + square) % every == 0).repeat_interleave(256, 0).repeat_interleave(256, 1)
    out = attention(q, k, v, mask, kernel="tiler+tiles")
    seen.clear()
    out.sum().backward()
    assert (not seen) is is_kept


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_a_stack_s_mask_counts_as_wide_as_it_is(dtype):
    """Copies and mask of a stack take STACK_BYTES at most, and no less than half of it where tiles are left."""
    lengths = [128] * 256
    q, k, v = qkv(1, 1, 1, sum(lengths), sum(lengths), 1, dtype=dtype)
    parts = tile_stacks._in_stacks(masks.Document(lengths) & masks.Padding([sum(lengths) - 1]), q, k, v).parts
    row, key, pair = tile_stacks._bytes_each(1, 1, 2, dtype)
    sizes = [part.rows.numel() * row + part.keys.numel() * key + len(part.rows) * 128 * 128 * pair for part in parts]
    assert max(sizes) <= STACK_BYTES and len(parts) <= 1 + 2 * sum(sizes) // STACK_BYTES
