"""Lengths: the first four of a family exactly, then buckets; decoding in kv buckets from the start."""

from __future__ import annotations

import random

import pytest
import torch
from fakes import CPU, check, problem, qkv

import fastattn
from fastattn import buckets, candidates, learnt, resolve, store, tuning
from fastattn.kernel import Accepted
from fastattn.verdict import Trial, Verdict


@pytest.fixture
def tuned(monkeypatch):
    """Problems that were tuned, in order; the tuning itself is made up and free, and the default wins."""
    problems = []

    def tune(p, settings, *args, **how):
        problems.append(p)
        found = [d for d in candidates.decisions(p, CPU, settings) if isinstance(d, Accepted)]
        trials = [Trial(d.name, time_us=1.0, forward=0.1, library=tuning.library_of(d)) for d in found]
        verdict = Verdict(p, "default", tuple(trials))
        learnt.keep(verdict, settings, CPU)
        return verdict

    monkeypatch.setattr(resolve, "tune", tune)
    monkeypatch.setattr(store.Store, "put", lambda *args: None)  # in memory alone: so many files would take their time
    monkeypatch.setattr(learnt.state, "spent_s", 0.0)
    return problems


def call(q_len, kv_len=None, batch=1, **options):
    q = torch.empty(batch, 2, q_len, 8)
    k = torch.empty(batch, 2, kv_len or q_len, 8)
    resolve.attention(q, k, k, None, "bhsd", options)


def shapes(problems):
    return [(p.lengths, p.batch, p.q_len, p.kv_len) for p in problems]


def test_the_first_four_lengths_of_a_family_are_tuned_exactly_then_buckets(tuned):
    for n in (100, 200, 300, 400, 500, 600):
        call(n)
    exact = [("exact", 1, n, n) for n in (100, 200, 300, 400)]
    assert shapes(tuned) == [*exact, ("all", 1, 511, 511), ("all", 1, 719, 719)]


def test_a_length_seen_before_stays_as_it_was(tuned):
    for n in (100, 200, 300, 400, 500, 100, 400, 500, 510):
        call(n)
    assert len(tuned) == 5


def test_another_family_starts_anew(tuned):
    for n in (100, 200, 300, 400, 500):
        call(n)
    call(500, is_causal=True)
    assert tuned[-1].lengths == "exact" and tuned[-1].causal


def test_batches_count_as_lengths_and_are_bucketed_in_powers_of_two(tuned):
    for batch in (1, 2, 3, 4, 5, 6, 7, 8, 9):
        call(100, batch=batch)
    assert [p.batch for p in tuned] == [1, 2, 3, 4, 8, 16]
    assert tuned[4].lengths == "all" and tuned[4].q_len == buckets.canonical(100)


@pytest.mark.parametrize("q_len", [1, 2, 3, 15, 16])
def test_up_to_16_rows_are_always_in_kv_buckets(q_len, tuned):
    call(q_len, 1000)
    assert shapes(tuned) == [("kv", 1, q_len, 1023)]
    call(q_len, 1024)
    call(q_len, 725)
    assert len(tuned) == 1


def test_17_rows_are_exact(tuned):
    call(17, 1000)
    assert shapes(tuned) == [("exact", 1, 17, 1000)]


def test_a_growing_cache_is_tuned_once_per_bucket(tuned):
    for kv_len in range(1, 2100):
        call(1, kv_len)
    edges = sorted({buckets.bounds(n)[1] for n in range(1, 2100)})
    assert [p.kv_len for p in tuned] == [n if n <= 16 else n - 1 for n in edges]
    assert len(tuned) <= 5 + 2 * 8  # 1 to 16, then two per octave


def test_decoding_with_ragged_batches_is_bounded(tuned):
    """Continuous batching: every batch size up to 256, and one row or a few (speculation)."""
    for batch in range(1, 257):
        call(1 + batch % 5, 1000, batch=batch)
    assert len(tuned) <= 4 + 4 * 9


def test_a_bucket_is_tuned_at_the_same_problem_whatever_came_first(tuned):
    lengths = [100, 200, 300, 400, *range(700, 730), *range(900, 1100, 7), 1023, 1024, 5000]
    names = []
    for seed in range(5):
        fastattn.clear()
        tuned.clear()
        order = lengths[4:]
        random.Random(seed).shuffle(order)
        for n in [*lengths[:4], *order]:
            call(n)
        names.append({p.digest for p in tuned})
    assert all(n == names[0] for n in names) and len(names[0]) == 4 + 4


@pytest.mark.parametrize("length", [17, 32, 33, 48, 100, 1023, 1024, 1025, 8191, 100_000])
def test_a_bucket_stands_at_its_upper_edge_less_one(length):
    low, high = buckets.bounds(length)
    assert low <= length <= high and high % 16 == 0
    assert {buckets.canonical(n) for n in (low, length, high)} == {high - 1}
    assert buckets.bounds(high + 1)[0] == high + 1
    assert high / low < (1.6 if low > 32 else 2)  # about the square root of 2


@pytest.mark.parametrize("length", [1, 2, 4, 8, 16])
def test_the_smallest_buckets_are_exact(length):
    assert buckets.bounds(length)[1] == length == buckets.canonical(length)


def test_a_bucket_of_unequal_lengths_is_not_square():
    """On a square problem both causal corners coincide: a verdict there says nothing about the others."""
    p = problem(q_len=500, kv_len=510, causal="bottom_right").bucketed("all")
    assert (p.q_len, p.kv_len) == (510, 511)
    p = problem(q_len=500, kv_len=500, causal="top_left").bucketed("all")
    assert (p.q_len, p.kv_len) == (511, 511)


def test_ten_thousand_random_lengths_tune_a_bounded_number_of_problems(tuned):
    random_ = random.Random(0)
    for _ in range(10_000):
        call(int(2 ** random_.uniform(0, 13)))
    edges = {buckets.bounds(n)[1] for n in range(1, 2**13 + 1)}
    assert len(tuned) <= 4 + 16 + len(edges)  # four exact, up to 16 rows one each, then one per bucket


def test_ten_thousand_random_pairs_of_lengths_too(tuned):
    random_ = random.Random(1)
    for _ in range(10_000):
        call(int(2 ** random_.uniform(0, 11)), int(2 ** random_.uniform(0, 11)))
    edges = len({buckets.bounds(n)[1] for n in range(1, 2**11 + 1)})
    assert len(tuned) <= 4 + 16 * edges + 2 * edges**2
    before = len(tuned)
    for _ in range(2_000):
        call(int(2 ** random_.uniform(0, 11)), int(2 ** random_.uniform(0, 11)))
    assert len(tuned) - before < 0.05 * before + 10  # it comes to an end


def test_real_bucket_mates_share_one_verdict_and_are_right(monkeypatch):
    monkeypatch.setattr(learnt.state, "spent_s", 0.0)
    for kv_len in (300, 301, 350, 360):
        check(*qkv(1, kv_len))
    found = [v.problem for v in learnt.verdicts(fastattn.config.current())]
    assert shapes(found) == [("kv", 1, 1, buckets.canonical(300))]
