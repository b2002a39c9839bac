"""Tilings of dense masks: every visible pair lies in one tile, and what a mask leaves out is left out."""

import pytest
import torch

from fastattn.problems.tilings import of_dense
from fastattn.problems.tilings.of_dense import tiling_of_dense
from fastattn.problems.tilings.worth import Worth

LOWEST = torch.finfo(torch.float32).min
ROWS, KEYS = torch.arange(700)[:, None], torch.arange(900)
WORTH = Worth(1.0, 1.0, 1.0)  # all but masks that leave more than 90%


def covered(tiling, batch, q_len, kv_len):
    """(b, q, k): in how many tiles each pair lies, and in how many that use the mask."""
    count = torch.zeros(batch, q_len, kv_len, dtype=torch.int64)
    masked = count.clone()
    for tile in tiling.tiles:
        for first, last in tile.keys:
            count[tile.batch, tile.rows, first:last] += 1
            masked[tile.batch, tile.rows, first:last] += tile.is_masked
    return count, masked


def as_float(mask, low, dtype=torch.float32):
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, low)


MASKS = {
    "causal": ROWS >= KEYS,
    "window": (ROWS - KEYS).abs() <= 40,
    "documents": ROWS // 130 == KEYS // 130,
    "prefix": (ROWS >= KEYS) | (KEYS < 100),
    "global tokens": ((ROWS - KEYS).abs() <= 20) | (KEYS < 4) | (ROWS < 4),
    "two runs": (KEYS < 10) | (KEYS > 600) & (ROWS > 300),
    "rows that see nothing": (ROWS > 256) & (KEYS < 300) & (KEYS > 17),
    "nothing at all": (ROWS < 0) & (KEYS < 0),
    "everything": (ROWS >= 0) & (KEYS >= 0),
    "one pair": (ROWS == 699) & (KEYS == 899),
    "odd columns": (ROWS >= 0) & (KEYS % 2 == 1),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kind", ["bool", "-inf", "float16", "finfo.min"])
def test_each_visible_pair_lies_in_one_tile(name, kind):
    seen = MASKS[name]
    dtype = torch.float16 if kind == "float16" else torch.float32
    mask = seen if kind == "bool" else as_float(seen, LOWEST if kind == "finfo.min" else -float("inf"), dtype)
    tiling = tiling_of_dense(mask, 3, 700, 900)
    count, masked = covered(tiling, 3, 700, 900)
    assert count.max() <= 1
    assert (count[:, seen] == 1).all()
    assert not ((count == 1) & (masked == 0))[:, ~seen].any(), "a hidden pair lies in a tile without a mask"
    assert tiling.share == pytest.approx(float((count == 1).double().mean()))
    assert tiling.masked_share == pytest.approx(float((masked == 1).double().mean()))
    rows = (count == 1).any(-1).all()
    assert tiling.has_every_row == bool(rows)
    if kind == "finfo.min":  # such a row has even weights over all keys, and they must all be there
        assert (count[:, ~seen.any(-1)] == 1).all()


@pytest.mark.parametrize("kind", ["bool", "-inf"])
def test_each_batch_entry_has_tiles_of_its_own_where_masks_differ(kind):
    lengths = torch.tensor([900, 450, 1, 0])
    seen = lengths[:, None, None, None] > KEYS
    mask = seen if kind == "bool" else as_float(seen, -float("inf"))
    tiling = tiling_of_dense(mask, 4, 700, 900)
    assert [(t.batch.start, t.rows, t.keys, t.is_masked) for t in tiling.tiles] == [
        (0, slice(0, 700), ((0, 900),), False), (1, slice(0, 700), ((0, 450),), False), (2, slice(0, 700), ((0, 1),), False)
    ]  # fmt: skip


def test_structure_is_found_closely():
    n = 4096
    i, j = torch.arange(n)[:, None], torch.arange(n)
    assert tiling_of_dense(i >= j, 1, n, n).share == pytest.approx(0.53, abs=0.01)
    documents = tiling_of_dense(i // 512 == j // 512, 1, n, n)
    assert documents.share == 1 / 8
    assert len(documents.tiles) == 8, "neighbours that see the same keys are one tile"
    assert not any(tile.is_masked for tile in documents.tiles)
    window = tiling_of_dense((i - j).abs() <= 128, 1, n, n)
    assert window.share < 0.13
    with_globals = tiling_of_dense(((i - j).abs() <= 128) | (j < 16), 1, n, n)
    assert with_globals.share < 0.14, "keys in the middle that nothing sees are left out"


def test_a_mask_without_structure_is_not_read_to_its_end():
    n = 1024
    seen = torch.rand(n, n, generator=torch.Generator().manual_seed(0)) < 0.3
    assert tiling_of_dense(seen, 1, n, n, WORTH) is None
    assert tiling_of_dense(seen, 1, n, n).share == 1.0
    assert tiling_of_dense(torch.ones(n, n, dtype=torch.bool), 1, n, n, WORTH) is None


@pytest.mark.parametrize(
    ("mask", "worth", "is_read"),
    [
        (ROWS >= KEYS, Worth(2.5, 1.0, 2.5), False),
        (ROWS >= KEYS, Worth(2.0, 1.0, 2.0), True),
        (KEYS.expand(700, 900) < 500, Worth(9.0, 1.0, 9.0), True),
        ((ROWS < 256) & (KEYS < 9) | (KEYS > 400), Worth(9.0, 1.0, 9.0, most=0.7), True),
        (KEYS.expand(700, 900) < 500, Worth(9.0, 1.0, 9.0, most=0.5), False),
    ],
    ids=["a triangle too dear", "a triangle", "keys without a mask", "gathered keys without a mask", "keys too dear"],
)
def test_the_first_look_tells_what_tiles_would_cost(mask, worth, is_read, monkeypatch):
    """Of the pairs of a triangle of 700 x 900 45% lie in tiles that have a mask."""
    want, read = tiling_of_dense(mask, 1, 700, 900, worth), []
    closely = of_dense._tiles
    monkeypatch.setattr(of_dense, "_tiles", lambda *args: read.append(1) or closely(*args))
    assert tiling_of_dense(mask, 1, 700, 900, worth) == want
    assert (bool(read), want is not None) == (is_read, is_read)


def test_heads_with_masks_of_their_own_have_no_tiling_and_repeated_ones_do():
    n = 512
    seen = (torch.arange(n)[:, None] >= torch.arange(n)).expand(2, 4, n, n)
    assert tiling_of_dense(seen.contiguous(), 2, n, n) is None
    assert tiling_of_dense(seen, 2, n, n).share < 0.7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", [1.0, -1.0, float("nan"), float("inf"), 0.0, -0.0], ids=str)
@pytest.mark.parametrize("read_at_once", [0, 2**30], ids=["tile by tile", "in one step"])
@pytest.mark.parametrize("row", [5, 699], ids=["first block", "last block"])
def test_a_tile_does_without_a_mask_where_it_would_add_nothing(row, read_at_once, value, dtype, monkeypatch):
    """One score of a row is changed, in the last block too, which is shorter."""
    monkeypatch.setattr(of_dense, "READ_AT_ONCE", read_at_once)
    mask = as_float((KEYS < 500).expand(700, 900), -float("inf"), dtype)
    mask[row, 17] = value
    is_masked = {
        tile.rows.start <= row < tile.rows.stop: tile.is_masked for tile in tiling_of_dense(mask, 1, 700, 900).tiles
    }
    assert is_masked[True] is (value != 0) and not is_masked.get(False, False)
    hidden = (KEYS < 500).expand(700, 900).clone()
    hidden[row, 17] = value == 0
    is_masked = {
        tile.rows.start <= row < tile.rows.stop: tile.is_masked for tile in tiling_of_dense(hidden, 1, 700, 900).tiles
    }
    assert is_masked[True] is (value != 0) and not is_masked.get(False, False)


def test_the_first_look_never_refuses_what_the_closer_one_would_take():
    """Random blocks that are seen, whole, in part or not at all, over lengths that no block divides."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(60):
        q_len, kv_len = (int(torch.randint(low, 900, (), generator=draw)) for low in (140, 300))
        blocks = torch.randint(0, 3, (1 + q_len // 64, 1 + kv_len // 64), generator=draw)
        blocks[:, int(torch.randint(0, blocks.shape[1], (), generator=draw)) :] = 0
        grown = blocks.repeat_interleave(64, 0).repeat_interleave(64, 1)[:q_len, :kv_len]
        mask = (grown == 1) | (grown == 2) & (torch.rand(q_len, kv_len, generator=draw) < 0.5)
        tiling = tiling_of_dense(mask, 1, q_len, kv_len)
        share, masked_share = of_dense._least_shares(mask[None], 128)
        assert share <= tiling.share + 1e-9 and masked_share <= tiling.masked_share + 1e-9


def test_what_the_first_look_lets_pass_the_closer_one_may_refuse():
    mask = (KEYS < 500).expand(700, 900).clone()
    mask[1::16, :] = True  # rows that the first look leaves out
    assert of_dense._least_shares(mask[None], 128)[0] < 0.6
    assert tiling_of_dense(mask, 1, 700, 900, WORTH) is None


@pytest.mark.parametrize("change", ["transposed", "sliced", "offset"])
def test_memory_order_does_not_matter(change):
    seen = MASKS["window"]
    views = {
        "transposed": seen.mT.contiguous().mT,
        "sliced": torch.zeros(700, 1801, dtype=torch.bool).index_copy_(1, 2 * KEYS, seen)[:, :1800:2],
        "offset": torch.zeros(701, 901, dtype=torch.bool)[1:, 1:].copy_(seen),
    }
    assert torch.equal(views[change], seen)
    assert tiling_of_dense(views[change], 1, 700, 900) == tiling_of_dense(seen, 1, 700, 900)


def test_a_nan_in_a_mask_is_seen():
    mask = torch.full((512, 512), -float("inf"))
    mask[300, 17] = float("nan")
    (tile,) = tiling_of_dense(mask, 1, 512, 512).tiles
    assert tile.rows.start <= 300 < tile.rows.stop
    assert tile.keys == ((17, 18),)
