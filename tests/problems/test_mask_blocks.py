"""The squares of a mask with a meaning, from which flex_attention's BlockMask is made."""

from __future__ import annotations

import pytest
import torch
from drawn_masks import B, some
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from fastattn import masks
from fastattn.kernels.adapters import flex
from fastattn.kernels.block_masks import band_mask, square_mask
from fastattn.problems.tilings.mask_blocks import HIDDEN, SIZE, WHOLE, blocks_of_mask

CPU = torch.device("cpu")


def as_dense(blocks):
    """(entries, 1, q_len, kv_len) bool, from the patterns of the squares."""
    entries, rows, columns = blocks.pattern.shape
    whole = blocks.patterns[blocks.pattern.long()].transpose(2, 3).reshape(entries, rows * SIZE, columns * SIZE)
    assert not whole[:, blocks.q_len :].any() and not whole[:, :, blocks.kv_len :].any()  # nothing is beyond the ends
    return whole[:, None, : blocks.q_len, : blocks.kv_len]


@settings(max_examples=60, deadline=None)
@given(some, st.integers(1, 300), st.integers(1, 300))
def test_squares_say_what_the_mask_says(mask, q_len, kv_len):
    if mask.heads():
        return
    blocks = blocks_of_mask(mask, B, q_len, kv_len, CPU)
    assert torch.equal(as_dense(blocks), mask.dense(B, q_len, kv_len).expand(len(blocks.pattern), 1, q_len, kv_len))


def test_squares_of_a_window_are_few_kinds_and_no_tensor_of_queries_by_keys():
    blocks = blocks_of_mask(masks.Window(256, 256), 1, 32768, 32768, CPU)
    seen = (blocks.pattern != HIDDEN).sum(-1)
    assert (int(seen.max()), int((blocks.pattern == WHOLE).sum(-1).max())) == (5, 3)
    assert len(blocks.patterns) <= 8  # alike from square to square
    assert blocks.pattern.nbytes + blocks.patterns.nbytes < 32768 * 16


@pytest.mark.parametrize("lengths", [(300, 300), (256, 384), (200, 513), (513, 200), (1, 700)], ids=str)
@pytest.mark.parametrize("band", [(None, 0), (-64, 64), (-200, 0), (0, None), (3, 140), (-500, -400)], ids=str)
@pytest.mark.parametrize("height", [SIZE, 2 * SIZE], ids=["", "two rows at once"])
def test_the_block_mask_of_a_band_is_what_torch_finds_by_looking_at_every_pair(band, lengths, height):
    ours = band_mask(*band, *lengths, CPU, height)
    theirs = create_block_mask(ours.mask_mod, 1, 1, *lengths, device="cpu", BLOCK_SIZE=(height, SIZE))
    assert listed(ours) == listed(theirs) and ours.BLOCK_SIZE == theirs.BLOCK_SIZE


def listed(block_mask):
    """Which squares of each row are hidden in part, and which are seen whole."""
    lists = (
        (block_mask.kv_num_blocks, block_mask.kv_indices),
        (block_mask.full_kv_num_blocks, block_mask.full_kv_indices),
    )
    return [
        [sorted(at[:n].tolist()) for n, at in zip(counts.flatten().tolist(), indices.flatten(0, -2), strict=True)]
        for counts, indices in lists
    ]


@pytest.mark.parametrize("height", [SIZE, 2 * SIZE], ids=["", "two rows at once"])
def test_the_block_mask_of_squares_is_what_torch_finds_by_looking_at_every_pair(height):
    mask = masks.Causal() & masks.Document([[100, 337, 163], [600]])
    ours = square_mask(blocks_of_mask(mask, 2, 600, 600, CPU), height)
    theirs = create_block_mask(ours.mask_mod, 2, 1, 600, 600, device="cpu", BLOCK_SIZE=(height, SIZE))
    dense = mask.dense(2, 600, 600)
    at = torch.arange(600)
    assert torch.equal(ours.mask_mod(torch.arange(2)[:, None, None], 0, at[:, None], at), dense[:, 0])
    assert listed(ours) == listed(theirs)


def test_squares_of_a_tensor_that_is_read_once():
    """And of one that is combined: its rows and keys end where those of the squares do not."""
    seen = torch.rand(2, 1, 300, 200) < 0.5
    seen[0, 0, :140, 60:] = seen[1, 0, 128:] = False
    seen[1, 0, :128, :128] = True
    for mask in (
        masks.Static(seen),
        masks.Static(seen) & masks.Padding([200, 131]),
        masks.Static(seen) | masks.Global(2),
    ):
        blocks = blocks_of_mask(mask, 2, 300, 200, CPU)
        assert torch.equal(as_dense(blocks), mask.dense(2, 300, 200))
        assert len(blocks.pattern) == 2 and (blocks.pattern == HIDDEN).any()


def test_a_mask_is_asked_about_many_squares_at_once(monkeypatch):
    """A packing comes once: what its squares cost is not spread over many calls."""
    asked, sees = [], masks.Document.sees

    def counted(self, b, p, j, kv_len):
        asked.append(max(p.numel(), j.numel()))
        return sees(self, b, p, j, kv_len)

    monkeypatch.setattr(masks.Document, "sees", counted)
    mask = masks.Document([700, 1300, 48, 4000, 2144]) & masks.Causal()
    blocks = blocks_of_mask(mask, 1, 8192, 8192, CPU)
    partly = int((blocks.pattern > WHOLE).sum())
    assert partly > 64 and len(asked) <= 3 and sum(asked) < 200 * SIZE, (partly, asked)


def test_packings_of_different_documents_have_patterns_of_few_counts():
    """A kernel is compiled for a number of patterns."""
    found = [masks.Document((n, 1024 - n)) & masks.Causal() for n in (100, 200, 300, 384, 512)]
    assert {len(blocks_of_mask(mask, 1, 1024, 1024, CPU).patterns) for mask in found} <= {4, 8}


def test_what_was_made_in_inference_mode_may_be_saved_for_a_backward():
    with torch.inference_mode():
        blocks = blocks_of_mask(masks.Causal() & masks.Document(70), 1, 256, 256, CPU)
        told = flex.kept(square_mask)(blocks)
    assert not (blocks.pattern.is_inference() or blocks.patterns.is_inference() or told.kv_indices.is_inference())


@pytest.mark.parametrize("mask", [masks.Window(2**32, 0), masks.Window(2**40, 0) & masks.Document(7)], ids=str)
def test_a_mask_may_hold_any_number(mask):
    """As positions in int32, a window of 2^32 keys was one of none."""
    assert torch.equal(as_dense(blocks_of_mask(mask, 1, 20, 20, CPU)), mask.dense(1, 20, 20))
