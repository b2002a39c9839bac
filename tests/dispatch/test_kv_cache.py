"""KVCache: what is appended is what attend() sees, and nothing else."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastattn
from fastattn import KVCache, attention, masks
from fastattn.problems.layouts import from_bhsd, to_bhsd

SAME = {"atol": 1e-12, "rtol": 1e-10}


@pytest.fixture(autouse=True)
def untuned():
    with fastattn.options.scope(mode="cached"):
        yield


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


def tokens(count, seed, layout="bhsd", batch=3, heads=2):
    """k and v in a layout, of different head_dims."""
    return tuple(from_bhsd(draw(batch, heads, count, d, seed=seed), layout) for d in (8, 6))


class Plain:
    """The same by lists of tensors, an entry each."""

    def __init__(self, batch=3):
        self.entries = [([], []) for _ in range(batch)]

    def append(self, k, v, lengths):
        for b, (keys, values) in enumerate(self.entries):
            keys.append(k[b, :, : lengths[b]])
            values.append(v[b, :, : lengths[b]])

    def of(self, b):
        return tuple(torch.cat(parts, 1) for parts in self.entries[b])

    def attend(self, q):
        """The last queries of each entry, which see no later keys."""
        outs = []
        for b in range(len(self.entries)):
            k, v = (x[None] for x in self.of(b))
            mask = masks.Causal("bottom_right") if q.shape[2] > 1 else None
            outs.append(attention(q[b : b + 1], k, v, mask, kernel="sdpa_math"))
        return torch.cat(outs)

    def crop(self, lengths):
        self.entries = [tuple([x[:, :n]] for x in self.of(b)) for b, n in enumerate(lengths)]

    def reorder(self, order):
        self.entries = [tuple([x] for x in self.of(b)) for b in order]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.lists(st.integers(0, 9), min_size=3, max_size=3)),
        st.tuples(st.just("alike"), st.integers(1, 9)),
        st.tuples(st.just("crop"), st.lists(st.integers(1, 30), min_size=3, max_size=3)),
        st.tuples(st.just("reorder"), st.lists(st.integers(0, 2), min_size=3, max_size=3)),
    ),
    min_size=1, max_size=6,
)  # fmt: skip


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=STEPS,
    layout=st.sampled_from(["bhsd", "bshd", "sbhd"]),
    capacity=st.sampled_from([1, 4, 100]),
    q_len=st.integers(1, 3),
)
def test_whatever_is_done_to_it_it_holds_what_a_list_would(steps, layout, capacity, q_len):
    cache, plain = KVCache(layout, capacity), Plain()
    steps = [("alike", 4), *steps]
    for at, (what, how) in enumerate(steps):
        if what == "alike":
            k, v = tokens(how, at)
            cache.append(from_bhsd(k, layout), from_bhsd(v, layout))
            plain.append(k, v, [how] * 3)
        elif what == "append":
            k, v = tokens(9, at)
            cache.append(from_bhsd(k, layout), from_bhsd(v, layout), torch.tensor(how))
            plain.append(k, v, how)
        elif what == "crop":
            cache.crop(how)
            plain.crop(how)
        else:
            cache.reorder(torch.tensor(how))
            plain.reorder(how)
    lengths = tuple(plain.of(b)[0].shape[1] for b in range(3))
    assert cache.lengths == lengths and len(cache) == max(lengths)
    for b, n in enumerate(lengths):
        for own, want in zip((cache.k, cache.v), plain.of(b), strict=True):
            assert torch.equal(to_bhsd(own, layout)[b, :, :n], want)
    if min(lengths) >= q_len:
        q = draw(3, 4, q_len, 8, seed=7)
        found = to_bhsd(cache.attend(from_bhsd(q, layout)), layout)
        assert torch.allclose(found, plain.attend(q), **SAME)


def test_a_decode_loop_copies_its_tokens_alone_and_hits():
    cache = KVCache("bshd", capacity=64)
    cache.append(*tokens(20, 0, "bshd"))
    store = cache.k.untyped_storage().data_ptr()
    for at in range(40):
        cache.append(*tokens(1, at, "bshd"))
        cache.attend(draw(3, 1, 4, 8, seed=at))
    assert cache.k.untyped_storage().data_ptr() == store and len(cache) == 60
    assert cache.k.shape == (3, 60, 2, 8) and cache.v.shape == (3, 60, 2, 6)
    fastattn.stats.reset()
    cache.append(*tokens(1, 9, "bshd"))
    cache.attend(draw(3, 1, 4, 8))
    assert fastattn.stats()["hits"] == 1
    cache.append(*tokens(9, 0, "bshd"))  # no more room: it doubles
    assert "70 of 128 tokens" in repr(cache)
    cache.reset()
    assert len(cache) == 0 and cache.lengths == (0, 0, 0)
    cache.append(*tokens(3, 1, "bshd"))
    assert torch.equal(cache.k, tokens(3, 1, "bshd")[0])


def test_what_was_never_filled_is_never_seen():
    cache = KVCache(capacity=32)
    k, v = tokens(5, 0)
    cache.append(k, v, [5, 1, 3])
    for store in (cache._k, cache._v):
        for b, n in enumerate((5, 1, 3)):
            store[b, :, n:] = float("nan")
    plain = Plain()
    plain.append(k, v, [5, 1, 3])
    q = draw(3, 4, 1, 8)
    assert torch.allclose(cache.attend(q), plain.attend(q), **SAME)


def test_options_and_masks_reach_attention():
    cache = KVCache()
    k, v = tokens(12, 0)
    cache.append(k, v)
    q = draw(3, 4, 2, 8)
    for mask, options in (
        (masks.Causal("bottom_right") & masks.Window(3, 0), {}),
        (None, {"softcap": 2.0, "return_lse": True}),
    ):
        got = cache.attend(q, mask, **options)
        want = attention(q, k, v, mask or masks.Causal("bottom_right"), **options)
        for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, want)), strict=True):
            assert torch.equal(a, b)


def test_what_does_not_go_with_it_is_refused_in_words():
    k, v = tokens(4, 0)
    with pytest.raises(ValueError, match="layout must be one of 'bhsd', 'bshd', 'sbhd', got 'thd'"):
        KVCache("thd")
    with pytest.raises(ValueError, match="capacity must be at least 1 token, got 0"):
        KVCache(capacity=0)
    cache = KVCache()
    for ask in (lambda: cache.attend(draw(3, 4, 1, 8)), lambda: cache.k):
        with pytest.raises(RuntimeError, match="nothing is filled yet"):
            ask()
    assert repr(cache) == "KVCache('bhsd', empty)"
    cache.append(k, v, [4, 2, 0])
    assert "0 to 4 of 256 tokens" in repr(cache)
    before = cache.lengths
    for refused, words in (
        (lambda: cache.append(k[0], v[0]), "must have four dimensions, got 3 and 3"),
        (lambda: cache.append(k, v[:, :, :3]), "must be alike but for head_dim"),
        (lambda: cache.append(k.float(), v.float()), r"k has \(batch, kv_heads, head_dim, dtype, device\) .*float32"),
        (lambda: cache.append(k[:2], v[:2]), r"k has .*\(2, 2, 8"),
        (lambda: cache.append(k, v, [1, 2]), r"lengths must be 3 numbers from 0 to 4, got \[1, 2\]"),
        (lambda: cache.append(k, v, [1, 2, -1]), r"KVCache.append\(\): lengths must be whole numbers >= 0"),
        (lambda: cache.attend(draw(3, 4, 1, 8), kv_lens=[1, 1, 1]), "kv_lens is the cache's own to say"),
        (lambda: cache.append(k, v, [1, 2, 5]), r"lengths must be 3 numbers from 0 to 4, got \[1, 2, 5\]"),
        (lambda: cache.append(k.requires_grad_(), v), "for inference"),
        (lambda: cache.crop([1, 2]), r"lengths must be 3 numbers from 0 on"),
        (lambda: cache.crop(-1), r"lengths must be 3 numbers from 0 on"),
        (lambda: cache.reorder([3]), r"entries must be from 0 to 2, got \[3\]"),
    ):
        with pytest.raises(ValueError, match=words):
            refused()
    assert cache.lengths == before
    with torch.no_grad():
        cache.append(k, v)
