"""Packed sequences and caches on a GPU that is made up: libraries are told their lengths, and nobody reads one."""

from __future__ import annotations

import functools
import sys
from dataclasses import replace

import pytest
import stubs
import torch
from fakes import FAST, Clock, made_up, problem, turn
from library_grid import gpu
from stubs import flash_attn_2, flash_attn_3, flash_attn_4, torch_varlen, transformer_engine

import fastattn
from fastattn import attention, masks
from fastattn.planning.conversions import own_forms
from fastattn.planning.conversions.heads import when_gqa_fold
from fastattn.problems.call_facts import ordinary_facts
from fastattn.problems.packing import packing_of
from fastattn.problems.rewriting import caches, sequences
from fastattn.tuning.accuracy.probes import plain_sample
from fastattn.verdicts.verdict import Outcome

WINNER = "flash_attn_2+packed"
BR = masks.Causal("bottom_right")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def on_gpu(monkeypatch):
    """Lengths in tensors are taken for a GPU's; FlashAttention 2 is here, and the fastest."""
    for module in (sequences, caches):
        monkeypatch.setattr(module, "is_readable", lambda lengths: not isinstance(lengths, torch.Tensor))
        monkeypatch.setattr(module, "is_on_gpu", lambda lengths: isinstance(lengths, torch.Tensor))
    clock = turn(monkeypatch, Clock({"flash_attn_2": FAST}))
    with gpu(monkeypatch, flash_attn_2.STUB):
        yield clock


@pytest.fixture
def reads(monkeypatch):
    """What is read from tensors outside a library: on a GPU each would wait for it."""
    seen = []

    def noting(name, real):
        def read(self, *given):
            if not stubs.is_inside():
                seen.append(name)
            return real(self, *given)

        return read

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, noting(name, getattr(torch.Tensor, name)))
    return seen


def ends(*lengths):
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)


def packed(tokens, kv_tokens=None, grad=False, seed=0, heads=8, kv_heads=2):
    g = torch.Generator().manual_seed(seed)
    shapes = (tokens, heads, 64), (kv_tokens or tokens, kv_heads, 64), (kv_tokens or tokens, kv_heads, 64)
    return tuple(torch.randn(shape, generator=g).bfloat16().requires_grad_(grad) for shape in shapes)


def one_by_one(q, k, v, cu_q, cu_kv, mask=None):
    """In float64, a call for each sequence; zeros behind the last."""
    outs = []
    for n in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[n], cu_q[n + 1]), slice(cu_kv[n], cu_kv[n + 1])
        part = (q[rows], k[keys], v[keys])
        part = (x.double().transpose(0, 1)[None] for x in part)
        outs.append(attention(*part, mask, kernel="sdpa_math")[0].transpose(0, 1))
    return torch.cat([*outs, q.new_zeros(len(q) - int(cu_q[-1]), *outs[0].shape[1:], dtype=torch.float64)])


def is_close(found, want):
    assert (found - want).abs().max() <= 0.01 * max(1.0, float(want.detach().abs().max()))


def test_a_librarys_own_entry_point_wins_and_serves_whatever_the_lengths_are(on_gpu, reads):
    for number, lengths in enumerate([(30, 33, 1), (12, 32, 20), (0, 60, 4)]):
        tensors, cu = packed(64), ends(*lengths)
        reads.clear()
        found = attention(*tensors, layout="thd", cu_seqlens_q=cu, is_causal=True)
        assert number == 0 or not reads, "a hit waits for nothing"
        is_close(found, one_by_one(*tensors, cu, cu, masks.Causal()))
        if number == 0:
            assert WINNER in on_gpu.timed
            timed = list(on_gpu.timed)
    assert on_gpu.timed == timed, "one verdict for all"
    shown = fastattn.explain(*packed(64), layout="thd", cu_seqlens_q=ends(30, 33, 1), is_causal=True)
    assert shown.served_by == WINNER and shown.problem.structure == "PackedUnread(32, 32, 'top_left', are_same=True)"


def test_lengths_that_are_known_take_the_same_way(on_gpu):
    tensors = packed(64)
    found = attention(*tensors, layout="thd", cu_seqlens_q=[0, 30, 63, 64], is_causal=True)
    is_close(found, one_by_one(*tensors, ends(30, 33, 1), ends(30, 33, 1), masks.Causal()))
    shown = fastattn.explain(*tensors, layout="thd", cu_seqlens_q=[0, 30, 63, 64], is_causal=True)
    assert shown.served_by == WINNER and shown.problem.structure == "Causal() & Document(32)"
    dense = (x.transpose(0, 1)[None] for x in tensors)
    shown = fastattn.explain(*dense, masks.Causal() & masks.Document([30, 33, 1]), tune=True)
    assert shown.served_by == WINNER, "so does a mask that says the same"


def test_gradients_are_right_and_zero_behind_the_last_sequence(on_gpu):
    cu_q, cu_kv = ends(20, 0, 41), ends(50, 3, 20)
    found, want = (packed(64, 80, grad=True) for _ in range(2))
    call = {"layout": "thd", "cu_seqlens_q": cu_q, "cu_seqlens_kv": cu_kv, "max_q_len": 41, "max_kv_len": 50}
    out = attention(*found, BR, **call)
    assert fastattn.explain(*found, BR, **call).served_by == WINNER
    exact = one_by_one(*want, cu_q, cu_kv, BR)
    is_close(out, exact)
    assert out[61:].eq(0).all()
    weight = torch.randn(out.shape)
    got = torch.autograd.grad((out * weight).sum(), found)
    for a, b in zip(got, torch.autograd.grad((exact * weight).sum(), want), strict=True):
        is_close(a, b)
    assert all(x[end:].eq(0).all() for x, end in zip(got, (61, 73, 73), strict=True))


def test_what_is_told_of_the_longest_sequence_reaches_the_library(on_gpu):
    told = {"layout": "thd", "cu_seqlens_q": ends(20, 44), "kernel": "flash_attn_2"}
    for more, want in (({}, (64, 64)), ({"max_q_len": 44}, (44, 44)), ({"max_q_len": 44, "max_kv_len": 50}, (44, 50))):
        attention(*packed(64), **told, **more)
        given = stubs.calls[-1][1]
        assert (given["max_seqlen_q"], given["max_seqlen_k"]) == want
        assert given["cu_seqlens_q"] is given["cu_seqlens_k"] and given["cu_seqlens_q"].dtype is torch.int32


def test_a_jagged_tensor_takes_it_too_and_nothing_is_hidden_behind_it(on_gpu, monkeypatch):
    monkeypatch.setattr(own_forms, "_hidden", None)  # no token lies behind its last sequence
    tensors, cu = packed(64), ends(30, 33, 1)
    nested = [torch.nested.nested_tensor_from_jagged(x, cu) for x in tensors]
    out = attention(*nested, layout="bshd", is_causal=True)
    is_close(out.values(), one_by_one(*tensors, cu, cu, masks.Causal()))
    assert stubs.calls[-1][0] == "flash_attn_varlen_func"


def test_what_no_entry_point_draws_is_a_dense_mask_as_before(on_gpu):
    tensors, cu_q, cu_kv = packed(64, 80), ends(20, 0, 41), ends(50, 3, 20)
    found = attention(*tensors, masks.Causal(), layout="thd", cu_seqlens_q=cu_q, cu_seqlens_kv=cu_kv)
    is_close(found, one_by_one(*tensors, cu_q, cu_kv, masks.Causal()))
    shown = fastattn.explain(*tensors, masks.Causal(), layout="thd", cu_seqlens_q=cu_q, cu_seqlens_kv=cu_kv)
    assert "mask_dense" in shown.served_by or shown.served_by == "sdpa_math"
    [row] = [row for row in shown.rows if row.candidate == "flash_attn_2"]
    assert row.reason == "packed, top_left, queries and keys of lengths of their own: it draws bottom_right"


def test_a_winner_that_raises_is_answered_by_a_dense_mask(on_gpu, monkeypatch):
    tensors, cu = packed(64), ends(30, 33, 1)
    attention(*tensors, layout="thd", cu_seqlens_q=cu, is_causal=True)
    fastattn.clear()

    def broken(**_):
        raise RuntimeError("no kernel image is available for execution on the device")

    broken.__signature__ = flash_attn_2.flash_attn_varlen_func.__signature__
    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_varlen_func", broken)
    is_close(
        attention(*tensors, layout="thd", cu_seqlens_q=cu, is_causal=True), one_by_one(*tensors, cu, cu, masks.Causal())
    )


def test_a_library_without_that_function_is_refused_for_packed_sequences_alone(on_gpu, monkeypatch):
    monkeypatch.delattr(sys.modules["flash_attn"], "flash_attn_varlen_func")
    tensors, cu = packed(64), ends(30, 33, 1)
    is_close(
        attention(*tensors, layout="thd", cu_seqlens_q=cu, is_causal=True), one_by_one(*tensors, cu, cu, masks.Causal())
    )
    shown = fastattn.explain(*tensors, layout="thd", cu_seqlens_q=cu, is_causal=True)
    [row] = [row for row in shown.rows if row.candidate == WINNER]
    assert "flash_attn_varlen_func" in row.reason
    dense = [x.transpose(0, 1)[None] for x in tensors]
    assert fastattn.explain(*dense, is_causal=True, tune=True).served_by == "flash_attn_2"


@pytest.mark.parametrize("options, text", [
    ({"cu_seqlens_q": torch.tensor([[0, 64]])}, "cu_seqlens_q must be one number more than there are sequences"),
    ({"cu_seqlens_q": torch.tensor([0])}, "cu_seqlens_q must be one number more"),
    ({"cu_seqlens_q": ends(64), "cu_seqlens_kv": ends(32, 32)}, "cu_seqlens_kv must be one number more"),
], ids=["2d", "none", "count"])  # fmt: skip
def test_lengths_of_a_wrong_shape_are_refused_without_a_look(options, text, on_gpu):
    with pytest.raises(ValueError, match=text):
        attention(*packed(64), layout="thd", **options)


def test_a_longest_sequence_that_is_no_number_is_refused(on_gpu):
    with pytest.raises(TypeError, match="max_q_len must be whole numbers"):
        attention(*packed(64), layout="thd", cu_seqlens_q=ends(64), max_q_len="long")


@pytest.mark.parametrize("structure, q_len, found", [
    ("Document(8)", 64, ("", None, None, True)),
    ("Causal() & Document(8)", 64, ("top_left", None, 0, True)),
    ("Causal() & Document(8) & Window(3, 2)", 64, ("top_left", -3, 0, True)),
    ("Document(8) & Window(3, -1)", 64, ("top_left", -3, None, True)),
    ("Document(8)", 32, None),
    ("Packed(8, 4, 'bottom_right', (2, -1))", 64, ("bottom_right", -2, 0, False)),
    ("PackedUnread(8, 8, 'top_left', are_same=True)", 64, ("top_left", None, 0, True)),
    ("Causal() & Packed(8, 4)", 64, None),
    ("Document(8) & Global(1)", 64, None),
    ("Document(8) | Window(1, 1)", 64, None),
    ("Document(8) & Packed(8, 8)", 64, None),
    ("Document(((8, 56), (4, 60)))", 64, None),
], ids=str)  # fmt: skip
def test_what_is_packed_sequences_and_nothing_else(structure, q_len, found):
    packing = packing_of(structure, q_len, 64)
    assert (packing and (packing.corner, packing.lower, packing.upper, packing.are_same)) == found


@pytest.mark.parametrize("stub", [flash_attn_3.STUB, flash_attn_4.STUB, torch_varlen.STUB], ids=lambda s: s.file)
def test_the_others_serve_by_name(stub, monkeypatch, on_gpu):
    name = stub.file
    tensors, cu = packed(64), ends(30, 33, 1)
    with gpu(monkeypatch, stub):
        out = attention(*tensors, layout="thd", cu_seqlens_q=cu, is_causal=True, kernel=name)
    is_close(out, one_by_one(*tensors, cu, cu, masks.Causal()))
    assert stubs.calls[-1][0].endswith(("flash_attn_varlen_func", "varlen_attn"))


@pytest.mark.parametrize("heads, kv_heads", [(8, 2), (2, 1), (4, 4)])
def test_transformer_engine_is_tuned_on_the_callers_tensors(heads, kv_heads, monkeypatch, on_gpu):
    """It goes by the layout's name: the slice that the winner is checked on lies as densely as the whole."""
    monkeypatch.setattr(on_gpu, "costs", {"te_fused": FAST})
    tensors, cu = packed(64, heads=heads, kv_heads=kv_heads), ends(30, 33, 1)
    with gpu(monkeypatch, transformer_engine.STUB):
        given = {"layout": "thd", "cu_seqlens_q": cu, "is_causal": True}
        attention(*tensors, **given)
        shown = fastattn.explain(*tensors, **given)
        assert shown.served_by.startswith("te_fused+packed"), [r for r in shown.rows if r.candidate.startswith("te_f")]


def test_sequences_all_alike_that_the_tokens_do_not_fill_keep_their_diagonal(on_gpu):
    """Packed(30, 20): of the last, shorter one the triangle lies as of the whole ones, which no entry point can be told."""
    q, k, v = (x.transpose(0, 1)[None] for x in packed(50, 40))
    mask = masks.Packed(30, 20, "bottom_right")
    found = attention(q, k, v, mask, kernel="flash_attn_2")
    want = attention(q.double(), k.double(), v.double(), mask.dense(1, 50, 40))
    is_close(found, want)


# --- caches

CACHED = "flash_attn_2+cached"


def cache(q_len=1, layout="bhsd", behind=9.0, filled=(40, 7, 25)):
    g = torch.Generator().manual_seed(0)
    shapes = (3, 8, q_len, 64), (3, 2, 48, 64), (3, 2, 48, 64)
    q, k, v = (torch.randn(shape, generator=g).bfloat16() for shape in shapes)
    for x in (k, v):
        for b, n in enumerate(filled):
            x[b, :, n:] = behind
    return tuple(x.transpose(1, 2).contiguous() for x in (q, k, v)) if layout == "bshd" else (q, k, v)


def entry_by_entry(q, k, v, filled, mask=None, window=None):
    """In float64, a call for each batch entry."""
    parts = ((q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n]) for b, n in enumerate(filled))
    return torch.cat([
        attention(*(x.double() for x in part), mask, window=window, kernel="sdpa_math") for part in parts
    ])  # fmt: skip


@pytest.mark.parametrize("q_len, mask, window", [(1, None, None), (4, BR, None), (4, BR, (5, 0)), (1, BR, (5, -1))])
def test_a_cache_is_served_by_the_librarys_own_entry_point_however_it_is_filled(q_len, mask, window, on_gpu, reads):
    for number, filled in enumerate([(40, 7, 25), (41, 8, 26), (48, 1, 33)]):
        q, k, v = cache(q_len, filled=filled)
        reads.clear()
        found = attention(q, k, v, mask, kv_lens=torch.tensor(filled), window=window)
        assert number == 0 or not reads, "a hit waits for nothing"
        is_close(found, entry_by_entry(q, k, v, filled, mask, window))
        if number == 0:
            timed = list(on_gpu.timed)
    assert CACHED in timed and on_gpu.timed == timed, "one verdict for all"
    shown = fastattn.explain(q, k, v, mask, kv_lens=torch.tensor(filled), window=window)
    assert shown.served_by == CACHED and shown.problem.structure.startswith("FilledUnread((12, 34)")


def test_lengths_of_a_cache_that_are_known_take_the_same_way(on_gpu):
    q, k, v = cache(behind=float("nan"))
    found = attention(q, k, v, kv_lens=[40, 7, 25])
    is_close(found, entry_by_entry(q, k, v, (40, 7, 25)))
    assert fastattn.explain(q, k, v, kv_lens=[40, 7, 25]).served_by == CACHED


def test_flash_attention_3_is_refused_where_what_lies_behind_may_be_nan(monkeypatch, on_gpu):
    with gpu(monkeypatch, flash_attn_3.STUB):
        [row] = [r for r in fastattn.explain(*cache(), kv_lens=[40, 7, 25]).rows if r.candidate == "flash_attn_3"]
        assert "it multiplies what lies behind the filled part by zero" in row.reason
        filled = torch.tensor([40, 7, 25])
        is_close(attention(*cache(), kv_lens=filled, kernel="flash_attn_3"), entry_by_entry(*cache(), (40, 7, 25)))


def test_one_length_for_all_may_lie_on_a_gpu_too(on_gpu):
    q, k, v = cache(filled=(20, 20, 20))
    is_close(attention(q, k, v, kv_lens=torch.tensor(20)), entry_by_entry(q, k, v, (20, 20, 20)))
    assert stubs.calls[-1][1]["cache_seqlens"].tolist() == [20, 20, 20]


# --- caches in pages

PAGED = "flash_attn_2+paged"
FILLED = (500, 7, 300)


def in_pages(page=256, layout="bshd", seed=0):
    """(q, pages of k, pages of v, table, k, v): caches of 512 keys in pages that lie about; what no cache has is NaN."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(3, n, h, 64, generator=g).bfloat16() for n, h in ((1, 8), (512, 2), (512, 2)))
    count = 3 * 512 // page
    table = torch.randperm(count + 2, generator=g)[:count].view(3, -1)
    pools = []
    for x in (k, v):
        pool = x.new_full((count + 2, page, 2, 64), float("nan"))
        pool[table.flatten()] = x.reshape(count, page, 2, 64)
        pools.append(pool)
    if layout == "bhsd":
        q, k, v, *pools = (x.transpose(1, 2).contiguous() for x in (q, k, v, *pools))
    return q, *pools, table, k, v


def as_bhsd(*tensors, layout="bshd"):
    return tensors if layout == "bhsd" else tuple(x.transpose(1, 2) for x in tensors)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_pages_stay_where_they_are_and_neither_table_nor_lengths_are_read(layout, on_gpu, reads):
    for number, filled in enumerate([FILLED, (512, 1, 256), (511, 40, 301)]):
        q, *pools, table, k, v = in_pages(layout=layout, seed=number)
        given = {"layout": layout, "kv_lens": torch.tensor(filled), "page_table": table}
        stubs.calls.clear()
        reads.clear()
        hits = fastattn.stats()["hits"]
        found = attention(q, *pools, **given)
        assert number == 0 or (fastattn.stats()["hits"] == hits + 1 and not reads), "a hit waits for nothing"
        want = entry_by_entry(*as_bhsd(q, k, v, layout=layout), filled)
        is_close(*as_bhsd(found, layout=layout), want)
        [name, told] = stubs.calls[-1]
        assert name == "flash_attn_with_kvcache" and told["block_table"].equal(table.int())
        assert number == 0 or told["k_cache"].data_ptr() == pools[0].data_ptr(), "no page is copied"
        same = attention(q, k, v, layout=layout, kv_lens=torch.tensor(filled), kernel="flash_attn_2")
        assert torch.equal(found, same), "bit for bit as from one piece"
        if number == 0:
            timed = list(on_gpu.timed)
    assert PAGED in timed and on_gpu.timed == timed, "one verdict for all"
    shown = fastattn.explain(q, *pools, **given)
    assert shown.served_by == PAGED and shown.problem.structure == "FilledPagesUnread((128, 382), page=256)"
    assert (shown.problem.batch, shown.problem.kv_len) == (3, 512)


def test_pages_that_a_kernel_does_not_take_are_gathered(on_gpu):
    q, *pools, table, k, v = in_pages(page=16)
    given = {"layout": "bshd", "kv_lens": torch.tensor(FILLED), "page_table": table.int()}
    found = attention(q, *pools, **given)
    is_close(*as_bhsd(found), entry_by_entry(*as_bhsd(q, k, v), FILLED))
    assert fastattn.explain(q, *pools, **given).served_by == "flash_attn_2+gathered+cached"
    assert stubs.calls[-1][1]["block_table"] is None
    assert torch.equal(found, attention(q, k, v, layout="bshd", kv_lens=torch.tensor(FILLED), kernel="flash_attn_2"))


@pytest.mark.parametrize("page", [16, 256])
def test_a_table_may_say_anything_behind_what_is_filled(page, on_gpu):
    q, *pools, table, k, v = in_pages(page)
    for row, n in zip(table, FILLED, strict=True):
        row[-(-n // page) :] = torch.tensor([10**6, -(10**6)]).repeat(99)[: len(row) - -(-n // page)]
    for _ in range(2):
        found = attention(q, *pools, layout="bshd", kv_lens=torch.tensor(FILLED), page_table=table)
        is_close(*as_bhsd(found), entry_by_entry(*as_bhsd(q, k, v), FILLED))


AS_A_LIST = [int(n) for n in FILLED]


@pytest.mark.parametrize(
    "mask",
    [None, masks.Prefix(9), masks.Window(8, 8), torch.ones(1, 512, dtype=torch.bool)],
    ids=["alone", "prefix", "window", "dense"],
)
@pytest.mark.parametrize(
    "kv_lens, head_dim",
    [(torch.tensor(FILLED), 64), (torch.tensor(FILLED), 20), (AS_A_LIST, 64)],
    ids=["there", "odd rows", "a list"],
)
def test_nor_is_it_followed_there_where_pages_are_gathered_first(kv_lens, head_dim, mask, on_gpu):
    """Rows that no kernel reads as they lie, lengths in a list, a mask beside them."""
    q, *pools, table, k, v = in_pages(16)
    q, k, v, *pools = (x[..., :head_dim].clone() for x in (q, k, v, *pools))
    for row, n in zip(table, FILLED, strict=True):
        row[-(-n // 16) :] = 10**6
    found = attention(q, *pools, mask, "bshd", kv_lens=kv_lens, page_table=table)
    want = torch.cat([
        attention(q[b : b + 1].double(), k[b : b + 1, :n].double(), v[b : b + 1, :n].double(),
                  mask[:, :n] if isinstance(mask, torch.Tensor) else mask, "bshd", kernel="sdpa_math")
        for b, n in enumerate(FILLED)
    ])  # fmt: skip
    is_close(found, want)


@pytest.mark.parametrize("kernel", ["default", "sdpa_math", "flash_attn_2"])
def test_no_page_is_read_that_the_table_does_not_name(kernel, on_gpu):
    """Whatever lies in page 0, and in the pages of nobody; an entry that is empty reads another one's."""
    q, *pools, table, k, v = in_pages(16)
    for pool in pools:
        pool[1:] = pool[:-1].clone()
        pool[0] = float("nan")
    filled = torch.tensor([500, 0, 300])
    found = attention(q, *pools, layout="bshd", kv_lens=filled, page_table=table + 1, kernel=kernel)
    want = entry_by_entry(*as_bhsd(q, k, v), (500, 1, 300))
    want[1] = 0.0
    is_close(*as_bhsd(found), want)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_table_that_is_not_followed_shows_where_an_entry_has_one_page(batch, monkeypatch, on_gpu):
    real = flash_attn_2.flash_attn_with_kvcache

    @functools.wraps(real)
    def unfollowed(*args, block_table=None, **more):
        block_table = block_table if block_table is None else torch.arange(len(block_table), dtype=torch.int32)[:, None]
        return real(*args, block_table=block_table, **more)

    monkeypatch.setattr(flash_attn_2, "flash_attn_with_kvcache", unfollowed)
    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_with_kvcache", unfollowed)
    q, *pools, table, _, _ = in_pages()
    given = {"layout": "bshd", "kv_lens": torch.tensor([200] * batch), "page_table": table[:batch, :1].contiguous()}
    rows = fastattn.explain(q[:batch], *pools, **given, tune=True).rows
    assert next(row.outcome for row in rows if row.candidate == "flash_attn_2+paged") is Outcome.INACCURATE


@pytest.mark.parametrize("stub", [flash_attn_3.STUB, flash_attn_4.STUB, torch_varlen.STUB], ids=lambda s: s.file)
def test_the_others_serve_pages_by_name(stub, monkeypatch, on_gpu):
    q, *pools, table, k, v = in_pages()
    with gpu(monkeypatch, stub):
        found = attention(
            q, *pools, layout="bshd", kv_lens=torch.tensor(FILLED), page_table=table, kernel=f"{stub.file}+paged"
        )
    is_close(*as_bhsd(found), entry_by_entry(*as_bhsd(q, k, v), FILLED))
    told = stubs.calls[-1][1]
    assert told.get("page_table", told.get("block_table")).equal(table.int())


def test_a_flash_attention_2_that_would_read_the_lengths_is_given_no_table(monkeypatch, on_gpu):
    q, *pools, table, k, v = in_pages()
    with gpu(monkeypatch, replace(flash_attn_2.STUB, version="2.8.4")):
        given = {"layout": "bshd", "kv_lens": torch.tensor(FILLED), "page_table": table, "kernel": "flash_attn_2"}
        stubs.calls.clear()
        is_close(*as_bhsd(attention(q, *pools, **given)), entry_by_entry(*as_bhsd(q, k, v), FILLED))
        assert fastattn.explain(q, *pools, **given).served_by == "flash_attn_2+gathered+cached"
    assert {told["block_table"] for name, told in stubs.calls if name == "flash_attn_with_kvcache"} == {None}


def test_a_flash_attention_3_built_without_pages_gathers_them(monkeypatch, on_gpu):
    q, *pools, table, _, _ = in_pages()
    made = {**flash_attn_3.STUB.modules(), "flash_attn_config": flash_attn_3.config(("PAGEDKV",))}
    with gpu(monkeypatch, replace(flash_attn_3.STUB, modules=lambda: made)):
        given = {"layout": "bshd", "kv_lens": torch.tensor(FILLED), "page_table": table, "kernel": "flash_attn_3"}
        assert fastattn.explain(q, *pools, **given).served_by == "flash_attn_3+gathered+cached"


@pytest.mark.parametrize("change", ["misaligned", "strided"])
def test_pages_that_no_kernel_could_read_as_they_lie_are_gathered(change, on_gpu):
    q, *pools, table, k, v = in_pages()
    room = [torch.empty(*x.shape[:-1], 66, dtype=x.dtype) for x in pools]
    pools = [
        r[..., 2:].copy_(x) if change == "misaligned" else torch.stack((x, x), -1)[..., 0]
        for r, x in zip(room, pools, strict=True)
    ]
    given = {"layout": "bshd", "kv_lens": torch.tensor(FILLED), "page_table": table}
    is_close(*as_bhsd(attention(q, *pools, **given)), entry_by_entry(*as_bhsd(q, k, v), FILLED))
    assert fastattn.explain(q, *pools, **given).problem.page_size == 0


def test_gradients_through_pages_are_right(on_gpu):
    q, *pools, table, k, v = in_pages()
    leaves, want = [[x.requires_grad_() for x in tensors] for tensors in ((q, *pools), (q.clone(), k, v))]
    out = attention(*leaves, layout="bshd", kv_lens=torch.tensor(FILLED), page_table=table)
    exact = entry_by_entry(*as_bhsd(*want), FILLED)
    is_close(*as_bhsd(out), exact)
    dq, *dpools = torch.autograd.grad(out.double().sum(), leaves)
    dq_exact, *dcaches = torch.autograd.grad(exact.sum(), want)
    is_close(dq, dq_exact)
    for pool, cache_ in zip(dpools, dcaches, strict=True):
        is_close(pool[table].flatten(1, 2), cache_)


def test_calls_that_are_passed_on_gather_their_pages(on_gpu):
    q, *pools, table, k, v = in_pages()
    with fastattn.options(mode="off"):
        found = attention(q, *pools, layout="bshd", kv_lens=torch.tensor(FILLED), page_table=table)
    is_close(*as_bhsd(found), entry_by_entry(*as_bhsd(q, k, v), FILLED))


@pytest.mark.parametrize("rows, error", [(2, RuntimeError), (4, RuntimeError)])
def test_a_table_for_another_batch_is_refused(rows, error, on_gpu):
    q, *pools, _, _, _ = in_pages()
    table = torch.zeros(rows, 2, dtype=torch.int32)
    with pytest.raises(error, match="batch sizes differ"):
        attention(q, *pools, layout="bshd", kv_lens=torch.tensor(FILLED), page_table=table)


def test_a_table_of_another_width_is_another_call(on_gpu):
    """A guard must not take one for the other: what was bound looked at their kv_len."""
    q, *pools, table, k, v = in_pages()
    for pages, filled in ((2, FILLED), (1, (200, 7, 256)), (2, FILLED)):
        found = attention(q, *pools, layout="bshd", kv_lens=torch.tensor(filled), page_table=table[:, :pages])
        is_close(*as_bhsd(found), entry_by_entry(*as_bhsd(q, k, v), filled))
    p, r, again = (masks.FilledPagesUnread(9, page=16, table=torch.zeros(1, n)).like(16) for n in (30, 31, 30))
    assert p != r and p == again and repr(p) == repr(r) == "FilledPagesUnread((128, 382), page=16)", (
        "one verdict for both"
    )
    assert repr(masks.parse(repr(p))) == repr(p)


def test_a_tuning_makes_pages_of_its_own():
    """Else the gather that most kernels need would not be in their times."""
    mask = {"structure": "FilledPagesUnread((24, 60), page=16)", "mask": "bool", "mask_shape": "b1qk"}
    p = problem(device="cuda", batch=2, q_heads=8, kv_heads=2, q_len=1, kv_len=60, layout="bshd", **mask)
    sample = plain_sample(p, torch.device("cpu"))
    q, k, v, told = sample.given
    assert (
        q is sample.q and k.shape == (9, 16, 2, 32) and told.table.shape == (2, 4) and told.lengths.tolist() == [24, 60]
    )
    for pool, x in ((k, sample.k), (v, sample.v)):
        assert torch.equal(pool[told.table].flatten(1, 2)[:, :60], x) and not torch.equal(pool.flatten(0, 1)[:60], x[0])


@pytest.mark.parametrize("kv_len", [512, 16384])
def test_a_long_cache_is_checked_where_its_corner_lies(kv_len, on_gpu):
    """The check is of fewer keys than the mask that stands for the problem says are filled."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 64, generator=g).bfloat16() for h, n in ((2, 4), (1, kv_len), (1, kv_len)))
    filled = torch.tensor([kv_len, kv_len // 2])
    shown = fastattn.explain(q, k, v, BR, kv_lens=filled, tune=True)
    [row] = [row for row in shown.rows if row.candidate == CACHED]
    assert shown.served_by == CACHED, row


def test_gradients_of_a_cache_are_by_a_dense_mask(on_gpu):
    q, k, v = (x.requires_grad_() for x in cache())
    found = attention(q, k, v, kv_lens=torch.tensor([40, 7, 25]))
    want = entry_by_entry(q, k, v, (40, 7, 25))
    is_close(found, want)
    got, expected = (torch.autograd.grad(x.double().sum(), (q, k, v)) for x in (found, want))
    for a, b in zip(got, expected, strict=True):
        is_close(a, b)
    [row] = [
        r for r in fastattn.explain(q, k, v, kv_lens=torch.tensor([40, 7, 25])).rows if r.candidate == "flash_attn_2"
    ]
    assert row.reason == "gradients of a cache that is filled to some length are not supported"


@pytest.mark.parametrize("lengths", [torch.tensor([40, 7]), torch.tensor([[40, 7, 25]])], ids=["few", "2d"])
def test_lengths_of_a_cache_of_a_wrong_shape_are_refused(lengths, on_gpu):
    with pytest.raises(ValueError, match="kv_lens must be 3 numbers on cpu, got shape"):
        attention(*cache(), kv_lens=lengths)


@pytest.mark.parametrize("structure", ["", "Document(8)", "Filled((4, 1))"])
def test_rows_of_a_group_are_not_stacked_where_a_kernel_counts_them(structure):
    """A triangle at the last filled key, and where a sequence begins, are told in rows."""
    kernel = made_up("x", None, gqa_fold=True, load_packed=lambda: None, load_cached=lambda: None, devices=("cuda",))
    mask = {"structure": structure, "mask": "bool", "mask_shape": "11qk"} if structure else {}
    p = problem(device="cuda", q_heads=8, kv_heads=2, q_len=1, kv_len=1 if "Document" in structure else 64, **mask)
    assert when_gqa_fold(kernel, p, ordinary_facts(p)) == ("no" if structure else "optional")
