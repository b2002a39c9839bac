"""Fault 84 of reference/faults2.md: the forward without gradients and the forward of training, bit by bit."""

from __future__ import annotations

import children
import pytest
import torch
from building import mask_of, qkv
from fakes import FAST, Clock, add, honest, made_up, turn

import fastattn
from fastattn import masks
from fastattn.environment.settings import current_settings, reload_settings
from fastattn.planning.conversions import blocks

SIZES = {
    "plain": {},
    "GQA": {"hkv": 2},
    "narrow v": {"dv": 8},
    "wide v": {"dv": 24, "hkv": 1, "memory": "transposed"},
    "more keys": {"skv": 33},
    "keys by dims": {"memory": ("contiguous", "dims_before_rows", "contiguous")},
    "packed": {"memory": "packed", "sq": 40},
    "one query": {"sq": 1, "skv": 19, "hkv": 2},
}
OPTIONS = {
    "full": {},
    "causal": {"is_causal": True},
    "bottom right": {"mask": masks.Causal("bottom_right")},
    "window": {"window": (3, 0), "is_causal": True},
    "softcap": {"softcap": 5.0},
    "scale": {"scale": 0.3},
}
# who would win without gradients and who in training, where nothing ties them
WINNERS = ("torch_flash", "matmul", "torch_math", "matmul_mixed", "matmul_shifted", "sdpa_math", "default")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(blocks, "CAST_BYTES", 256)


def favour(monkeypatch, name):
    """By the clock a candidate is fast; all others are slow."""
    return turn(monkeypatch, Clock({"default": 4e-3, name: FAST}, other=6e-3))


def both(q, k, v, mask=None, call=fastattn.attention, **options):
    """The outputs of a call under no_grad and of the same call in training."""
    with torch.no_grad():
        without = call(q, k, v, mask, **options)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    trained = call(*leaves, mask, **options)
    trained.sum().backward()
    assert leaves[0].grad is not None
    return without, trained.detach()


@pytest.fixture
def tied():
    with fastattn.options.scope(same_kernel_in_training=True):
        yield


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("winner", WINNERS)
def test_fault_84_the_same_bits_with_and_without_gradients(winner, dtype, count, tied, monkeypatch):
    """With same_kernel_in_training a forward under no_grad is bitwise the forward of training."""
    favour(monkeypatch, winner)
    for i, sizes in enumerate(SIZES):
        if count == 1 and (i + WINNERS.index(winner) + (dtype is torch.float32)) % 2:
            continue  # the other dtype has it
        tensors = qkv(dtype=dtype, **SIZES[sizes])
        for options in [*OPTIONS, *OPTIONS][i % len(OPTIONS) :: 4][:count]:
            for _ in range(2):
                without, trained = both(*tensors, **OPTIONS[options])
                assert torch.equal(without, trained), (sizes, options)


@pytest.mark.parametrize("winner", WINNERS)
def test_fault_84_with_masks_that_learn_or_may(winner, tied, monkeypatch):
    favour(monkeypatch, winner)
    q, k, v = qkv()
    table = torch.randn(4, 19, 19, requires_grad=True)
    for mask in (mask_of("bhqk", torch.bool, 2, 4, 19, 19), mask_of("b11k", torch.float32, 2, 4, 19, 19)):
        assert torch.equal(*both(q, k, v, mask))
    computed = [lambda: table[None], lambda: table.mean(0), lambda: table.detach()[None]]
    for make in computed:  # made from what learns: without gradients it asks for none
        with torch.no_grad():
            without = fastattn.attention(q, k, v, make())
        trained = fastattn.attention(q.clone().requires_grad_(), k, v, make())
        assert torch.equal(without, trained)
    leaf = torch.randn(19, 19, requires_grad=True)
    assert torch.equal(*both(q, k, v, leaf))


def ways():
    yield "no_grad", torch.no_grad
    yield "inference", torch.inference_mode
    yield "detached", torch.enable_grad


@pytest.mark.parametrize("way", dict(ways()))
@pytest.mark.parametrize("first", ["without gradients", "in training"])
def test_fault_84_however_the_gradients_are_away_and_whoever_comes_first(way, first, tied, monkeypatch):
    favour(monkeypatch, "matmul_shifted")
    q, k, v = qkv(dtype=torch.bfloat16, sq=40)

    def without():
        with dict(ways())[way]():
            return fastattn.attention(q.clone(), k.clone(), v.clone())

    def trained():
        return fastattn.attention(*(x.clone().requires_grad_() for x in (q, k, v))).detach()

    order = (without, trained) if first == "without gradients" else (trained, without)
    found = [call() for _ in range(3) for call in order]
    assert all(torch.equal(found[0], other) for other in found)
    assert fastattn.stats()["hits"] or way == "inference"


@pytest.mark.parametrize("change", [{"mode": "cached"}, {"tune_budget": 0.0}, {"kernels": ["-torch_flash"]}], ids=str)
def test_fault_84_where_nothing_is_tuned(change, tied):
    q, k, v = qkv()
    with fastattn.options.scope(**change):
        for mask in (None, mask_of("1hqk", torch.float32, 2, 4, 19, 19), mask_of("b11k", torch.bool, 2, 4, 19, 19)):
            assert torch.equal(*both(q, k, v, mask))
        table = torch.randn(19, 19, requires_grad=True)
        with torch.no_grad():
            without = fastattn.attention(q, k, v, table * 2)
        assert torch.equal(without, fastattn.attention(q, k, v, table * 2))


def test_fault_84_through_the_drop_in_other_layouts_and_autocast(tied, monkeypatch):
    favour(monkeypatch, "matmul")
    q, k, v = qkv()
    assert torch.equal(*both(q, k, v, call=fastattn.sdpa))
    for layout in ("bshd", "sbhd"):
        assert torch.equal(*both(*qkv(layout=layout, hkv=2), layout=layout))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(*both(q, k, v))
        assert torch.equal(*both(q, k, v, call=fastattn.sdpa))
    for name in ("matmul", "torch_flash+fp32", "matmul_mixed"):
        assert torch.equal(*both(*qkv(dtype=torch.bfloat16), kernel=name))


def test_fault_84_an_order_for_what_has_no_gradients_is_still_carried_out(tied):
    q, k, v = qkv(dtype=torch.bfloat16)
    assert fastattn.attention(q, k, v, kernel="matmul_shifted").shape == q.shape
    assert fastattn.explain(q, k, v, kernel="matmul_shifted").served_by == "matmul_shifted"


def test_fault_84_a_callers_own_function_is_still_served(tied):
    q, k, v = qkv()
    out = fastattn.attention(q, k, v, score_mod=lambda score, b, h, i, j: score)
    assert torch.allclose(out, fastattn.attention(q, k, v), atol=1e-4)


def test_fault_84_lengths_that_churn(tied, monkeypatch):
    favour(monkeypatch, "matmul")
    for n in (17, 21, 30, 33, 41, 55, 70, 99):
        assert torch.equal(*both(*qkv(sq=n)))
        assert torch.equal(*both(*qkv(sq=1, skv=n)))


def wrong_by(step):
    """A kernel that is right, and off by one step in the last place: whoever serves can be told by the bits."""
    return lambda *given: honest(*given) * (1 + step)


def test_fault_84_it_is_off_by_default_and_a_scope_ends(monkeypatch):
    add(monkeypatch, made_up("inference_only", wrong_by(2**-22), grad=False), made_up("trained", honest))
    turn(monkeypatch, Clock({"default": 4e-3, "inference_only": FAST, "trained": 2e-3}, other=6e-3))
    q, k, v = qkv()
    assert not torch.equal(*both(q, k, v))
    with fastattn.options.scope(same_kernel_in_training=True) as now:
        assert now.same_kernel_in_training
        assert torch.equal(*both(q, k, v))
        assert fastattn.explain(q, k, v).served_by == "trained"
    assert not torch.equal(*both(q, k, v)) and not current_settings().same_kernel_in_training
    fastattn.options(same_kernel_in_training=True)
    assert torch.equal(*both(q, k, v))
    fastattn.options(same_kernel_in_training=False)
    assert not torch.equal(*both(q, k, v))


def test_fault_84_one_that_raised_serves_neither(monkeypatch, tied):
    broken = []

    def run(*given):
        if broken:
            raise RuntimeError("broken")
        return wrong_by(2**-22)(*given)

    add(monkeypatch, made_up("fragile", run))
    favour(monkeypatch, "fragile")
    q, k, v = qkv()
    assert torch.equal(*both(q, k, v)) and fastattn.explain(q, k, v).served_by == "fragile"
    broken.append(1)
    assert torch.equal(*both(q, k, v)) and fastattn.explain(q, k, v).served_by != "fragile"


def test_fault_84_explain_says_why_the_default_does_not_serve(tied, untuned):
    q, k, v = qkv()
    found = fastattn.explain(q, k, v, torch.randn(19, 19))
    assert found.served_by == "sdpa_math"
    assert found.why == "same_kernel_in_training: the default may run torch_math in training, else torch_flash"


def test_fault_84_the_variable_of_the_environment(monkeypatch):
    for text, want in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("FASTATTN_SAME_KERNEL_IN_TRAINING", text)
        reload_settings()
        assert current_settings().same_kernel_in_training is want
    code = "import fastattn, torch; x = torch.randn(1, 1, 2, 4); fastattn.attention(x, x, x)"
    done = children.run(code, env={"FASTATTN_SAME_KERNEL_IN_TRAINING": "perhaps"})
    assert "FASTATTN_SAME_KERNEL_IN_TRAINING must be one of 0, 1, got 'perhaps'" in done.stderr
