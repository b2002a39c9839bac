"""A KVCache whose keys a kernel keeps in an order of its own: what is kept is what is filled, and it serves where it wins."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading
import time
import weakref

import pytest
import torch
from building import CPU
from fakes import DEFAULT, FAST, SLOW, Clock, problem, turn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from library_grid import installed, row_of
from stubs import calls, vllm_cpu
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from uninstalling import restart

import fastattn
from fastattn import KVCache, attention, masks
from fastattn.environment.settings import Settings
from fastattn.planning import candidates
from fastattn.planning.conversions import kept
from fastattn.problems.layouts import from_bhsd, to_bhsd

KEPT = "vllm_cpu+kept"
CLOSE = {"atol": 2e-6, "rtol": 1e-5}


@pytest.fixture(autouse=True)
def library(monkeypatch):
    with installed(vllm_cpu.STUB, monkeypatch):
        calls.clear()
        yield


@pytest.fixture
def wins(monkeypatch):
    return turn(monkeypatch, Clock({"default": DEFAULT, KEPT: FAST, "vllm_cpu": SLOW}))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def tokens(count, seed=0, batch=1, heads=2):
    return tuple(draw(batch, heads, count, 32, seed=seed + i) for i in range(2))


def filled(count=40, lengths=None, **sizes):
    cache = KVCache(capacity=64)
    cache.append(*tokens(count, **sizes), lengths)
    return cache


def right(cache, q):
    """Each entry's last queries on what it has, in float64."""
    found = []
    for b, n in enumerate(cache.lengths):
        k, v = (to_bhsd(x, cache.layout)[b : b + 1, :, :n].double() for x in (cache.k, cache.v))
        mask = masks.Causal("bottom_right") if q.shape[2] > 1 else None
        found.append(attention(q[b : b + 1].double(), k, v, mask, kernel="sdpa_math"))
    return torch.cat(found)


def is_right(cache, q, **options):
    out = to_bhsd(cache.attend(from_bhsd(q, cache.layout), **options), cache.layout)
    return torch.allclose(out.double(), right(cache, q), **CLOSE)


def written():
    """Tokens of all entries that the library was given to pack."""
    return sum(len(told["key"]) for name, told in calls if name == "cpu_attn_reshape_and_cache")


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.lists(st.integers(0, 9), min_size=3, max_size=3)),
        st.tuples(st.just("append"), st.integers(1, 60).map(lambda n: [n] * 3)),
        st.tuples(st.just("crop"), st.lists(st.integers(12, 60), min_size=3, max_size=3)),
        st.tuples(st.just("reorder"), st.lists(st.integers(0, 2), min_size=3, max_size=3)),
        st.tuples(st.just("attend"), st.integers(1, 4)),
    ),
    min_size=1, max_size=7,
)  # fmt: skip


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, layout=st.sampled_from(["bhsd", "bshd", "sbhd"]), capacity=st.sampled_from([4, 200]))
def test_whatever_is_done_to_the_cache_what_is_kept_follows(steps, layout, capacity):
    cache = KVCache(layout, capacity)
    for at, (what, how) in enumerate([("append", [12] * 3), ("attend", 1), *steps, ("attend", 2)]):
        if what == "append":
            k, v = (from_bhsd(x, layout) for x in tokens(max(how), at, batch=3))
            cache.append(k, v, how)
        elif what == "attend":
            assert is_right(cache, draw(3, 4, how, 32, seed=at), kernel=KEPT)
        else:
            getattr(cache, what)(how)


def test_other_tokens_in_the_place_of_those_that_were_cropped_are_written():
    cache, q = filled(40), draw(1, 4, 1, 32)
    assert is_right(cache, q, kernel=KEPT)
    cache.crop(30)
    cache.append(*tokens(10, 9))
    assert is_right(cache, q, kernel=KEPT)


def test_what_was_written_stays_where_the_cache_grows():
    cache, q = filled(40, batch=2), draw(2, 4, 1, 32)
    assert is_right(cache, q, kernel=KEPT)
    before = written()
    cache.append(*tokens(300, batch=2))
    assert is_right(cache, q, kernel=KEPT) and written() == before + 600


def test_a_run_that_is_timed_writes_a_token_as_decoding_does(wins):
    filled(50).attend(draw(1, 4, 1, 32))
    single = [told for name, told in calls if name == "cpu_attn_reshape_and_cache" and len(told["key"]) == 1]
    assert len(single) >= wins.timed.count(KEPT) > 0


def test_it_serves_where_it_wins_and_a_new_token_is_written_once(wins):
    cache, q = filled(50), draw(1, 4, 1, 32)
    assert is_right(cache, q)
    found = cache.explain(q)
    assert found.served_by == KEPT and found.problem.kept and "in a KVCache" in str(found.problem)
    timed, before = len(wins.timed), written()
    for at in range(10):
        cache.append(*tokens(1, at))
        assert is_right(cache, q)
    assert written() == before + 10 and len(wins.timed) == timed
    fastattn.stats.reset()
    cache.append(*tokens(1))
    cache.attend(q)
    assert fastattn.stats()["hits"] == 1 and fastattn.stats()["served_by"] == {KEPT: 1}


def test_the_next_process_finds_it_stored_and_the_cache_of_another_model_too(wins):
    q = draw(1, 4, 1, 32)
    filled().attend(q)
    timed = len(wins.timed)
    restart()
    other = filled(seed=5)
    assert is_right(other, q) and other.explain(q).served_by == KEPT and len(wins.timed) == timed


def test_where_it_loses_nothing_is_kept(monkeypatch):
    turn(monkeypatch, Clock({"default": FAST, KEPT: SLOW}))
    cache, q = filled(), draw(1, 4, 1, 32)
    assert is_right(cache, q) and cache.explain(q).served_by == "default"
    before = written()
    cache.append(*tokens(1))
    cache.attend(q)
    assert written() == before and not cache._copies._copies


def test_the_tensors_alone_are_another_problem(wins):
    cache, q = filled(), draw(1, 4, 1, 32)
    cache.attend(q)
    assert not fastattn.explain(q, cache.k, cache.v).problem.kept
    before = written()
    assert torch.equal(attention(q, cache.k, cache.v, kernel="default"), cache.attend(q, kernel="default"))
    assert written() == before


def test_prompts_and_drafts_are_served_too(wins):
    cache = filled(20)
    for q_len in (20, 3):  # a prompt, whose triangle is square, and a draft
        q = draw(1, 4, q_len, 32)
        assert is_right(cache, q) and cache.explain(q).served_by == KEPT


def test_entries_that_differ(wins):
    cache, q = filled(40, [40, 7, 23], batch=3), draw(3, 4, 1, 32)
    assert is_right(cache, q) and cache.explain(q).served_by == KEPT
    assert is_right(cache, draw(3, 4, 5, 32))
    before = written()
    cache.append(*tokens(1, batch=3))
    assert is_right(cache, q) and written() == before + 3


@pytest.mark.parametrize("what, lengths, q_len, options", [
    ("an entry without keys", [4, 0, 2], 1, {}),
    ("an entry shorter than the queries", [4, 2, 9], 3, {}),
    ("a window", [9, 9, 9], 1, {"window": (3, 0)}),
    ("a mask", [9, 9, 9], 1, {"mask": masks.Prefix(3)}),
])  # fmt: skip
def test_what_no_kept_cache_goes_with_is_served_as_ever(what, lengths, q_len, options, wins):
    cache, q = filled(9, lengths, batch=3), draw(3, 4, q_len, 32)
    assert not cache.explain(q, **options).problem.kept
    cache.attend(q, **options)
    asks = q.clone().requires_grad_()
    (grad,) = torch.autograd.grad(cache.attend(asks, **options).sum(), asks)
    assert grad.shape == q.shape and not cache._copies._copies


def test_a_training_call_does_without(wins):
    cache, q = filled(), draw(1, 4, 1, 32)
    assert not cache.explain(q.clone().requires_grad_()).problem.kept
    with torch.no_grad():
        assert cache.explain(q.clone().requires_grad_()).problem.kept


@pytest.mark.parametrize("is_kept", [False, True])
def test_in_one_graph_it_is_what_it_was(is_kept, wins):
    """Also where what is kept was made before: the graph does without, and what it changed is written again behind it."""
    cache, q = filled(50, batch=2), draw(2, 4, 1, 32)
    if is_kept:
        assert is_right(cache, q, kernel=KEPT)

    def step(q, k, v):
        cache.append(k, v)
        out = cache.attend(q)
        cache.reorder([1, 0])
        cache.crop(40)
        return out

    torch._dynamo.reset()
    plain, k, v = filled(50, batch=2), *tokens(1, 7, batch=2)
    plain.append(k, v)
    assert torch.allclose(
        torch.compile(step, backend="eager", fullgraph=True)(q, k, v).double(), right(plain, q), **CLOSE
    )
    assert cache.lengths == (40, 40) and is_right(cache, q) and is_right(cache, q, kernel=KEPT)


def test_a_graph_may_take_entries_out(wins):
    cache = filled(50, batch=3)
    assert is_right(cache, draw(3, 4, 1, 32), kernel=KEPT)
    torch._dynamo.reset()
    torch.compile(lambda: cache.reorder([2, 0]), backend="eager", fullgraph=True)()
    assert is_right(cache, draw(2, 4, 1, 32), kernel=KEPT)


def test_under_a_dispatch_mode_it_does_without(wins):
    """A mode's tensors must not be remembered, nor what is kept be a constant of its graph."""
    cache, q = filled(), draw(1, 4, 1, 32)
    cache.attend(q)
    graph = make_fx(lambda q: cache.attend(q))(q)
    assert not any("vllm" in str(node.target) or "_C" in str(node.target) for node in graph.graph.nodes)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(fastattn.NoKernelError):
        cache.attend(q, kernel=KEPT)
    assert is_right(cache, q, kernel=KEPT)


def test_what_is_written_through_its_views_is_seen(wins):
    cache, q = filled(), draw(1, 4, 1, 32)
    assert is_right(cache, q, kernel=KEPT)
    with torch.inference_mode():
        cache.k.mul_(-1.0)
    assert is_right(cache, q, kernel=KEPT)
    cache.v[:, :, 3] = 7.0
    cache.append(*tokens(1))
    assert is_right(cache, q, kernel=KEPT)
    cache.k[:, :, 5] = 2.0
    cache.crop(20)
    assert is_right(cache, q, kernel=KEPT)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_keeps_its_own(duplicate, wins):
    cache, q = filled(40, batch=2), draw(2, 4, 1, 32)
    assert is_right(cache, q, kernel=KEPT)
    other = duplicate(cache)
    other.reorder([1, 1])
    assert is_right(other, q, kernel=KEPT) and is_right(cache, q, kernel=KEPT)
    for each in (cache, other):
        each.append(*tokens(100, batch=2))
    assert is_right(other, q, kernel=KEPT) and is_right(cache, q, kernel=KEPT)


def test_threads_may_attend_to_one_cache(wins):
    caches, q = [filled(40 + n) for n in range(8)], draw(1, 4, 1, 32)
    want, wrong = [right(cache, q) for cache in caches], []
    together = threading.Barrier(3)

    def work():
        together.wait(60)
        for cache, exact in zip(caches, want, strict=True):
            out = cache.attend(q, kernel=KEPT).double()
            wrong.extend([] if torch.allclose(out, exact, **CLOSE) else [cache])

    threads = [threading.Thread(target=work) for _ in range(3)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    finally:
        sys.setswitchinterval(before)
    assert not wrong


def test_one_thread_writes_and_the_others_wait(monkeypatch, wins):
    cache, q = filled(40), draw(1, 4, 1, 32)
    exact, inside, most, wrong = right(cache, q), [], [], []
    keeper, together = kept.availability.load_keeper(row_of(vllm_cpu.STUB, "vllm_cpu")), threading.Barrier(2)

    def write(*given):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.05)  # as long as a prompt takes
        keeper.write(*given)
        inside.pop()

    def work():
        together.wait(60)
        wrong.extend([] if torch.allclose(cache.attend(q, kernel=KEPT).double(), exact, **CLOSE) else [cache])

    with monkeypatch.context() as patch:
        patch.setattr(kept.availability, "load_keeper", lambda _: keeper._replace(write=write))
        threads = [threading.Thread(target=work) for _ in range(2)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert most and max(most) == 1 and not wrong


def test_what_fails_half_way_leaves_nothing_wrong(monkeypatch, wins):
    cache, q = filled(40, [40, 30], batch=2), draw(2, 4, 1, 32)
    library, keeper = kept.availability, kept.availability.load_keeper(row_of(vllm_cpu.STUB, "vllm_cpu"))

    def no_memory(*given):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] not enough memory")

    with monkeypatch.context() as patch:
        patch.setattr(library, "load_keeper", lambda _: keeper._replace(empty=no_memory))
        with pytest.raises(RuntimeError, match="memory"):
            cache.kept_for(row_of(vllm_cpu.STUB, "vllm_cpu"))
    cache.reorder([1, 0])
    assert is_right(cache, q, kernel=KEPT)
    copies = cache._copies._copies

    class Full:
        device = torch.device("cpu")

        def index_select(self, *given):
            no_memory()

    copies["vllm_cpu"] = copies["vllm_cpu"]._replace(kept=(Full(),))
    with pytest.raises(RuntimeError, match="memory"):
        cache.reorder([1, 0])
    assert is_right(cache, q, kernel=KEPT)
    cache.append(*(torch.full_like(x, float("nan")) for x in tokens(3, batch=2)))
    with monkeypatch.context() as patch:
        writes = []

        def interrupted(*given):
            writes.append(keeper.write(*given))
            raise KeyboardInterrupt

        patch.setattr(library, "load_keeper", lambda _: keeper._replace(write=interrupted))
        with pytest.raises(KeyboardInterrupt):
            cache.kept_for(row_of(vllm_cpu.STUB, "vllm_cpu"))
    cache.crop([40, 30])
    assert writes and is_right(cache, q, kernel=KEPT)


def test_room_that_is_not_filled_is_not_touched(wins, monkeypatch):
    """Memory that nobody wrote to holds NaN here: all that is read was written, or is zero."""
    keeper = kept.availability.load_keeper(row_of(vllm_cpu.STUB, "vllm_cpu"))

    def empty(k, v, blocks):
        return tuple(torch.full_like(x, float("nan")) for x in keeper.empty(k, v, blocks))

    cache, q = KVCache(capacity=2048), draw(3, 4, 1, 32)
    cache.append(*tokens(40, batch=3), [40, 7, 23])
    with monkeypatch.context() as patch:
        patch.setattr(kept.availability, "load_keeper", lambda _: keeper._replace(empty=empty))
        for n in (1, 120, 100, 1):
            assert is_right(cache, q, kernel=KEPT)
            cache.append(*tokens(n, batch=3))
            cache.reorder([2, 0, 1])
        (keys, _) = cache.kept_for(row_of(vllm_cpu.STUB, "vllm_cpu"))
    assert keys[:, 4:].isnan().all()


def test_entries_that_differ_are_written_together(wins):
    cache, q = filled(40, [40, 7, 23], batch=3), draw(3, 4, 1, 32)
    cache.attend(q, kernel=KEPT)
    calls.clear()
    cache.append(*tokens(2, batch=3))
    assert is_right(cache, q, kernel=KEPT)
    assert [name for name, _ in calls].count("cpu_attn_reshape_and_cache") == 1


@pytest.mark.parametrize("options", [
    {"dropout_p": 0.0}, {"window": None, "is_causal": False, "sinks": None}, {"mask": masks.Causal("bottom_right")},
    {"scale": 0.3, "softcap": 2.0}, {"accuracy": "dtype"},
])  # fmt: skip
@pytest.mark.parametrize("q_len", [1, 3])
def test_options_that_say_nothing_do_not_hinder(q_len, options, wins):
    cache, q = filled(), draw(1, 4, q_len, 32)
    want = cache.attend(q, kernel="sdpa_math", **options)
    assert torch.allclose(cache.attend(q, kernel=KEPT, **options), want, **CLOSE)


@pytest.mark.parametrize("dtype, d, dv", [(torch.float64, 32, 32), (torch.float32, 20, 20), (torch.float32, 32, 64)])
def test_a_cache_that_no_kernel_could_keep_is_an_ordinary_one(dtype, d, dv, wins):
    cache = KVCache()
    cache.append(draw(1, 2, 9, d).to(dtype), draw(1, 2, 9, dv).to(dtype))
    assert not cache.explain(draw(1, 4, 1, d).to(dtype)).problem.kept


@pytest.mark.parametrize("refused, changes", [
    ("kept keys of head_dim 20, head_dim_v 20, which it would pad in all of them", {"head_dim": 20}),
    ("kept keys of float32 under autocast, which computes in bfloat16", {"cast_from": ("float32",) * 3, "dtype": "bfloat16"}),
    ("kept keys and a mask (Prefix(2))", {"structure": "Prefix(2)"}),
    ("4 queries on fewer filled keys, of which the first see none (Filled((3, 9), 4))",
     {"structure": "Filled((3, 9), 4)", "q_len": 4, "batch": 2}),
    ("kept keys and a mask (Filled((8, 9), 4, 5))", {"structure": "Filled((8, 9), 4, 5)", "q_len": 4, "batch": 2}),
])  # fmt: skip
def test_what_cannot_be_read_as_it_is_kept_is_said(refused, changes):
    """Of masks that it could not draw either; elsewhere it packs the keys in each call."""
    told = {"structure": "Filled((8, 9))", "mask": "bool", "mask_shape": "b1qk", "q_len": 1, "kept": True, "threads": 2}
    p = problem(**{**told, **changes})
    [found] = candidates.decide(row_of(vllm_cpu.STUB, "vllm_cpu"), p, CPU, Settings())
    assert refused in found.reasons
    plain = p.replace(structure="", mask=None, mask_shape="", q_len=4)
    names = [d.name for d in candidates.decide(row_of(vllm_cpu.STUB, "vllm_cpu"), plain, CPU, Settings())]
    assert (KEPT in names) is (changes.keys() <= {"structure", "q_len", "batch"})


def test_a_window_or_another_corner_is_none_of_its(wins):
    row = row_of(vllm_cpu.STUB, "vllm_cpu")
    told = {"q_len": 4, "kept": True, "threads": 2, "window": (5, 0)}
    for changes in ({"causal": "bottom_right"}, {"causal": "top_left", "window": None}):
        p = problem(**{**told, **changes})
        assert KEPT not in [d.name for d in candidates.decide(row, p, CPU, Settings())]
        p = p.replace(causal="bottom_right", window=None)
        assert KEPT in [d.name for d in candidates.decide(row, p, CPU, Settings())]


@pytest.mark.parametrize("mode", ["off", "cached"])
def test_where_nothing_is_learnt_it_is_the_default(mode):
    cache = filled()
    with fastattn.options.scope(mode=mode):
        assert is_right(cache, draw(1, 4, 3, 32)) and is_right(cache, draw(1, 4, 1, 32))
        ragged = filled(9, [9, 4, 6], batch=3)
        assert is_right(ragged, draw(3, 4, 1, 32)) and is_right(ragged, draw(3, 4, 2, 32))
    assert not cache._copies._copies


def test_what_is_remembered_of_a_call_does_not_hold_its_cache(wins):
    cache = filled()
    cache.attend(draw(1, 4, 1, 32))
    held = weakref.ref(cache), weakref.ref(cache._k)
    del cache
    calls.clear()  # of the stub
    gc.collect()
    assert [ref() for ref in held] == [None, None]


def test_what_was_cropped_is_not_multiplied_by(wins):
    """Kernels read a block to its end: what is behind the last key counts 0 times, and 0 times NaN is NaN."""
    cache, q = filled(40), draw(1, 4, 1, 32)
    cache.append(*(torch.full_like(x, float("nan")) for x in tokens(3)))
    cache.attend(q, kernel=KEPT)
    for most in (41, 35):
        cache.crop(40 if most == 41 else most)
        assert is_right(cache, q, kernel=KEPT)


def test_a_cache_outlives_the_mode_that_it_was_made_in(wins):
    q = draw(1, 4, 1, 32)
    with torch.inference_mode():
        cache = filled()
        cache.attend(q, kernel=KEPT)
    cache.append(*tokens(1))
    assert is_right(cache, q, kernel=KEPT)
    with torch.inference_mode():
        cache.reorder([0])
    cache.append(*tokens(1))
    assert is_right(cache, q, kernel=KEPT)
    with torch.inference_mode():
        cache.append(*tokens(80))  # more room
        assert torch.allclose(cache.attend(q, kernel=KEPT).double(), right(cache, q), **CLOSE)


def test_options_say_which_kernels_may(wins):
    cache, q = filled(), draw(1, 4, 1, 32)
    with fastattn.options.scope(kernels="-vllm_cpu"):
        assert is_right(cache, q) and not cache._copies._copies
