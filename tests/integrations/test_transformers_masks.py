"""transformers' masks, told: every mask that fastattn makes of theirs hides what their own dense mask hides."""

from __future__ import annotations

import inspect
import random
import sys

import pytest
import torch
from torch.utils import checkpoint

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import masking_utils as theirs

from fastattn import masks
from fastattn.integrations.transformers import ToldMask, library, make_mask, read_masks, tried_masks

IS_5 = hasattr(theirs, "blockwise_overlay")
WINDOW, CHUNK = 5, 6
only_5 = pytest.mark.skipif(not IS_5, reason="transformers 4 has no such mask")


def given(function, q_len, kv_len, start=0, kv_start=0, padding=None, batch=2, causal=True, **more):
    """What create_causal_mask and the others give a mask function, in the words of the installed version."""
    at = {"q_length": q_len, "q_offset": start, "device": torch.device("cpu")}
    if not IS_5:
        at = {"cache_position": torch.arange(q_len) + start}
    skips = {"allow_is_causal_skip": causal is True}  # None: their callers want a mask in any case
    if IS_5:
        skips["allow_is_bidirectional_skip"] = causal is False
    return {
        "batch_size": batch, "kv_length": kv_len, "kv_offset": kv_start, "mask_function": function,
        "attention_mask": padding, "local_size": size_of(function), **at, **skips, **more,
    }  # fmt: skip


def size_of(function):
    """The window or chunk, which stands in some closure of the function."""
    for cell in function.__closure__ or ():
        for part in cell.cell_contents if isinstance(cell.cell_contents, tuple) else ():
            names = dict(zip(part.__code__.co_freevars, part.__closure__ or (), strict=True))
            for name in ("sliding_window", "chunk_size"):
                if name in names:
                    return names[name].cell_contents
    return None


def dense_of(mask, a):
    """What a mask shows, whatever form it has."""
    q_len = a["q_length"] if IS_5 else len(a["cache_position"])
    full = (a["batch_size"], 1, q_len, a["kv_length"])
    if mask is None:
        seen = torch.ones(full[2:], dtype=torch.bool)
        return (seen.tril() if a["allow_is_causal_skip"] and q_len > 1 else seen).expand(full)
    return (mask.dense() if isinstance(mask, ToldMask) else mask).expand(full)


def check(a, *, told=True):
    """Ours hides what theirs hides, and is told (or None), not dense."""
    mask = make_mask(**a)
    want = dense_of(library.sdpa_mask(**{**a, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}), a)
    assert torch.equal(dense_of(mask, a), want), (mask, a)
    assert (mask is None or isinstance(mask, ToldMask)) == told, mask
    return mask


def functions(batch=2):
    """(name, function, whether it is causal). Their callers say the size of a window beside it."""
    padding = torch.tensor([0, 3][:batch])
    yield "causal", theirs.causal_mask_function, True
    yield "window", theirs.sliding_window_causal_mask_function(WINDOW), True
    yield "chunks", theirs.chunked_causal_mask_function(CHUNK, torch.zeros(batch, dtype=int)), True
    yield "chunks, padded", theirs.chunked_causal_mask_function(CHUNK, padding), True
    if IS_5:
        yield "all", theirs.bidirectional_mask_function, False
        yield "window on both sides", theirs.sliding_window_bidirectional_mask_function(WINDOW), False


PADDINGS = {
    "none": lambda n: None,
    "all are seen": lambda n: torch.ones(2, n, dtype=torch.bool),
    "right": lambda n: torch.arange(n) < torch.tensor([n, n // 2])[:, None],
    "right, both": lambda n: torch.arange(n) < torch.tensor([n - 1, n - 1])[:, None],
    "left": lambda n: torch.arange(n) >= torch.tensor([0, n // 2])[:, None],
    "holes": lambda n: (torch.arange(n) % 3 > 0).expand(2, n).clone(),
    "one entry is empty": lambda n: torch.arange(n) < torch.tensor([n, 0])[:, None],
}


# what caches give: (q_len, kv_len, start of the queries, start of the keys)
SHAPES = {
    "prefill": (16, 16, 0, 0),
    "more in a cache": (4, 20, 16, 0),
    "one token": (1, 17, 16, 0),
    "static, empty": (8, 24, 0, 0),
    "static, half full": (3, 24, 10, 0),
    "static, one token": (1, 24, 10, 0),
    "sliding, full": (1, WINDOW, 20, 21 - WINDOW),
    "sliding, several": (4, WINDOW + 3, 20, 21 - WINDOW),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", [name for name, *_ in functions()])
def test_a_mask_hides_what_theirs_hides(name, padding, shape):
    q_len, kv_len, start, kv_start = SHAPES[shape]
    [(function, is_causal)] = [row[1:] for row in functions() if row[0] == name]
    seen = PADDINGS[padding](kv_start + kv_len if shape.startswith("sliding") else start + q_len)
    # the chunks begin behind the padding that their caller counted; without an attention mask there is none
    if name == "chunks, padded" and seen is None:
        pytest.skip("left padding comes with an attention mask")
    told = not (not is_causal and start != kv_start and name != "all")
    check(given(function, q_len, kv_len, start, kv_start, seen, causal=is_causal), told=told)


def test_random_masks_hide_what_theirs_hide():
    draw = random.Random(0)
    for _ in range(300):
        start = draw.choice([0, 0, draw.randint(1, 40)])
        q_len = draw.choice([1, draw.randint(1, 30)])
        kv_start = draw.choice([0, draw.randint(0, start)])
        kv_len = start + q_len - kv_start + draw.choice([0, 0, draw.randint(1, 9)])
        name, function, is_causal = draw.choice([row for row in functions() if row[0] != "chunks, padded"])
        n = draw.randint(start + q_len, kv_start + kv_len)
        padding = draw.choice(list(PADDINGS.values()))(n)
        a = given(function, q_len, kv_len, start, kv_start, padding, causal=is_causal)
        mask = make_mask(**a)
        want = dense_of(
            library.sdpa_mask(**{**a, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}), a
        )
        assert torch.equal(dense_of(mask, a), want), (name, mask, a)


PACKED = torch.tensor([[*range(5), *range(7), *range(4)], [*range(9), *range(7)]])


def test_packed_sequences():
    ids = theirs.find_packed_sequence_indices(PACKED)
    for name, function, _ in list(functions())[:3]:
        if IS_5:
            function = theirs.remap_positions_for_packed_sequence(function, PACKED)
        elif name == "chunks":
            continue  # 4.57 counts chunks over all sequences
        function = theirs.and_masks(function, theirs.packed_sequence_mask_function(ids))
        mask = check(given(function, 16, 16, causal=None))
        assert "Document((" in repr(mask.told.mask), name


@only_5
def test_blocks_of_tokens_see_each_other():
    ids = torch.tensor([[-1, 0, 0, 0, -1, -1, 1, 1, -1, -1], [-1] * 5 + [0] * 5])
    for function in (theirs.causal_mask_function, theirs.sliding_window_causal_mask_function(3)):
        check(given(theirs.or_masks(function, theirs.blockwise_overlay(ids)), 10, 10, causal=None))
    apart = torch.tensor([[0, 0, -1, 0, 0, -1, -1, 1, 1, -1]] * 2)  # the block's tokens are no neighbours
    mixed = theirs.or_masks(theirs.causal_mask_function, theirs.blockwise_overlay(apart))
    check(given(mixed, 10, 10, causal=None), told=False)


def test_what_is_not_known_is_dense(caplog):
    def odd(b, h, i, j):
        return (j % 2 == 1) | (i == j)

    library._said.clear()
    check(given(theirs.and_masks(theirs.causal_mask_function, odd), 8, 8, causal=None), told=False)
    assert "odd" in caplog.text and "a dense mask is made" in caplog.text


def test_a_function_that_means_something_else_today_is_dense(monkeypatch, caplog):
    real = theirs.sliding_window_overlay

    def sliding_window_overlay(sliding_window):  # one key more than it used to
        def inner_mask(batch_idx, head_idx, q_idx, kv_idx):
            return kv_idx >= q_idx - sliding_window

        inner_mask.__module__, inner_mask.__qualname__ = theirs.__name__, "sliding_window_overlay.<locals>.inner_mask"
        return inner_mask

    tried_masks._try.cache_clear()
    library._said.clear()
    monkeypatch.setattr(theirs, "sliding_window_overlay", sliding_window_overlay)
    try:
        check(given(theirs.sliding_window_causal_mask_function(3), 8, 8, causal=None), told=False)
    finally:
        tried_masks._try.cache_clear()
    assert "is not what fastattn takes it for" in caplog.text
    monkeypatch.setattr(theirs, "sliding_window_overlay", real)
    check(given(theirs.sliding_window_causal_mask_function(3), 8, 8, causal=None))


def test_one_query_is_a_run_of_keys():
    causal, window = theirs.causal_mask_function, theirs.sliding_window_causal_mask_function(WINDOW)
    assert make_mask(**given(causal, 1, 17, 16)) is None
    assert make_mask(**given(causal, 1, 24, 10)).told == ((0, 11), None)
    assert make_mask(**given(window, 1, 24, 10)).told == ((11 - WINDOW, 11), None)
    padded = make_mask(**given(causal, 1, 17, 16, padding=PADDINGS["left"](17)))
    assert padded.told.mask.shape == (2, 1, 1, 17) and padded.told.mask.dtype is torch.bool  # as small as the padding


def test_padding_is_a_number_of_keys_where_it_can_be():
    n = read_masks.Lengths(2, 8, 8, 0, 0)
    assert read_masks.padding(PADDINGS["right"](8), n) == masks.Padding([8, 4])
    assert read_masks.padding(PADDINGS["left"](8), n) == masks.Padding([8, 4], "left")
    assert read_masks.padding(PADDINGS["all are seen"](8), n) is None
    assert "(0, 8)" not in repr(read_masks.padding(PADDINGS["holes"](8), n))


@only_5
@pytest.mark.parametrize("q_len, start", [(30, 0), (1, 40), (3, 12)])
def test_queries_of_another_sequence_need_no_positions(q_len, start):
    """Cross attention: the decoder may be longer than what it looks at."""
    for name in ("none", "right", "left"):
        check(given(theirs.bidirectional_mask_function, q_len, 16, start, 0, PADDINGS[name](16), causal=False))


@only_5
def test_keys_that_are_padding_for_all_are_cut_off():
    seen = torch.arange(16) < torch.tensor([10, 7])[:, None]
    told = make_mask(**given(theirs.bidirectional_mask_function, 16, 16, padding=seen, causal=False)).told
    assert told == ((0, 10), masks.Padding([10, 7]))


# --- a ToldMask is a tensor to everybody else


def told_mask():
    return make_mask(**given(theirs.sliding_window_causal_mask_function(3), 8, 8, causal=None))


def test_it_has_the_shape_of_a_tensor():
    mask = told_mask()
    assert mask.shape == (2, 1, 8, 8) and mask.dtype is torch.bool and mask.device.type == "cpu" and mask.ndim == 4
    assert mask.contiguous() is mask and mask.to(torch.bool) is mask and isinstance(mask, torch.Tensor)
    assert "Window(2" in repr(mask)


@pytest.mark.parametrize(
    "use",
    [
        lambda m: m[:, :, :, :5],
        lambda m: m[0, 0],
        lambda m: m.float() * 3,
        lambda m: torch.zeros(2, 1, 8, 8) + m,
        lambda m: torch.where(m, 0.0, -1.0),
        lambda m: m.logical_not() & True,
        lambda m: m.flip(dims=(-1,)),
        lambda m: torch.cat([m, m], -1),
        lambda m: m.all(),
        lambda m: m.expand(2, 3, 8, 8).reshape(6, 8, 8),
        lambda m: torch.nn.functional.scaled_dot_product_attention(
            *(torch.ones(2, 3, 8, 4) * 0.1 for _ in range(3)), m
        ),
        lambda m: torch.nn.functional.pad(m, (0, 2)),
        lambda m: m.to(torch.float64),
        lambda m: m.clone(),
    ],
)
def test_whatever_computes_with_it_gets_the_dense_mask(use):
    found = use(told_mask())
    assert type(found) is torch.Tensor
    assert torch.equal(found, use(told_mask().dense()))


def test_it_survives_checkpointing():
    seen = []

    def layer(x, mask):
        seen.append(mask)
        return x.exp() * 2

    for reentrant in (True, False):
        x = torch.ones(2, requires_grad=True)
        checkpoint.checkpoint(layer, x, told_mask(), use_reentrant=reentrant).sum().backward()
    assert len(seen) == 4 and all(isinstance(mask, ToldMask) for mask in seen)


def test_nothing_is_told_while_a_graph_is_traced():
    @torch.compile(backend="eager", fullgraph=True)
    def make(x):
        return x + make_mask(**given(theirs.causal_mask_function, 8, 8, causal=None))[0, 0]

    assert torch.equal(make(torch.zeros(8, 8)), torch.ones(8, 8).tril())
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        a = given(theirs.sliding_window_causal_mask_function(3), 8, 8)
        assert not isinstance(make_mask(**a), ToldMask)


def test_a_torch_that_has_no_tensors_without_memory_gets_the_dense_mask(monkeypatch):
    monkeypatch.setattr(sys.modules[make_mask.__module__], "CAN_BE_MADE", False)
    check(given(theirs.sliding_window_causal_mask_function(3), 8, 8, causal=None), told=False)


def test_their_arguments_are_those_we_know():
    """What their mask functions take; a new argument may mean something that is not read here."""
    known = {
        "batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "mask_function", "attention_mask", "local_size",
        "allow_is_causal_skip", "allow_is_bidirectional_skip", "allow_torch_fix", "use_vmap", "device", "cache_position",
        "kwargs",
    }  # fmt: skip
    assert set(inspect.signature(library.sdpa_mask).parameters) <= known
