"""Packed sequences, jagged tensors and filled caches are as one ordinary call a sequence, in float64 to the last digits."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastattn
from fastattn import attention, masks
from fastattn.planning.conversions import tile_stacks, tiles

TILES, STACKED = "torch_flash+tiles+mask_dense+mask_additive", "torch_flash+stacked+tiles+mask_dense+mask_additive"
WAYS = st.sampled_from(["", TILES, STACKED])
SIZES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=5)
SIDES = st.one_of(st.none(), st.tuples(st.integers(-1, 12), st.integers(-1, 12)))
CORNERS = st.sampled_from([None, masks.Causal(), masks.Causal("bottom_right")])
SAME = {"atol": 1e-12, "rtol": 1e-10}
drawn = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def tiny_tiles_untuned(monkeypatch):
    monkeypatch.setattr(tiles, "PAIRS", 1)
    monkeypatch.setattr(tiles, "ROWS", 1)
    monkeypatch.setattr(tiles, "WORK", 1)
    monkeypatch.setattr(tile_stacks, "FEWER", 0)
    with fastattn.options.scope(mode="cached"):
        yield


def draw(*shape, seed=0, grad=False):
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_(grad)


def ends(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def packed_qkv(queries, keys, heads=(4, 2), head_dim=8, head_dim_v=6, grad=False, spare=0):
    n, m = sum(queries) + spare, sum(keys) + spare
    q, k, v = draw(n, heads[0], head_dim), draw(m, heads[1], head_dim, seed=1), draw(m, heads[1], head_dim_v, seed=2)
    return tuple(x.requires_grad_(grad) for x in (q, k, v))


def call(way, q, k, v, mask=None, layout="bhsd", **options):
    """attention(), by torch's kernel in tiles or stacks where that is wanted and there is something to compute."""
    rows = fastattn.explain(q, k, v, mask, layout, **options).rows if way else ()
    names = [row.candidate for row in rows if row.candidate.startswith(way) and row.outcome != "refused"]
    return attention(q, k, v, mask, layout, **options, kernel=names[0] if names else None)


def one_by_one(q, k, v, queries, keys, mask=None, window=None):
    """(out, lse) of packed sequences by a call of plain math for each."""
    outs, lses, i, j = [], [], 0, 0
    for n, m in zip(queries, keys, strict=True):
        parts = (x.transpose(0, 1)[None] for x in (q[i : i + n], k[j : j + m], v[j : j + m]))
        if n:
            found, lse = attention(*parts, mask, window=window, return_lse=True, kernel="sdpa_math")
            outs.append(found[0].transpose(0, 1))
            lses.append(lse[0])
        i, j = i + n, j + m
    outs.append(q.new_zeros(q.shape[0] - i, *v.shape[1:2], v.shape[2]).repeat_interleave(q.shape[1] // v.shape[1], 1))
    lses.append(torch.full((q.shape[1], q.shape[0] - i), float("-inf")))
    return torch.cat(outs), torch.cat(lses, 1)


@drawn
@given(SIZES, CORNERS, SIDES, st.integers(0, 3), WAYS)
def test_packed_sequences_are_as_one_call_each(sizes, mask, window, spare, way):
    queries, keys = zip(*sizes, strict=True)
    q, k, v = packed_qkv(queries, keys, spare=spare)
    found, lse = call(
        way, q, k, v, mask, "thd", cu_seqlens_q=ends(queries), cu_seqlens_kv=ends(keys), window=window, return_lse=True,
    )  # fmt: skip
    want, want_lse = one_by_one(q, k, v, queries, keys, mask, window)
    torch.testing.assert_close(found, want, **SAME)
    torch.testing.assert_close(lse, want_lse.float(), atol=1e-5, rtol=1e-5)


@drawn
@given(SIZES, CORNERS, SIDES, st.booleans(), WAYS)
def test_gradients_of_packed_sequences_are_those_of_one_call_each(sizes, mask, window, are_same, way):
    queries, keys = zip(*sizes, strict=True)
    keys = queries if are_same else keys
    q, k, v = packed_qkv(queries, keys, grad=True)
    lengths = {"cu_seqlens_q": ends(queries), "cu_seqlens_kv": ends(keys)}
    found = call(way, q, k, v, mask, "thd", **lengths, window=window)
    want, _ = one_by_one(q, k, v, queries, keys, mask, window)
    if not (sum(queries) and sum(keys)):
        assert found.shape == want.shape
        return
    weight = draw(*want.shape, seed=3)
    got = torch.autograd.grad((found * weight).sum(), (q, k, v))
    expected = torch.autograd.grad((want * weight).sum(), (q, k, v))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **SAME)


def test_lengths_may_be_a_list_and_their_maximum_may_be_told():
    q, k, v = packed_qkv([3, 4], [3, 4])
    want = attention(q, k, v, None, "thd", cu_seqlens_q=ends([3, 4]))
    told = attention(q, k, v, None, "thd", cu_seqlens_q=[0, 3, 7], cu_seqlens_kv=(0, 3, 7), max_q_len=4, max_kv_len=9)
    assert torch.equal(want, told)


def test_lengths_that_are_written_into_are_read_anew():
    lengths = ends([3, 4])
    q, k, v = packed_qkv([3, 4], [3, 4])
    for second in (4, 5, 2, 4):
        lengths.numpy()[1] = second
        want, _ = one_by_one(q, k, v, [second, 7 - second], [second, 7 - second])
        torch.testing.assert_close(attention(q, k, v, None, "thd", cu_seqlens_q=lengths), want, **SAME)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_jagged_tensor_in_is_a_jagged_tensor_out(layout, is_causal):
    lengths = [5, 1, 9]
    q, k, v = packed_qkv(lengths, lengths, grad=True)
    nested = [torch.nested.nested_tensor_from_jagged(x, ends(lengths)) for x in (q, k, v)]
    if layout == "bhsd":
        nested = [x.transpose(1, 2) for x in nested]
    out = attention(*nested, None, layout, is_causal=is_causal)
    assert out.is_nested and out.layout is torch.jagged
    out = out.transpose(1, 2) if layout == "bhsd" else out
    want = attention(q, k, v, None, "thd", cu_seqlens_q=ends(lengths), is_causal=is_causal)
    assert torch.equal(out.values(), want)
    got, expected = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out.values(), want))
    assert all(map(torch.equal, got, expected))
    assert (out * 2 + nested[0].new_zeros(())).values().shape == want.shape, "it goes on as one of torch's own"


@pytest.mark.parametrize("corner", ["top_left", "bottom_right", None])
@pytest.mark.parametrize("window", [None, (3, 2)])
def test_thd_a_jagged_tensor_and_a_padded_batch_give_the_same(corner, window):
    lengths = [5, 0, 9, 1]
    own = masks.Causal(corner) if corner else None
    band = [own] if corner else []
    band += [masks.Window(*window)] if window else []
    real = torch.arange(9) < torch.tensor(lengths)[:, None]

    def thd(q, k, v):
        return attention(q, k, v, own, "thd", cu_seqlens_q=ends(lengths), window=window)

    def jagged(*qkv):
        nested = (torch.nested.nested_tensor_from_jagged(x, ends(lengths)) for x in qkv)
        return attention(*nested, own, "bshd", window=window).values()

    def padded(*qkv):
        batch = (x.new_zeros(*real.shape, *x.shape[1:]).masked_scatter(real[..., None, None], x) for x in qkv)
        return attention(*batch, masks.all_of([masks.Padding(lengths), *band]), "bshd")[real]

    found = []
    for form in (thd, jagged, padded):
        tensors = packed_qkv(lengths, lengths, grad=True)
        out = form(*tensors)
        found.append((out, *torch.autograd.grad((out * draw(*out.shape, seed=3)).sum(), tensors)))
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            torch.testing.assert_close(got, want, **SAME)


@drawn
@given(
    st.lists(st.integers(0, 30), min_size=3, max_size=3), st.sampled_from([1, 4]), st.booleans(), SIDES,
    st.sampled_from(["bhsd", "bshd", "sbhd"]), WAYS,
)  # fmt: skip
def test_a_cache_is_read_as_far_as_it_is_filled(filled, q_len, is_corner, window, layout, way):
    window = window if is_corner and window is None else None if not is_corner else (window[0], 0)
    q, k, v = draw(3, 4, q_len, 8), draw(3, 2, 30, 8, seed=1), draw(3, 2, 30, 8, seed=2)
    for b, n in enumerate(filled):
        k[b, :, n:] = v[b, :, n:] = float("nan")
    mask = masks.Causal("bottom_right") if is_corner else None
    order = {"bhsd": (0, 1, 2, 3), "bshd": (0, 2, 1, 3), "sbhd": (2, 0, 1, 3)}[layout]
    tensors = (x.permute(order) for x in (q, k, v))
    found = call(way, *tensors, mask, layout, kv_lens=torch.tensor(filled), window=window)
    found = found.permute([order.index(i) for i in range(4)])
    for b, n in enumerate(filled):
        parts = q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n]
        want = attention(*parts, mask, window=window, kernel="sdpa_math")
        torch.testing.assert_close(found[b : b + 1], want, **SAME)


def test_a_cache_takes_a_mask_beside_its_lengths():
    q, k, v = draw(2, 4, 3, 8), draw(2, 4, 12, 8, seed=1), draw(2, 4, 12, 8, seed=2)
    seen = draw(2, 1, 3, 12, seed=4) > -1
    filled = torch.tensor([12, 7])
    inside = torch.arange(12) < filled[:, None, None, None]
    want = attention(q, k, v, seen & inside)
    torch.testing.assert_close(attention(q, k, v, seen, kv_lens=filled), want, **SAME)
    added = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, float("-inf"))
    torch.testing.assert_close(attention(q, k, v, added, kv_lens=filled), want, **SAME)
    both_at_7 = attention(q, k, v, seen, kv_lens=7)
    torch.testing.assert_close(both_at_7, attention(q, k[:, :, :7], v[:, :, :7], seen[..., :7]), **SAME)
    prefix = masks.Causal() | masks.Prefix(5)
    want = attention(q, k, v, prefix.dense(2, 3, 12) & inside)
    torch.testing.assert_close(attention(q, k, v, prefix, kv_lens=filled), want, **SAME)


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_pages_are_a_cache(layout):
    pages, filled = torch.tensor([[4, 0, 2], [1, 5, 5]]), torch.tensor([11, 6])
    shape = (6, 2, 4, 8) if layout == "bhsd" else (6, 4, 2, 8)
    q, k, v = draw(2, 4, 1, 8), draw(*shape, seed=1), draw(*shape, seed=2)
    q = q if layout == "bhsd" else q.transpose(1, 2)
    found = attention(q, k, v, None, layout, kv_lens=filled, page_table=pages)
    whole = []
    for x in (k, v):
        x = x if layout == "bhsd" else x.transpose(1, 2)
        whole.append(torch.stack([torch.cat([x[page] for page in row], 1) for row in pages.tolist()]))
    q = q if layout == "bhsd" else q.transpose(1, 2)
    want = attention(q, *whole, kv_lens=filled)
    found = found if layout == "bhsd" else found.transpose(1, 2)
    assert torch.equal(found, want), "bit for bit what the contiguous cache gives"


@pytest.mark.parametrize(
    "mask",
    [None, masks.Causal(), masks.Causal("bottom_right"), masks.Causal("bottom_right") & masks.Window(2, 0)],
    ids=str,
)
@pytest.mark.parametrize("window", [None, (3, 2)])
@pytest.mark.parametrize("lengths", [[9, 2, 5], [7, 7, 7]])
def test_without_a_look_at_the_lengths_it_is_the_same(mask, window, lengths, monkeypatch):
    """On CUDA, and in a graph, the mask is made of lengths that nobody reads."""
    from fastattn.problems.rewriting import caches, sequences

    queries, keys = [3, 0, 5, 2], [4, 2, 5, 0]
    q, k, v = packed_qkv(queries, keys, spare=2)
    packed = {"cu_seqlens_q": ends(queries), "cu_seqlens_kv": ends(keys), "window": window}
    cache = draw(3, 4, 2, 8), draw(3, 4, 9, 8, seed=1), draw(3, 4, 9, 8, seed=2)
    filled = {"kv_lens": torch.tensor(lengths), "window": window if "Window" not in repr(mask) else None}
    of_packed = mask if "&" not in repr(mask) else None
    want = attention(q, k, v, of_packed, "thd", **packed), attention(*cache, mask, **filled)
    for module in (caches, sequences):
        monkeypatch.setattr(module, "is_readable", lambda lengths: False)
    found = attention(q, k, v, of_packed, "thd", **packed), attention(*cache, mask, **filled)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, **SAME)


def test_it_is_compiled_without_a_break():
    q, k, v = packed_qkv([3, 4], [3, 4])
    lengths = ends([3, 4])

    def packed(q, k, v, lengths):
        return attention(q, k, v, None, "thd", cu_seqlens_q=lengths, is_causal=True)

    compiled = torch.compile(packed, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v, lengths), packed(q, k, v, lengths), **SAME)
    cache = draw(2, 4, 1, 8), draw(2, 4, 9, 8, seed=1), draw(2, 4, 9, 8, seed=2)
    filled = torch.tensor([9, 2])
    compiled = torch.compile(lambda *x: attention(*x[:3], kv_lens=x[3]), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*cache, filled), attention(*cache, kv_lens=filled), **SAME)


THD = packed_qkv([3, 4], [3, 4])
CACHE = draw(2, 4, 3, 8), draw(2, 4, 9, 8, seed=1), draw(2, 4, 9, 8, seed=2)
ENDS = torch.tensor([0, 3, 7])
CORNERED = masks.Causal("bottom_right") & masks.Prefix(2)
BAD = [
    (THD, {"layout": "thd"}, ValueError, "layout='thd' needs cu_seqlens_q"),
    (CACHE, {"layout": "thd", "cu_seqlens_q": ENDS}, ValueError, "q must have 3 dimensions (thd), got shape (2, 4, 3, 8)"),
    (THD, {"layout": "thd", "cu_seqlens_q": torch.tensor([0, 3, 8])}, ValueError, "cu_seqlens_q must rise from 0 to 7 tokens"),
    (THD, {"layout": "thd", "cu_seqlens_q": torch.tensor([0, 5, 3])}, ValueError, "cu_seqlens_q must rise from 0"),
    (THD, {"layout": "thd", "cu_seqlens_q": torch.tensor([0.0, 7.0])}, TypeError, "cu_seqlens_q must be whole numbers"),
    (THD, {"layout": "thd", "cu_seqlens_q": ENDS, "cu_seqlens_kv": torch.tensor([0, 7])}, ValueError, "cu_seqlens_kv 1"),
    (THD, {"layout": "thd", "cu_seqlens_q": ENDS, "max_q_len": 3}, ValueError, "max_q_len is 3, the longest sequence"),
    (THD, {"layout": "thd", "cu_seqlens_q": ENDS, "kv_lens": ENDS}, ValueError, "kv_lens is of a cache"),
    (THD, {"layout": "thd", "cu_seqlens_q": ENDS, "mask": torch.ones(7, 7)}, ValueError, "mask is None or masks.Causal"),
    (CACHE, {"cu_seqlens_q": ENDS}, ValueError, "cu_seqlens_q goes with layout='thd'"),
    (CACHE, {"kv_lens": torch.tensor([9, 10])}, ValueError, "kv_lens must be 2 numbers from 0 to kv_len 9, got [9, 10]"),
    (CACHE, {"kv_lens": torch.tensor([9])}, ValueError, "kv_lens must be 2 numbers"),
    (CACHE, {"kv_lens": torch.tensor([9.0, 1.0])}, TypeError, "kv_lens must be whole numbers"),
    (CACHE, {"page_table": ENDS}, ValueError, "page_table needs kv_lens"),
    (CACHE, {"kv_lens": ENDS[:2], "page_table": ENDS}, ValueError, "page_table is [batch, pages]"),
    (CACHE, {"kv_lens": [9, 3], "mask": CORNERED}, ValueError, "a mask speaks of positions"),
    (CACHE, {"kv_lens": [9, 9], "mask": masks.Padding([9, 3], "left")}, ValueError, "a mask speaks of positions"),
    (CACHE, {"kv_lens": [9, 9], "mask": masks.Document([4, 5])}, ValueError, "a mask speaks of positions"),
    (CACHE, {"kv_lens": [9, 3], "mask": torch.ones(2, 3, 9)}, ValueError, "a 3-D mask (2, 3, 9) is ambiguous"),
    (CACHE, {"kv_lens": [9, 3], "mask": torch.ones(3, 8)}, RuntimeError, "mask (3, 8) does not broadcast"),
    (CACHE, {"kv_lens": [9, 3], "dropout_p": 0.1}, ValueError, "dropout_p does not go with kv_lens"),
    (CACHE, {"kv_lens": [9, 3], "is_causal": "no"}, TypeError, "is_causal must be bool, got str"),
    (CACHE, {"kv_lens": {9, 3}}, TypeError, "kv_lens must be whole numbers in one dimension, got set"),
    (CACHE, {"kv_lens": True}, TypeError, "kv_lens must be whole numbers"),
    (CACHE, {"kv_lens": [9, 3], "page_table": torch.rand(2, 2)}, TypeError, "page_table must be whole numbers, got float32"),
    (CACHE, {"kv_lens": [9, 3], "page_table": torch.tensor([[0], [7]])}, ValueError, "pages from 0 to 1, got 7 at [1, 0]"),
    ((*CACHE[:2], CACHE[2][:, :, :5]), {"kv_lens": [9, 3]}, RuntimeError, "k and v must agree in heads and length"),
    (THD, {"layout": "thd", "cu_seqlens_q": ENDS, "is_causal": "no"}, TypeError, "is_causal must be bool, got str"),
    (THD, {"layout": "thd", "cu_seqlens_q": torch.tensor(7)}, TypeError, "cu_seqlens_q must be whole numbers in one dimension"),
    (THD, {"layout": "thd", "cu_seqlens_q": [0]}, ValueError, "a number more than sequences; got [0]"),
    (THD, {"layout": "thd", "cu_seqlens_q": ENDS, "max_q_len": "x"}, TypeError, "max_q_len must be whole numbers"),
    (([1.0], *THD[1:]), {"layout": "thd", "cu_seqlens_q": ENDS}, NotImplementedError, "layout 'thd' is of one call"),
    (CACHE, {"kv_lens": [9, 3], "mask": "causal"}, TypeError, "beside kv_lens, mask is None, a Tensor or a Mask, got str"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "options", "kind", "text"), BAD, ids=[text[:45] for *_, text in BAD])
def test_lengths_that_do_not_fit_are_refused_in_words(tensors, options, kind, text):
    with pytest.raises(kind) as raised:
        attention(*tensors, **options)
    assert text in str(raised.value)


def test_lengths_may_be_arrays():
    np = pytest.importorskip("numpy")
    want = attention(*CACHE, kv_lens=[9, 3])
    for lengths in (
        np.array([9, 3]),
        np.array([9, 3], dtype=np.uint8),
        [np.int64(9), 3],
        torch.tensor([9, 3], dtype=torch.uint8),
    ):
        assert torch.equal(attention(*CACHE, kv_lens=lengths), want)
    assert torch.equal(attention(*CACHE, kv_lens=np.int64(5)), attention(*CACHE, kv_lens=5))
    ends = np.array([0, 3, 7], dtype=np.int32)
    assert torch.equal(
        attention(*THD, layout="thd", cu_seqlens_q=ends), attention(*THD, layout="thd", cu_seqlens_q=ENDS)
    )


def test_values_of_other_lengths_than_keys_are_refused():
    q, k, v = (torch.nested.nested_tensor_from_jagged(x, ENDS) for x in THD)
    other = torch.nested.nested_tensor_from_jagged(THD[2], torch.tensor([0, 4, 7]))
    with pytest.raises(ValueError, match="k and v are NestedTensors of other lengths"):
        attention(q, k, other, layout="bshd")


@pytest.mark.parametrize("way", ["off", "grad", "lse", "sinks"])
def test_what_lies_behind_the_filled_part_reaches_no_answer(way):
    q, k, v = (x.clone() for x in CACHE)
    k[1, :, 3:] = v[1, :, 3:] = float("nan")
    want = attention(*CACHE, kv_lens=[9, 3])
    if way == "off":
        with fastattn.options.scope(mode="off"):
            torch.testing.assert_close(attention(q, k, v, kv_lens=[9, 3]), want, **SAME)
    elif way == "grad":
        found = torch.func.grad(lambda q: attention(q, k, v, kv_lens=[9, 3]).sum())(q)
        assert found.isfinite().all()
    else:
        q.requires_grad_()
        more = {"return_lse": True} if way == "lse" else {"sinks": torch.zeros(4, dtype=torch.float64)}
        found = attention(q, k, v, kv_lens=[9, 3], **more)
        out = sum(x.sum() for x in found) if way == "lse" else found.sum()
        assert torch.autograd.grad(out, q)[0].isfinite().all()


def test_a_wide_page_table_is_read_as_far_as_the_cache_is_filled(monkeypatch):
    pages = draw(4, 4, 2, 8)
    table = torch.tensor([[1, 2, 99, 99]])  # only 5 tokens are filled: the rest names no page
    found = attention(draw(1, 1, 4, 8), pages, pages, layout="bshd", kv_lens=[5], page_table=table)
    assert found.isfinite().all()


def test_what_is_bound_takes_no_lengths():
    for tensors, options in (
        (CACHE, {"kv_lens": torch.tensor([9, 3])}),
        (THD, {"layout": "thd", "cu_seqlens_q": ENDS}),
    ):
        with pytest.raises(NotImplementedError, match=r"plan\(\) binds no lengths of one call"):
            fastattn.plan(*tensors, **options)


def test_explain_speaks_of_the_ordinary_call():
    found = fastattn.explain(*THD, layout="thd", cu_seqlens_q=ENDS)
    assert found.problem.structure == "Document(4)" and found.problem.layout == "bshd"
    assert fastattn.explain(*CACHE, kv_lens=5).problem.kv_len == 5
