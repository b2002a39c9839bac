"""What is found in a dense mask decides each call: tiles where enough of it is hidden, else the kernel that computes all."""

from functools import partial

import fakes
import pytest
import torch
from building import expect, hold
from torch.nn.functional import scaled_dot_product_attention as sdpa

import fastattn
from fastattn import attention, masks
from fastattn.dispatch import entries, resolve, validity
from fastattn.dispatch.circumstances import Circumstances
from fastattn.environment.settings import current_settings
from fastattn.kernels.limits import Range
from fastattn.planning import candidates
from fastattn.planning.decision import Accepted
from fastattn.problems.call_key import call_key
from fastattn.problems.call_options import parse_options
from fastattn.problems.tilings.tile import Tiling
from fastattn.problems.tilings.worth import MOST_IN_TILES, worth_of
from fastattn.verdicts.verdict import Trial, Verdict

N = 512
ROW, KEY = torch.arange(N)[:, None], torch.arange(N)
CAUSAL, WINDOW = ROW >= KEY, (ROW - KEY).abs() <= 16
DOCUMENTS = CAUSAL & (ROW // 64 == KEY // 64)
RANDOM = torch.rand(N, N, generator=torch.Generator().manual_seed(0)) < 0.5
# seconds: tiles win by a third on the triangle that is timed, of which 5/8 lie in tiles of 128 rows
COSTS = {"default": 4e-3, "tiler": 4e-3, "tiler+tiles": 3e-3, "tiler+tiles+mask_dense": 3e-3}


@pytest.fixture
def turn(monkeypatch):
    """turn(costs): (rows, keys) of each run of a made-up kernel that takes tiles, timed by a clock with these costs."""
    runs = []

    def run(q, k, v, mask, a):
        runs.append((q.shape[2], k.shape[2]))
        return fakes.honest(q, k, v, mask, a)

    def turn(costs):
        fakes.turn(monkeypatch, fakes.Clock(costs))
        return runs

    fakes.add(monkeypatch, fakes.made_up("tiler", run, tiles=True))
    with fastattn.options.scope(kernels="tiler"):
        yield turn


@pytest.fixture
def seen(turn):
    """The same of one that wins in tiles."""
    return turn(COSTS)


def runs_of(seen, call):
    call()
    seen.clear()
    call()
    return list(seen)


def test_each_call_looks_at_its_mask(seen):
    q, k, v = fakes.qkv(N)
    mask = CAUSAL.clone()
    explained = fastattn.explain(q, k, v, mask, tune=True)
    assert explained.served_by == "tiler+tiles"
    assert runs_of(seen, lambda: attention(q, k, v, mask)) == [(128, 128), (128, 256), (128, 384), (128, 512)]
    assert runs_of(seen, lambda: attention(q, k, v, RANDOM)) == [], (
        "the default, which is as fast as the kernel without tiles"
    )
    mask.copy_(WINDOW)
    assert runs_of(seen, lambda: attention(q, k, v, mask)) == [(128, 144), (128, 160), (128, 160), (128, 144)]
    mask.fill_(True)
    assert runs_of(seen, lambda: attention(q, k, v, mask)) == []
    for given in (CAUSAL, RANDOM, WINDOW, mask):
        fakes.check(q, k, v, given)


def test_stats_tell_who_served_each_call(seen):
    q, k, v = fakes.qkv(N)
    explained = fastattn.explain(q, k, v, CAUSAL, tune=True)
    attention(q, k, v, CAUSAL)  # a miss
    fastattn.stats.reset()
    masks_of_calls = [CAUSAL] * 3 + [RANDOM] * 5 + [WINDOW]
    for mask in masks_of_calls:
        attention(q, k, v, mask)
    found = fastattn.stats()
    assert found["served_by"] == {"tiler+tiles": 4, "default": 5} and found["hits"] == len(masks_of_calls)
    assert found["saved_s"] == pytest.approx(4 * explained.verdict.saves_us("tiler+tiles") / 1e6)
    entries.drop_all()
    assert fastattn.stats()["served_by"] == found["served_by"], "dropped entries keep their counts"


def test_a_first_call_that_its_mask_decides_is_counted_for_who_served_it(seen):
    q, k, v = fakes.qkv(N)
    fastattn.explain(q, k, v, CAUSAL, tune=True)
    fastattn.stats.reset()
    attention(q, k, v, RANDOM)
    found = fastattn.stats()
    assert found["served_by"] == {"default": 1} and found["saved_s"] == 0.0


def test_when_tiles_are_worth_it_is_measured(seen):
    q, k, v = fakes.qkv(N)
    verdict = fastattn.explain(q, k, v, CAUSAL, tune=True).verdict
    tiles, default = verdict.trial("tiler+tiles"), verdict.trial("default")
    assert (tiles.share, tiles.masked_share) == (5 / 8, 5 / 8)
    worth = verdict.worth_of_tiles(tiles, default)
    assert worth == pytest.approx((3 / 4 / (5 / 8), 1.0, 3 / 4 / (5 / 8), 1.0, MOST_IN_TILES))
    assert verdict.worth_of_tiles(tiles, default._replace(time_us=None)) is None
    assert verdict.worth_of_tiles(tiles._replace(time_us=1.0), default).allows(MOST_IN_TILES, MOST_IN_TILES)


@pytest.mark.parametrize(
    ("share", "masked", "cost", "rates"),
    [
        (0.5, 0.0, 0.75, (1.5, 1.5, 1.5)),
        (0.5, 0.25, 0.75, (1.5, 1.0, 2.0)),
        (0.5, 0.25, 0.25, (0.5, 0.5, 0.5)),
        (0.5, 0.5, 0.6, (1.2, 1.0, 1.2)),
    ],
    ids=[
        "no tile has a mask",
        "half of the pairs in masked tiles",
        "cheaper than all pairs are",
        "each tile has a mask",
    ],
)
def test_what_tiles_cost_beyond_their_share_is_put_down_to_their_masks(share, masked, cost, rates):
    worth = worth_of(share, masked, cost)
    assert worth[:3] == pytest.approx(rates)
    assert worth.cost(Tiling((), share, masked, True)) == pytest.approx(cost), "it cost that much"
    padded, cut = Tiling((), 0.6, 0.0, True), Tiling((), 0.6, 0.6, True)
    assert worth.cost(padded) == pytest.approx(0.6 * rates[1]), "no tile has a mask"
    assert worth.cost(cut) == pytest.approx(0.6 * rates[0]), "each has one: no more than in proportion"


PADDED = (torch.arange(N) < torch.linspace(N / 8, N, 16)[:, None])[:, None, None, :]


def test_padding_is_served_in_tiles_where_only_masked_ones_are_dear(turn):
    """The mask that is timed has a triangle as well, which costs what it saves; tiles of padding alone have no mask."""
    seen = turn(with_tiles_at(29e-3))
    q, k, v = (torch.randn(16, 4, N, 8) for _ in range(3))
    mask = PADDED.expand(16, 1, N, N).clone()
    assert fastattn.explain(q, k, v, mask, tune=True).served_by == "tiler+tiles"
    assert len(runs_of(seen, lambda: attention(q, k, v, mask))) == 16
    fakes.check(q, k, v, mask)


def test_a_kernel_that_is_ordered_in_tiles_runs_in_tiles(seen):
    q, k, v = fakes.qkv(N)
    call = lambda: attention(q, k, v, RANDOM, kernel="tiler+tiles")  # noqa: E731
    assert runs_of(seen, call) == [(128, 512)] * 4


@pytest.mark.parametrize("told", [{"window": (16, 16)}, {"mask": masks.Window(16, 16)}], ids=str)
def test_a_window_that_is_told_by_options_is_tiled_without_a_look(seen, told):
    q, k, v = fakes.qkv(N)
    assert fastattn.explain(q, k, v, **told, tune=True).served_by == "tiler+tiles+mask_dense"
    runs = runs_of(seen, lambda: attention(q, k, v, **told))
    assert runs == [(128, 144), (128, 160), (128, 160), (128, 144)]
    fakes.check(q, k, v, **told)


def test_gradients_take_the_tiles_of_their_forward(seen):
    q, k, v = fakes.qkv(N, grad=True)
    mask = WINDOW.clone()
    out = attention(q, k, v, mask)
    seen.clear()
    out = attention(q, k, v, mask)
    assert len(seen) == 4
    mask.fill_(False)
    found = torch.autograd.grad(out.square().sum(), (q, k, v))
    want = torch.autograd.grad(attention(q, k, v, WINDOW).square().sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_explain_says_what_was_found_in_the_mask(seen):
    q, k, v = fakes.qkv(N)
    fastattn.explain(q, k, v, CAUSAL, tune=True)
    found = fastattn.explain(q, k, v, CAUSAL)
    assert found.mask == (
        "62% of the scores lie in 4 tiles, 4 of them masked: 320 of 512 keys a query in the mean;"
        " in tiles about 75% of the time of default"
    )
    assert f"mask     {found.mask}" in str(found)
    assert fastattn.explain(q, k, v, RANDOM).mask.endswith("tiles serve up to 90%, so default serves this one")
    told = fastattn.explain(q, k, v, masks.Document(128)).mask
    assert told == "25% of the scores lie in 4 tiles, 0 of them masked: 128 of 512 keys a query in the mean"
    assert fastattn.explain(q, k, v, window=(16, 16)).mask.startswith("30% of the scores lie in 4 tiles")
    assert fastattn.explain(q, k, v).mask == ""


@pytest.mark.parametrize("hidden", [False, float("-inf")], ids=["bool", "float"])
def test_a_mask_that_hides_nothing_is_none(hidden, seen, monkeypatch):
    """One pair that is hidden, or added to, in a row that the first look leaves out, makes it a mask again."""
    given = []

    def run(q, k, v, mask, a):
        given.append(mask)
        return fakes.honest(q, k, v, mask, a)

    fakes.replace_default(monkeypatch, run)
    q, k, v = fakes.qkv(N)
    mask = CAUSAL.clone() if hidden is False else torch.zeros(N, N).masked_fill(~CAUSAL, hidden)
    assert fastattn.explain(q, k, v, mask, tune=True).served_by.startswith("tiler+tiles")
    everything = True if hidden is False else 0.0
    for value in (everything, hidden, everything, hidden if hidden is False else 1e-3):
        mask.fill_(everything)
        mask[301, 7] = value
        attention(q, k, v, mask)
        assert (given[-1] is None) is (value is everything)
        fakes.check(q, k, v, mask)
    mask.fill_(everything)
    attention(q, k, v, mask.expand(1, 4, N, N))
    assert given[-1] is None


def with_tiles_at(cost, default=30e-3):
    return {"default": default, "tiler": 40e-3, "tiler+tiles": cost, "tiler+tiles+mask_dense": cost}


def test_where_tiles_lost_a_mask_that_hides_more_than_the_one_that_was_timed_is_served_in_tiles(turn):
    seen, (q, k, v) = turn(with_tiles_at(33e-3)), fakes.qkv(N)
    mask = CAUSAL.clone()
    assert fastattn.explain(q, k, v, mask, tune=True).served_by == "default"
    assert runs_of(seen, lambda: attention(q, k, v, mask)) == []
    mask.copy_(WINDOW)
    assert runs_of(seen, lambda: attention(q, k, v, mask)) == [(128, 144), (128, 160), (128, 160), (128, 144)]
    mask.copy_(RANDOM)
    assert runs_of(seen, lambda: attention(q, k, v, mask)) == []
    for given in (CAUSAL, RANDOM, WINDOW):
        fakes.check(q, k, v, given)
    seen.clear()
    with fastattn.patch():
        torch.nn.functional.scaled_dot_product_attention(q, k, v, WINDOW)
    assert len(seen) == 4


def test_a_told_mask_is_served_without_tiles_where_they_are_not_worth_it(turn):
    """A verdict is of all paddings: one of them may leave too much."""
    seen, (q, k, v) = turn(with_tiles_at(9e-3)), fakes.qkv(N)
    assert fastattn.explain(q, k, v, masks.Padding([420]), tune=True).served_by == "tiler+tiles+mask_dense"
    for tokens, want in ((420, [(N, 420)]), (478, [])):
        mask = masks.Padding([tokens])
        assert fastattn.explain(q, k, v, mask).verdict is not None, "another kind of problem"
        assert runs_of(seen, lambda: attention(q, k, v, mask)) == want  # noqa: B023
        torch.testing.assert_close(attention(q, k, v, mask), sdpa(q, k, v, (tokens > KEY).expand(N, N)))


def test_explain_says_that_tiles_serve_though_they_lost(turn):
    turn(with_tiles_at(33e-3))
    q, k, v = fakes.qkv(N)
    found = fastattn.explain(q, k, v, WINDOW, tune=True).mask
    assert found.endswith("; in tiles about 52% of the time of default, so tiler+tiles serves this one")
    assert fastattn.explain(q, k, v, CAUSAL).mask.endswith("keys a query in the mean; tiles serve up to 61%")


def test_gradients_are_those_of_the_tiles_that_lost(turn):
    seen, (q, k, v) = turn(with_tiles_at(33e-3)), fakes.qkv(N, grad=True)
    assert fastattn.explain(q, k, v, WINDOW, tune=True).served_by == "default"
    assert len(runs_of(seen, lambda: attention(q, k, v, WINDOW))) == 4
    found = torch.autograd.grad(attention(q, k, v, WINDOW).square().sum(), (q, k, v))
    want = torch.autograd.grad(sdpa(q, k, v, WINDOW).square().sum(), (q, k, v))
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b)


FEW = (KEY < 32).expand(N, N).clone()  # of all pairs 6% lie in tiles


@pytest.mark.parametrize(
    ("costs", "mask"),
    [(with_tiles_at(90e-3), FEW), (with_tiles_at(3.3e-3, 3e-3), FEW), (with_tiles_at(31e-3), CAUSAL)],
    ids=["a share too small for a look", "a look dearer than what it saves", "the mask that was timed"],
)
def test_masks_are_not_looked_at_where_tiles_are_hardly_ever_worth_it(costs, mask, turn):
    """By share, tiles at three times the default's time win up to 20% of all pairs."""
    seen, (q, k, v) = turn(costs), fakes.qkv(N)
    assert fastattn.explain(q, k, v, mask, tune=True).served_by == "default"
    assert runs_of(seen, lambda: attention(q, k, v, mask)) == []


def test_the_times_of_a_crowded_machine_say_nothing_of_shares(turn, monkeypatch):
    seen, (q, k, v) = turn(with_tiles_at(31e-3)), fakes.qkv(N)
    monkeypatch.setattr("fastattn.verdicts.verdict.CROWDED", -1.0)
    assert fastattn.explain(q, k, v, FEW, tune=True).served_by == "default"
    assert runs_of(seen, lambda: attention(q, k, v, FEW)) == []


def test_tiles_that_lost_are_served_for_a_gain_that_their_times_are_sure_of():
    worth = partial(Verdict.worth_of_tiles, is_to_gain=True)
    plain = Trial("default", time_us=1e5, noise=0.0)
    tiles = Trial("t+tiles", time_us=1e5, noise=0.0, share=0.6, masked_share=0.6)
    assert worth(tiles, plain) == pytest.approx((1 / 0.6, 1.0, 1 / 0.6, 1 / 1.03, 0.6 / 1.03))
    assert worth(tiles._replace(time_us=7e4), plain).most_share == pytest.approx(0.6 / 1.03), (
        "not with the mask it lost on"
    )
    assert worth(tiles._replace(noise=0.2), plain).most == pytest.approx(1 / 1.4)
    assert worth(tiles, plain._replace(noise=None)).most == pytest.approx(1 / 1.25), "fewer than three rounds"


def test_of_the_two_the_one_that_raises_is_out(turn, monkeypatch):
    """Tiles that lost, and a winner that computes all pairs: whichever it is, the other one goes on."""
    q, k, v = fakes.qkv(N)
    broken = []

    def quick(q, k, v, mask, a):
        if "quick" in broken:
            raise RuntimeError("quick: launch failed")
        return fakes.honest(q, k, v, mask, a)

    fakes.add(monkeypatch, fakes.made_up("quick", quick))
    with fastattn.options.scope(kernels="tiler,quick"):
        seen = turn(with_tiles_at(33e-3) | {"quick": 20e-3})
        assert fastattn.explain(q, k, v, RANDOM, tune=True).served_by == "quick"
        attention(q, k, v, RANDOM)
        broken.append("quick")
        torch.testing.assert_close(attention(q, k, v, RANDOM), sdpa(q, k, v, RANDOM))
        verdict = fastattn.explain(q, k, v, RANDOM).verdict
        assert [verdict.trial(name).is_timed for name in ("quick", "tiler+tiles")] == [False, True]
        assert len(runs_of(seen, lambda: attention(q, k, v, WINDOW))) == 4


def test_tiles_that_raise_are_out_and_the_default_answers(turn, monkeypatch):
    seen, (q, k, v) = turn(with_tiles_at(33e-3)), fakes.qkv(N)
    found = fastattn.explain(q, k, v, WINDOW, tune=True)
    attention(q, k, v, WINDOW)

    def broken(*_):
        raise RuntimeError("tiler: launch failed")

    monkeypatch.setattr(fakes, "honest", broken)
    torch.testing.assert_close(attention(q, k, v, WINDOW), sdpa(q, k, v, WINDOW))
    after = fastattn.explain(q, k, v, WINDOW).verdict
    assert found.verdict.trial("tiler+tiles").is_timed
    assert not after.trial("tiler+tiles").is_timed
    assert runs_of(seen, lambda: attention(q, k, v, WINDOW)) == []
    assert after.winner == "default"


def test_a_miss_decides_one_other_kernel_at_most(turn, monkeypatch):
    """Each one costs a tenth of a millisecond, and a library may be imported for it."""
    turn(with_tiles_at(33e-3))
    q, k, v = fakes.qkv(N)
    fastattn.explain(q, k, v, CAUSAL, tune=True)
    asked = []
    real = candidates.decide
    monkeypatch.setattr(
        candidates, "decide", lambda kernel, *a, **b: asked.append(kernel.name) or real(kernel, *a, **b)
    )
    attention(q, k, v, CAUSAL)
    assert asked.count("tiler") == 1
    assert set(asked) <= {"default", "tiler", "sdpa_math"}


def test_a_decode_is_served_at_lengths_that_both_take(monkeypatch):
    plain = fakes.made_up("plain", fakes.honest)
    tiler = fakes.made_up("tiler", fakes.honest, tiles=True, needs=(Range("kv_len", min=1200),))
    fakes.add(monkeypatch, plain, tiler)
    q, k, v = torch.randn(1, 4, 1, 16), *torch.randn(2, 1, 4, 1300, 16)
    key = call_key(q, k, v, None, "bhsd", parse_options({}))
    with fastattn.options.scope(kernels="plain,tiler"):
        asked = resolve.asked_of(key, current_settings(), Circumstances())
        assert validity.kv_lens_served([Accepted(plain)], asked, key) == (2, 1025, 1456)
        assert validity.kv_lens_served([Accepted(tiler, ("tiles",)), Accepted(plain)], asked, key) is None


@pytest.mark.parametrize("mask", [DOCUMENTS, masks.Causal() & masks.Document(64)], ids=["found", "told"])
def test_what_was_found_before_a_cast_holds_after_it(mask, monkeypatch):
    """In training half precision is cast before it is cut into tiles, and whether tiles pay is decided before that."""
    dtypes, names = set(), ("wide+fp32+tiles", "wide+fp32+tiles+mask_dense")

    def run(q, k, v, mask, a):
        dtypes.update(x.dtype for x in (q, k, v, mask) if x is not None)
        return fakes.honest(q, k, v, mask, a)

    fakes.add(monkeypatch, fakes.made_up("wide", run, tiles=True, fp32=True, dtypes=("float32",)))
    fakes.turn(monkeypatch, fakes.Clock({"default": 4e-3} | dict.fromkeys(names, 1e-3)))
    q, k, v = fakes.qkv(N, dtype=torch.bfloat16, grad=True)
    with fastattn.options.scope(kernels="wide"):
        assert fastattn.explain(q, k, v, mask, tune=True).served_by in names
        dtypes.clear()
        hold(expect(q, k, v, DOCUMENTS), lambda *x: attention(*x[:3], mask), q, k, v, DOCUMENTS)
    assert dtypes - {torch.bool} == {torch.float32}
