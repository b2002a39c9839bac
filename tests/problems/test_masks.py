"""Masks with a meaning: what they show, how they combine, are written, compared and cut into tiles."""

import pickle

import numpy as np
import pytest
import torch
from drawn_masks import B, some
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn import masks
from fastattn.problems.masks.unread import sequences_of_lengths
from fastattn.problems.tilings.of_mask import tiling_of_mask


def by_definition(mask, q_len, kv_len):
    """[B, q_len, kv_len] from what each mask is said to be, pair by pair."""
    at = kv_len - q_len if "Causal('bottom_right')" in repr(mask) else 0
    shows = [
        [[_shows(mask, b, i + at, j, kv_len) for j in range(kv_len)] for i in range(q_len)] for b in range(B)
    ]  # fmt: skip
    return torch.tensor(shows, dtype=torch.bool).view(B, q_len, kv_len)


def _shows(mask, b, p, j, kv_len):
    match mask:
        case masks.Causal():
            return j <= p
        case masks.Window(left, right):
            return (left < 0 or p - j <= left) and (right < 0 or j - p <= right)
        case masks.Dilated(every):
            return abs(p - j) % every == 0
        case masks.Chunked(size):
            return p // size == j // size
        case masks.Neighborhood(grid, radius):

            def place(x):
                found = []
                for n in reversed(grid[1:]):
                    found.insert(0, x % n)
                    x //= n
                return [x, *found]

            return all(abs(x - y) <= r for x, y, r in zip(place(p), place(j), radius, strict=True))
        case masks.Prefix(lengths):
            return j < (lengths if isinstance(lengths, int) else lengths[b])
        case masks.Global(tokens):
            tokens = range(tokens) if isinstance(tokens, int) else tokens
            return p in tokens or j in tokens
        case masks.Document(lengths):
            if not isinstance(lengths, int):
                lengths = lengths if isinstance(lengths[0], int) else lengths[b]
                numbers = [n for n, length in enumerate(lengths) for _ in range(length)]
                return (numbers[p] if p < len(numbers) else -1) == (numbers[j] if j < len(numbers) else -1)
            return p // lengths == j // lengths
        case masks.Padding(lengths, side):
            n = lengths if isinstance(lengths, int) else lengths[b]
            if not isinstance(n, int):
                return any(first <= j < last for first, last in n)
            return j < n if side == "right" else j >= kv_len - n
        case masks.Packed(queries, keys, corner, (left, right)):
            of_query, of_key = _in_sequence(queries, p), _in_sequence(keys, j)
            if of_query is None or of_key is None or of_query[0] != of_key[0]:
                return False
            (n, i), (_, j) = of_query, of_key
            sizes = [x if isinstance(x, int) else x[n] for x in (queries, keys)]
            i += sizes[1] - sizes[0] if corner == "bottom_right" else 0
            return (
                (not corner or j <= i) and (left < 0 or i - j <= left) and (bool(corner) or right < 0 or j - i <= right)
            )
        case masks.Filled(keys, queries, left):
            filled = keys if isinstance(keys, int) else keys[b]
            at = filled - queries + p
            return j < filled and (not queries or (j <= at and (left < 0 or at - j <= left)))
    parts = [_shows(part, b, p, j, kv_len) for part in mask.of]
    return all(parts) if " | " not in repr(mask) or mask.parts() != (mask,) else any(parts)


def _in_sequence(lengths, x):
    """(number of the sequence, place in it) of token x, None before the first and behind the last."""
    if x < 0:
        return None
    if isinstance(lengths, int):
        return divmod(x, lengths)
    for n, length in enumerate(lengths):
        if x < length:
            return n, x
        x -= length
    return None


@settings(max_examples=120, deadline=None)
@given(some, st.integers(1, 40), st.integers(1, 40))
def test_dense_is_what_the_mask_is_said_to_be(mask, q_len, kv_len):
    found = mask.dense(B, q_len, kv_len)
    assert found.shape == (B if mask.is_per_batch() else 1, 1, q_len, kv_len)
    assert torch.equal(found.expand(B, 1, -1, -1)[:, 0], by_definition(mask, q_len, kv_len)), mask


@settings(max_examples=120, deadline=None)
@given(some, st.integers(1, 700), st.integers(1, 700))
def test_each_visible_pair_lies_in_one_tile(mask, q_len, kv_len):
    tiling = tiling_of_mask(mask, B, q_len, kv_len)
    dense = mask.dense(B, q_len, kv_len).expand(B, 1, -1, -1)[:, 0]
    count = torch.zeros(B, q_len, kv_len, dtype=torch.int8)
    bare = count.clone()
    for tile in tiling.tiles:
        for first, last in tile.keys:
            count[tile.batch, tile.rows, first : last : tile.rows.step] += 1
            bare[tile.batch, tile.rows, first : last : tile.rows.step] += not tile.is_masked
    assert count.max() <= 1
    assert (count[dense] == 1).all()
    assert not bare[~dense].any(), "a hidden pair lies in a tile without a mask"
    assert tiling.share == pytest.approx(float(count.double().mean()))
    assert tiling.has_every_row == bool((count > 0).any(-1).all())


@settings(max_examples=50, deadline=None)
@given(some)
def test_a_mask_is_a_value(mask):
    assert masks.parse(repr(mask)) == mask
    assert hash(masks.parse(repr(mask))) == hash(mask)
    assert pickle.loads(pickle.dumps(mask)) == mask
    assert masks.parse(repr(mask.like(60))).like(60).is_per_batch() == mask.like(60).is_per_batch()


def test_tiles_leave_out_what_a_mask_hides():
    def share(mask, n=4096, batch=1):
        return tiling_of_mask(mask, batch, n, n).share

    assert share(masks.Window(256, 256)) < 0.19
    assert share(masks.Causal()) < 0.54
    assert share(masks.Document(512)) == 1 / 8
    assert share(masks.Document((500, 1000, 96, 2500))) == pytest.approx((500**2 + 1000**2 + 96**2 + 2500**2) / 4096**2)
    assert share(masks.Dilated(4)) == 1 / 4
    assert share(masks.Dilated(4) & masks.Window(256, 256)) < 0.06
    assert share(masks.Chunked(1024) & masks.Causal()) < 0.16
    assert share(masks.Window(128, 128) | masks.Global(16)) < 0.14
    assert share(masks.Neighborhood((56, 56), 4), 3136) < 0.25
    assert share(masks.Padding([512, 256], "left") & masks.Causal(), 512, 2) < 0.42
    assert share(masks.Causal() | masks.Prefix(1024)) < 0.61


def test_documents_are_bare_tiles():
    tiling = tiling_of_mask(masks.Document((500, 1000, 96, 2500)), 1, 4096, 4096)
    assert [(t.rows.start, t.rows.stop, t.keys, t.is_masked) for t in tiling.tiles] == [
        (0, 500, ((0, 500),), False), (500, 1500, ((500, 1500),), False),
        (1500, 1596, ((1500, 1596),), False), (1596, 4096, ((1596, 4096),), False),
    ]  # fmt: skip


def test_few_rows_are_a_tile_of_their_own_where_they_would_see_many_hidden_keys():
    def rows(queries, keys):
        tiles = tiling_of_mask(masks.Packed(queries, keys), 1, sum(queries), sum(keys)).tiles
        return [(tile.rows.start, tile.rows.stop) for tile in tiles]

    assert rows((1, 1, 1, 4), (500, 600, 2, 4)) == [(0, 1), (1, 2), (2, 7)]
    assert rows((8, 8, 8, 8), (8, 8, 8, 8)) == [(0, 16), (16, 32)], "few pairs are hidden"
    assert rows((4, 1), (4, 2000)) == [(0, 4), (4, 5)]


def test_dilation_is_as_many_dense_problems_as_its_step():
    tiles = tiling_of_mask(masks.Dilated(4), 1, 1030, 1030).tiles
    assert [(t.rows.indices(1030), t.keys, t.is_masked) for t in tiles] == [
        ((first, last, 4), ((first, 1030),), False) for first, last in ((0, 1029), (1, 1030), (2, 1027), (3, 1028))
    ]


def test_what_is_alike_shares_a_verdict():
    like = lambda mask: mask.like(4096)  # noqa: E731
    assert like(masks.Document((1000, 1100, 900, 1096))) == like(masks.Document((1024,) * 4)) == masks.Document(1024)
    assert like(masks.Document((1000, 1100, 900, 1096))) != like(masks.Document((128,) * 32))
    assert like(masks.Padding([4000, 100])) == like(masks.Padding([2000, 2050]))
    assert like(masks.Window(3, 4)) == masks.Window(3, 4)
    assert like(masks.Causal() & masks.Prefix(1000)) == like(masks.Causal() & masks.Prefix(1100))
    grown = [masks.Padding([n, n - 30], "left").like(n) for n in range(370, 500)]
    assert len(set(grown)) < 5, "a decode grows by a token a call: lengths of one bucket are alike"


def test_the_order_does_not_matter():
    assert masks.Causal() & masks.Document(9) == masks.Document(9) & masks.Causal()
    assert masks.Window(3, 3) | masks.Global(2) == masks.Global(2) | masks.Window(3, 3)


def test_a_number_is_a_number_whatever_its_type():
    for sixteen in (16, np.int64(16), torch.tensor(16)):
        assert masks.Global(sixteen) == masks.Global(16)
        assert masks.Document(sixteen) == masks.Document(16)
        assert masks.Padding(sixteen) == masks.Padding(16)
    assert masks.Document([np.int64(3), 4]) == masks.Document([3, 4])


def test_values_are_read_when_a_mask_is_made():
    ids = torch.tensor([[0, 0, 1, 1, 1], [7, 7, 7, 7, 3]])
    mask = masks.Document(ids=ids)
    ids.zero_()
    assert mask == masks.Document(((2, 3), (4, 1)))
    real = torch.tensor([[True, True, False], [False, True, True]])
    mask = masks.Padding(real)
    real.fill_(True)
    assert torch.equal(mask.dense(2, 1, 3)[:, 0, 0], torch.tensor([[True, True, False], [False, True, True]]))


BAD = [
    (lambda: masks.Bias([[0.0]]), TypeError, "a bias is a float Tensor, got list"),
    (lambda: masks.Bias(torch.ones(2, 2, dtype=torch.bool)), TypeError, "a bias is a float Tensor, got Tensor of bool"),
    (lambda: masks.Bias(torch.ones(2, 2, 2)), ValueError, "kv_len], got shape (2, 2, 2)"),
    (lambda: masks.Bias(torch.ones(2, 2)) | masks.Causal(), ValueError, "goes with &"),
    (lambda: masks.parse("Bias(3)"), ValueError, "there is no mask 'Bias'"),
    (lambda: masks.Causal("left"), ValueError, "corner must be one of 'top_left', 'bottom_right', got 'left'"),
    (lambda: masks.Window(-2, 0), ValueError, "left and right must be whole numbers >= -1"),
    (lambda: masks.Window(1.5, 0), TypeError, "left and right must be whole numbers, got"),
    (lambda: masks.Dilated(0), ValueError, "every must be whole numbers >= 1"),
    (lambda: masks.Chunked(True), TypeError, "size must be whole numbers"),
    (lambda: masks.Neighborhood((4, 4), (1, 2, 3)), ValueError, "radius must be whole numbers >= 0, 2 of them"),
    (lambda: masks.Document(), TypeError, "Document takes either lengths or ids"),
    (lambda: masks.Document([3, 0]), ValueError, "lengths must be whole numbers >= 1"),
    (lambda: masks.Padding([3], side="top"), ValueError, "side must be 'left' or 'right', got 'top'"),
    (lambda: masks.Padding(torch.ones(2, 3, 4, dtype=torch.bool)), ValueError, "a bool padding mask is [batch, kv_len]"),
    (lambda: masks.Causal() & masks.Causal("bottom_right"), ValueError, "have different corners"),
    (lambda: masks.parse("Causal() & open('x')"), ValueError, "there is no mask 'open'"),
    (lambda: masks.parse("Causal("), ValueError, "is no mask: write one as in"),
    (lambda: masks.Causal().show(0), ValueError, "q_len and kv_len must be whole numbers >= 1"),
    (lambda: masks.Packed([3], [3, 4]), ValueError, "queries and keys are of as many sequences"),
    (lambda: masks.Packed([3], [3], "left"), ValueError, "corner must be '' or one of 'top_left', 'bottom_right'"),
    (lambda: masks.Filled([3], -1), ValueError, "queries must be whole numbers >= 0"),
    (lambda: masks.parse("Mask()"), ValueError, "there is no mask 'Mask'"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "kind", "text"), BAD, ids=[text[:40] for _, _, text in BAD])
def test_what_is_no_mask_is_refused_in_words(make, kind, text):
    with pytest.raises(kind) as raised:
        make()
    assert text in str(raised.value)


def test_a_bias_is_added_to_what_is_seen():
    mask = masks.ALiBi([1.0, 0.5]) & masks.Causal()
    found = mask.dense(2, 2, 3)
    hidden = -float("inf")
    assert found.tolist() == [[[[0, hidden, hidden], [-1, 0, hidden]], [[0, hidden, hidden], [-0.5, 0, hidden]]]]
    assert masks.ALiBi(8).dense(1, 1, 2)[0, :, 0, 1].tolist() == [2.0**-n for n in range(1, 9)]
    assert masks.ALiBi([0.5, 0.1]).for_heads(3) == masks.ALiBi([0.5, 0.1, 0.5])
    assert masks.ALiBi([0.5, 0.1]).like(9) == masks.ALiBi(2)


def test_a_bias_of_a_tensor_stands_beside_what_is_seen():
    tensor = torch.arange(6.0).reshape(2, 3)
    hidden = -float("inf")
    assert (masks.Causal("bottom_right") & masks.Bias(tensor)).dense(1, 2, 3).tolist() == [
        [[[0, 1, hidden], [3, 4, 5]]]
    ]
    mask = masks.Bias(tensor) & masks.ALiBi([1.0]) & masks.Bias(tensor)
    assert mask.dense(1, 2, 3, rows=torch.tensor([1])).tolist() == [[[[5.0, 8.0, 11.0]]]]
    assert repr(mask) == "ALiBi((1.0,)) & Bias(2x3 float32) & Bias(2x3 float32)"
    assert masks.Bias(tensor) != masks.Bias(tensor)  # it may be written into: its content says nothing
    with pytest.raises(ValueError, match=r"Bias\(2x3 float32\) does not fit q_len 32, kv_len 32"):
        str(masks.Bias(tensor).show(32))


def test_a_picture_shows_a_row_for_each_query():
    assert str(masks.Causal().show(4)) == "█▄\n███▄"
    assert str(masks.Window(0, 0).show(2, 4)) == "▀▄"
    png = masks.Causal().show(300).png()
    assert png.startswith(b"\x89PNG")
    assert masks.Padding([1, 2]).show(2, entry=1).shades(2) == [[1.0, 1.0]] * 2


def test_a_mask_with_a_tensor_is_refused_by_type():
    with pytest.raises(TypeError):
        masks.Causal() & torch.ones(3, 3, dtype=torch.bool)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=5),
    st.sampled_from(["", "top_left", "bottom_right"]), st.tuples(st.integers(-1, 6), st.integers(-1, 6)), st.integers(0, 3),
)  # fmt: skip
def test_packed_sequences_that_are_not_read_hide_the_same(sizes, corner, window, behind):
    queries, keys = zip(*sizes, strict=True)
    known = masks.Packed(queries, keys, corner, window)
    unread = masks.PackedUnread(5, 9, corner, window, False, sequences_of_lengths(queries, keys, "cpu"))
    q_len, kv_len = sum(queries) + behind, sum(keys) + behind
    assert torch.equal(unread.dense(1, q_len, kv_len), known.dense(1, q_len, kv_len))
    tiles = tiling_of_mask(unread, 1, q_len, kv_len).tiles if q_len and kv_len else ()
    assert all(tile.is_masked for tile in tiles), "nothing is taken for visible that was not looked at"
    assert masks.parse(repr(unread.like(kv_len))) == unread.like(kv_len) == masks.PackedUnread(8, 16, corner, window)


@pytest.mark.parametrize("queries", [0, 4])
@pytest.mark.parametrize("left", [-1, 3])
def test_a_cache_whose_lengths_are_not_read_hides_the_same(queries, left):
    filled = (20, 0, 7)
    unread = masks.FilledUnread(24, queries, left, torch.tensor(filled, dtype=torch.int32))
    known = masks.Filled(filled, queries, left)
    assert torch.equal(unread.dense(3, 4, 24), known.dense(3, 4, 24))
    like = unread.like(24)
    assert masks.parse(repr(like)) == like and hash(masks.parse(repr(like))) == hash(like)
    assert unread != masks.FilledUnread(24, queries, left, torch.tensor(filled)), "other lengths, whatever they are"
    with pytest.raises(ValueError, match="a cache of 3 entries"):
        unread.check(2, 1, 4, 24)


@pytest.mark.parametrize("make", [
    lambda: masks.PackedUnread((3, 4), (3, 4)), lambda: masks.PackedUnread(3, 4, are_same=True),
], ids=["lengths", "not the same"])  # fmt: skip
def test_packed_sequences_that_are_not_read_have_one_number_each(make):
    with pytest.raises(ValueError, match="queries and keys are a number each"):
        make()
