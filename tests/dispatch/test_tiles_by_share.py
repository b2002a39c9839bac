"""What is found in a dense mask decides each call: tiles where enough of it is hidden, else the kernel that computes all."""

import fakes
import pytest
import torch

import fastattn
from fastattn import attention, masks
from fastattn.verdicts.verdict import MOST_IN_TILES

N = 512
ROW, KEY = torch.arange(N)[:, None], torch.arange(N)
CAUSAL, WINDOW = ROW >= KEY, (ROW - KEY).abs() <= 16
RANDOM = torch.rand(N, N, generator=torch.Generator().manual_seed(0)) < 0.5
# seconds: tiles win by a third on the triangle that is timed, of which 5/8 lie in tiles of 128 rows
COSTS = {"default": 4e-3, "tiler": 4e-3, "tiler+tiles": 3e-3, "tiler+tiles+mask_dense": 3e-3}


@pytest.fixture
def seen(monkeypatch):
    """(rows, keys) of each run of a made-up kernel that wins in tiles."""
    runs = []

    def run(q, k, v, mask, a):
        runs.append((q.shape[2], k.shape[2]))
        return fakes.honest(q, k, v, mask, a)

    fakes.add(monkeypatch, fakes.made_up("tiler", run, tiles=True))
    fakes.turn(monkeypatch, fakes.Clock(COSTS))
    with fastattn.options.scope(kernels="tiler"):
        yield runs


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


def test_the_share_up_to_which_tiles_pay_is_measured(seen):
    q, k, v = fakes.qkv(N)
    verdict = fastattn.explain(q, k, v, CAUSAL, tune=True).verdict
    assert verdict.trial("tiler+tiles").share == 5 / 8
    assert verdict.share_worth_tiles("tiler+tiles", "default") == pytest.approx(4 / 3 * 5 / 8)
    assert verdict.share_worth_tiles("tiler+tiles", "no such kernel") == 0
    faster = verdict.trial("tiler+tiles")._replace(time_us=1.0)
    others = tuple(t for t in verdict.trials if t.candidate != "tiler+tiles")
    assert verdict._replace(trials=(*others, faster)).share_worth_tiles("tiler+tiles", "default") == MOST_IN_TILES


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
        "62% of the scores lie in 4 tiles, 4 of them masked: 320 of 512 keys a query in the mean; tiles serve up to 83%"
    )
    assert f"mask     {found.mask}" in str(found)
    assert fastattn.explain(q, k, v, RANDOM).mask.endswith("tiles serve up to 83%, so default serves this one")
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
