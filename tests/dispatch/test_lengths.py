"""Lengths: the first four of a family exactly, then buckets; decoding in kv buckets from the start."""

from __future__ import annotations

import json
import random

import fakes
import pytest
import torch
from building import CPU
from fakes import check, problem, qkv, quick_wins

import fastattn
from fastattn.dispatch import resolve, tune_now, validity
from fastattn.dispatch.circumstances import Circumstances
from fastattn.dispatch.service import Asked
from fastattn.dispatch.session import session
from fastattn.environment.device import Device
from fastattn.environment.settings import Settings, current_settings, reload_settings
from fastattn.environment.version import __version__
from fastattn.kernels import registry
from fastattn.kernels.libraries.availability import library_tag
from fastattn.kernels.limits import Range, RefuseWhen
from fastattn.planning import candidates
from fastattn.planning.decision import Accepted
from fastattn.problems import call_key, call_options, length_buckets
from fastattn.problems.call_facts import CallFacts
from fastattn.problems.masks import Causal
from fastattn.verdicts import store
from fastattn.verdicts.verdict import Trial, Verdict


@pytest.fixture
def tuned(monkeypatch):
    """Problems that were tuned, in order; the tuning itself is made up and free, and the default wins."""
    problems = []

    def tune(p, settings, *args, **how):
        problems.append(p)
        found = [d for d in candidates.decisions(p, CPU, settings) if isinstance(d, Accepted)]
        trials = [Trial(d.name, time_us=1.0, forward=0.1, library=library_tag(d.kernel)) for d in found]
        verdict = Verdict(p, "default", tuple(trials), made_by=__version__)
        session.keep(verdict, settings, CPU)
        return verdict

    monkeypatch.setattr(tune_now, "tune_and_keep", tune)
    monkeypatch.setattr(store.Store, "put", lambda *args: None)  # in memory alone: so many files would take their time
    monkeypatch.setattr(session, "tuning_s", 0.0)
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
    assert tuned[4].lengths == "all" and tuned[4].q_len == length_buckets.canonical_length(100)


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
    edges = sorted({length_buckets.bucket_bounds(n)[1] for n in range(1, 2100)})
    assert [p.kv_len for p in tuned] == [n if n <= 16 else n - 1 for n in edges]
    assert len(tuned) <= 5 + 2 * 8  # 1 to 16, then two per octave


@pytest.mark.parametrize("kv_lens", [lambda n: None, lambda n: [n, n // 3 + 1]], ids=["alike", "ragged"])
def test_a_decode_loop_of_2000_steps_tunes_a_dozen_problems_and_the_next_process_none(kv_lens, monkeypatch):
    quick_wins(monkeypatch)
    q, k, v = torch.zeros(2, 2, 1, 8), torch.zeros(2, 2, 2600, 8), torch.zeros(2, 2, 2600, 8)

    def loop():
        fastattn.clear()  # what a new process does not know
        fastattn.stats.reset()
        for n in range(512, 2512):
            lengths = kv_lens(n)
            told = {} if lengths is None else {"kv_lens": lengths}
            fastattn.attention(q, k[:, :, :n], v[:, :, :n], **told)
        return fastattn.stats()

    first, second = loop(), loop()
    assert 1 <= first["tunings"] <= 12 and first["misses"] <= 12, "all other calls are hits"
    assert not second["tunings"] and second["misses"] == first["misses"]


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
    low, high = length_buckets.bucket_bounds(length)
    assert low <= length <= high and high % 16 == 0
    assert {length_buckets.canonical_length(n) for n in (low, length, high)} == {high - 1}
    assert length_buckets.bucket_bounds(high + 1)[0] == high + 1
    assert high / low < (1.6 if low > 32 else 2)  # about the square root of 2


@pytest.mark.parametrize("length", [1, 2, 4, 8, 16])
def test_the_smallest_buckets_are_exact(length):
    assert length_buckets.bucket_bounds(length)[1] == length == length_buckets.canonical_length(length)


def test_a_bucket_of_unequal_lengths_is_not_square():
    """On a square problem both causal corners coincide: a verdict there says nothing about the others."""
    p = problem(q_len=500, kv_len=510, causal="bottom_right").bucketed("all")
    assert (p.q_len, p.kv_len) == (510, 511)
    p = problem(q_len=500, kv_len=500, causal="top_left").bucketed("all")
    assert (p.q_len, p.kv_len) == (511, 511)


DRAWS = pytest.mark.parametrize("draws", [2_000, pytest.param(10_000, marks=pytest.mark.long)])


@DRAWS
def test_fault_46_many_random_lengths_tune_a_bounded_number_of_problems(draws, tuned):
    """However many lengths are drawn, the number of problems that are tuned is bounded."""
    random_ = random.Random(0)
    for _ in range(draws):
        call(int(2 ** random_.uniform(0, 13)))
    edges = {length_buckets.bucket_bounds(n)[1] for n in range(1, 2**13 + 1)}
    assert len(tuned) <= 4 + 16 + len(edges)  # four exact, up to 16 rows one each, then one per bucket


@pytest.mark.parametrize("draws, octaves", [(1_000, 5), pytest.param(10_000, 11, marks=pytest.mark.long)])
def test_many_random_pairs_of_lengths_too(draws, octaves, tuned):
    """Few draws are of few octaves, so that they fill the buckets as well."""
    random_ = random.Random(1)

    def call_some(count):
        for _ in range(count):
            call(int(2 ** random_.uniform(0, octaves)), int(2 ** random_.uniform(0, octaves)))

    call_some(draws)
    edges = len({length_buckets.bucket_bounds(n)[1] for n in range(1, 2**octaves + 1)})
    assert len(tuned) <= 4 + 16 * edges + 2 * edges**2
    before = len(tuned)
    call_some(draws // 5)
    assert len(tuned) - before < 0.05 * before + 10  # it comes to an end


def test_real_bucket_mates_share_one_verdict_and_are_right(monkeypatch):
    monkeypatch.setattr(session, "tuning_s", 0.0)
    for kv_len in (300, 301, 350, 360):
        check(*qkv(1, kv_len))
    found = [v.problem for v in session.held(current_settings())]
    assert shapes(found) == [("kv", 1, 1, length_buckets.canonical_length(300))]


# --- one entry, one bucket


@pytest.mark.parametrize("batch, heads, head_dim", [(1, 12, 64), (1, 40, 128), (3, 8, 128), (1, 2, 64)])
def test_all_lengths_of_a_bucket_have_the_same_candidates(batch, heads, head_dim):
    """A winner of the canonical length serves all of its bucket: it must not vanish in the middle."""
    for length in (180, 1100):
        low, high = length_buckets.bucket_bounds(length)
        made = {
            "dtype": "bfloat16",
            "batch": batch,
            "q_heads": heads,
            "kv_heads": heads,
            "head_dim": head_dim,
            "q_len": 1,
        }
        p = [problem(**made, kv_len=n, lengths="kv") for n in (*range(low, high + 1, 16), high)]
        names = [{d.name for d in candidates.decisions(one, CPU, Settings()) if isinstance(d, Accepted)} for one in p]
        assert all(some == names[0] for some in names)


def test_a_fault_in_the_middle_of_a_bucket_is_no_part_of_an_entry(tmp_path, monkeypatch):
    file = tmp_path / "known_faults.json"
    file.write_text(
        json.dumps([{"kernel": "torch_flash", "when": {"kv_len": 1300}, "reason": "wrong", "link": "https://x.org"}])
    )
    monkeypatch.setenv("FASTATTN_KNOWN_FAULTS", str(file))
    reload_settings()
    for length in (1100, 1299):
        q, k, v = qkv(1, length)
        fastattn.attention(q, k, v, kernel="torch_flash")
    q, k, v = qkv(1, 1300)
    with pytest.raises(fastattn.NoKernelError, match="wrong"):
        fastattn.attention(q, k, v, kernel="torch_flash")


@pytest.mark.parametrize(
    "need",
    [RefuseWhen("an odd number of keys", lambda p, _: p.kv_len % 2), Range("scores", max=4 * 40)],
    ids=["in words of its own", "of a field that follows from the length"],
)
def test_a_limit_that_follows_from_the_length_is_asked_at_each_length(need, monkeypatch):
    fakes.add(monkeypatch, fakes.made_up("limited", fakes.honest, needs=(need,)))
    low, high = fastattn.plan(*qkv(1, 40), kernel="limited").kv_lens
    assert (low, high) == (40, 40)
    fastattn.attention(*qkv(1, 40), kernel="limited")
    with pytest.raises(fastattn.NoKernelError, match="limited"):
        fastattn.attention(*qkv(1, 41), kernel="limited")


def test_fault_07_an_entry_ends_where_offsets_would_need_64_bits():
    """A kernel that counts offsets in 32 bits serves no call that needs more, and that holds for torch's default too."""
    h100 = Device("cuda", "made-up H100", 90, cuda="12.8", cudnn=92300)
    heads, row = 80 * 8, 80 * 8 * 128
    shape, stride = torch.Size((80, 8, 25_000, 128)), (8 * 25_000 * 128, 25_000 * 128, 128, 1)
    kv = call_key.TensorSpec(shape, stride, torch.bfloat16, torch.device("cuda", 0), False)
    key = call_key.call_key(
        *(torch.empty(1, 1, 1, 8) for _ in range(3)), None, "bhsd", call_options.parse_options({})
    )._replace(k=kv, v=kv)
    p = problem(device="cuda", dtype="bfloat16", head_dim=128, q_len=1, kv_len=25_000)
    facts = CallFacts(extent=heads * 25_000 * 128 - 1)
    default = next(k for k in registry.rows_for("cuda") if k.name == "default")
    asked = Asked(p, facts, h100, Settings(), Circumstances())
    _, low, high = validity.kv_lens_served([Accepted(default)], asked, key)
    assert low <= 25_000 <= high < length_buckets.bucket_bounds(25_000)[1]
    assert high * row - 1 <= 2**31 - 1 < (high + 2) * row


def test_a_plan_says_which_lengths_it_takes():
    q, k, v = qkv(4, 4)
    assert fastattn.plan(q, k, v, Causal("bottom_right")).kv_lens == (4, 4)  # square, it is drawn as the other corner
    low, high = fastattn.plan(*qkv(1, 100), kernel="torch_flash").kv_lens
    assert (low, high) == length_buckets.bucket_bounds(100)
