"""Faults 91, 92 and 95: calls that were passed on or missed at every token are served by an entry, as any other."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from building import expect
from fakes import quick_wins
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from fastattn import sdpa
from fastattn.dispatch import drop_in, four_dims, guard, resolve
from fastattn.dispatch.sdpa import entries
from fastattn.problems import length_buckets, masks

F_sdpa = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def counted_anew():
    fastattn.stats.reset()


@pytest.fixture
def quick(monkeypatch):
    return quick_wins(monkeypatch)


def counted():
    return fastattn.stats()


# --- fault 91: one head of keys and values that is broadcast, without enable_gqa


def one_head(batch=2, heads=6, q_len=5, kv_len=9, d=16, dtype=torch.float32, grad=False):
    q, k, v = (torch.randn(batch, h, n, d).to(dtype) for h, n in ((heads, q_len), (1, kv_len), (1, kv_len)))
    return [x.requires_grad_(grad) for x in (q, k, v)]


BROADCAST = {
    "Falcon's prefill": (one_head(q_len=9), {"is_causal": True}),
    "Falcon's decoding": (one_head(q_len=1, kv_len=65), {}),
    "timm's attention pool": (one_head(batch=1, q_len=1, kv_len=50, heads=12), {"dropout_p": 0.0}),
    "a bool mask": (one_head(), {"attn_mask": torch.rand(2, 1, 5, 9) < 0.7}),
    "a bias per head": (one_head(), {"attn_mask": torch.randn(1, 6, 5, 9)}),
    "bfloat16, a scale": (one_head(dtype=torch.bfloat16), {"scale": 0.3}),
    "training": (one_head(grad=True), {}),
}


@pytest.mark.parametrize("name", BROADCAST)
def test_fault_91_one_head_of_keys_that_is_broadcast_is_served(name, quick):
    """One head of keys and values that F.sdpa broadcasts, without enable_gqa, is tuned and served as MQA."""
    (q, k, v), options = BROADCAST[name]
    want = expect(q, k, v, options.get("attn_mask"), scale=options.get("scale"),
                  corners=("top_left",) if options.get("is_causal") else ())  # fmt: skip
    for _ in range(3):
        out = sdpa(q, k, v, **options)
        assert want.forward(out) <= 1.0
    found = counted()
    assert found["served_by"] == {"quick": 3} and found["hits"] == 2 and not found["passed_on"]
    if q.requires_grad:
        assert want.backward(*torch.autograd.grad(out, (q, k, v), want.grad)) <= 1.0


@pytest.mark.parametrize("name", BROADCAST)
def test_fault_91_untuned_it_is_the_very_call_that_was_made(name):
    """F.sdpa with enable_gqa may take another kernel, and other bits with it."""
    (q, k, v), options = BROADCAST[name]
    with fastattn.options.scope(mode="cached"):
        for _ in range(3):
            assert torch.equal(sdpa(q, k, v, **options), F_sdpa(q, k, v, **options))
        assert counted()["hits"] == 2


def test_fault_91_patched_models_are_served(quick):
    q, k, v = one_head()
    with fastattn.patch():
        for _ in range(3):
            F.scaled_dot_product_attention(q, k, v)
    assert counted()["served_by"] == {"quick": 3}


def test_fault_91_it_shares_a_verdict_with_enable_gqa(quick):
    q, k, v = one_head()
    sdpa(q, k, v)
    sdpa(q, k, v, enable_gqa=True)
    fastattn.attention(q, k, v)
    assert counted()["tunings"] == 1


def test_fault_91_expanded_keys_are_served(quick):
    q, k, v = one_head()
    k, v = k.expand(2, 6, 9, 16), v.expand(2, 6, 9, 16)
    want = expect(q, k, v)
    for _ in range(3):
        assert want.forward(sdpa(q, k, v)) <= 1.0
    assert counted()["served_by"] == {"quick": 3}


def test_fault_91_a_decode_that_grows_is_served_by_its_bucket(quick):
    for n in range(100, 110):
        q, k, v = one_head(q_len=1, kv_len=n)
        sdpa(q, k, v)
    assert counted()["hits"] == 9


@pytest.mark.parametrize("mode", ["auto", "cached"])
def test_fault_91_in_a_graph_it_is_right(mode, quick):
    q, k, v = one_head()
    sdpa(q, k, v)
    with fastattn.options.scope(mode=mode):
        compiled = torch.compile(lambda q, k, v: sdpa(q, k, v), backend="eager", fullgraph=True)
        assert expect(q, k, v).forward(compiled(q, k, v)) <= 1.0


REFUSED = {
    "two heads for six": lambda: (torch.randn(2, 6, 5, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)),
    "keys of one head, values of four": lambda: (torch.randn(2, 6, 5, 16), torch.randn(2, 1, 9, 16), torch.randn(2, 4, 9, 16)),
    "one head, another batch": lambda: (torch.randn(2, 6, 5, 16), torch.randn(3, 1, 9, 16), torch.randn(3, 1, 9, 16)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_fault_91_what_f_sdpa_refuses_is_refused(name, quick):
    q, k, v = REFUSED[name]()
    with pytest.raises(RuntimeError):
        F_sdpa(q, k, v)
    with pytest.raises(RuntimeError):
        sdpa(q, k, v)


def test_fault_91_a_torch_that_broadcasts_no_head_says_so_itself(quick, monkeypatch):
    monkeypatch.setattr(four_dims, "f_sdpa_broadcasts", lambda: False)
    sdpa(*one_head())
    assert counted()["passed_on"] == {"different head counts without enable_gqa": 1}


@pytest.mark.parametrize("broken", [True, False])
def test_fault_91_torch_is_asked_once(broken, monkeypatch):
    asked = []

    def stock(*given):
        asked.append(given)
        if broken:
            raise RuntimeError

    monkeypatch.setattr(four_dims, "stock_sdpa", stock)
    monkeypatch.setattr(four_dims, "_answers", {})
    assert [four_dims.f_sdpa_broadcasts() for _ in range(2)] == [not broken] * 2 and len(asked) == 1


# --- fault 95: calls that are passed on

r = torch.randn


def four(*lengths):
    return [r(1, 2, n, 8) for n in (lengths or (4, 4, 4))]


PASSED_ON = {
    # what is asked: (a maker of q, k, v for a length, options for it, why)
    "keys for every batch entry": (
        lambda n: [r(2, 3, n, 8), r(3, n, 8), r(3, n, 8)], lambda n: {"is_causal": True}, four_dims.OTHER_DIMS.why
    ),
    "5-D, a 5-D mask": (
        lambda n: [r(1, 1, 2, n, 8) for _ in range(3)], lambda n: {"attn_mask": r(1, 1, 1, n, n)}, four_dims.OTHER_DIMS.why
    ),
    "a tensor as is_causal": (lambda n: four(n, n, n), lambda n: {"is_causal": 1}, "is_causal or enable_gqa is no bool"),
}  # fmt: skip


def takes(call, *given, **options):
    try:
        call(*given, **options)
    except (RuntimeError, TypeError):
        return False
    return True


PASSED_ON = {name: row for name, row in PASSED_ON.items() if takes(F_sdpa, *row[0](4), **row[1](4))}


@pytest.fixture
def no_miss(monkeypatch):
    """From the moment it is called, a miss fails the test."""
    return lambda: monkeypatch.setattr(drop_in, "drop_in", lambda *_: pytest.fail("a miss"))


@pytest.mark.parametrize("name", PASSED_ON)
def test_fault_95_a_call_that_is_passed_on_has_an_entry(name, no_miss):
    """A call that F.sdpa answers as it was made is found by a guard the next time, whatever its lengths are, and is counted."""
    make, options, why = PASSED_ON[name]
    for n in (6, 9):  # entries are found by the bytes of q
        sdpa(*make(n), **options(n))
    no_miss()
    for n in (6, 9, 6):
        given, keywords = make(n), options(n)
        assert torch.equal(sdpa(*given, **keywords), F_sdpa(*given, **keywords))
    found = counted()
    assert found["passed_on"] == {why: 5} and found["hits"] == found["misses"] == 0 and found["calls"] == 5


def test_fault_95_a_growing_cache_that_is_passed_on_is_one_entry(no_miss):
    q = r(2, 2, 1, 8)
    for n in range(20, 60):
        k = r(2, n, 8)
        assert torch.equal(sdpa(q, k, k.clone()), F_sdpa(q, k, k))
        if n == 20:
            no_miss()
    assert len(entries.table) == 1


@pytest.mark.parametrize("name", PASSED_ON)
def test_fault_95_what_may_be_served_is_no_hit_of_it(name, quick):
    make, options, why = PASSED_ON[name]
    sdpa(*make(4), **options(4))
    for _ in range(2):
        sdpa(*four())
    assert counted()["passed_on"] == {why: 1} and counted()["served_by"] == {"quick": 2}


@pytest.mark.parametrize("switch", ["mode off", "sdpa_kernel", "an empty tensor"])
def test_fault_95_circumstances_that_a_guard_sees_pass_on_by_an_entry(switch, quick, no_miss, monkeypatch):
    context = {
        "mode off": lambda: fastattn.options.scope(mode="off"),
        "sdpa_kernel": lambda: sdpa_kernel(SDPBackend.MATH),
        "an empty tensor": contextlib.nullcontext,
    }[switch]
    q, k, v = four(4, 0, 0) if switch == "an empty tensor" else four()
    real = drop_in.drop_in
    with context():
        sdpa(q, k, v)
        no_miss()
        assert torch.equal(sdpa(q, k, v), F_sdpa(q, k, v))
        assert sum(counted()["passed_on"].values()) == 2
    monkeypatch.setattr(drop_in, "drop_in", real)
    q, k, v = four()
    for _ in range(2):
        sdpa(q, k, v)
    assert counted()["served_by"] == {"quick": 2}, "it does not outlive its reason"


@pytest.mark.parametrize("switch", ["mode off", "sdpa_kernel"])
def test_fault_95_so_has_attention(switch, monkeypatch):
    q, k, v = four()
    with fastattn.options.scope(mode="off") if switch == "mode off" else sdpa_kernel(SDPBackend.MATH):
        want = fastattn.attention(q, k, v, masks.Causal("bottom_right"))
        monkeypatch.setattr(resolve, "attention", lambda *_: pytest.fail("a miss"))
        assert torch.equal(fastattn.attention(q, k, v, masks.Causal("bottom_right")), want)
        q, k, v = four(4, 9, 9)  # its corner moves with the lengths
        drawn = torch.ones(4, 9, dtype=torch.bool).tril(5)
        assert torch.allclose(
            fastattn.attention(q, k, v, masks.Causal("bottom_right")), F_sdpa(q, k, v, drawn), atol=1e-6
        )


def test_fault_95_a_scale_that_may_be_changed_in_place_is_read_anew(untuned):
    q, k, v = (r(2, 4, 8) for _ in range(3))
    scale = torch.tensor(0.5)
    if not takes(F_sdpa, q, k, v, scale=scale):
        pytest.skip("this torch takes no tensor as a scale")
    for value in (0.5, 3.0):
        scale.fill_(value)
        assert torch.equal(sdpa(q, k, v, scale=scale), F_sdpa(q, k, v, scale=value))


@pytest.mark.parametrize("bad", [(2, 4, 9), (3, 4, 8)], ids=["head_dim", "batch"])
def test_fault_95_an_entry_for_every_size_lets_f_sdpa_say_what_is_wrong(bad):
    q, k, v = (r(2, 4, 8) for _ in range(3))
    sdpa(q, k, v)
    with pytest.raises(RuntimeError):
        sdpa(q, r(*bad), v)


@pytest.mark.parametrize("change", ["requires_grad", "dtype", "inference"])
def test_fault_95_other_tensors_are_right_too(change, untuned):
    q, k, v = (r(2, 4, 8) for _ in range(3))
    sdpa(q, k, v)
    with torch.inference_mode(change == "inference"):
        q, k, v = (x.double() if change == "dtype" else x.clone() for x in (q, k, v))
        if change == "requires_grad":
            q.requires_grad_()
        out = sdpa(q, k, v)
        assert torch.equal(out, F_sdpa(q, k, v)) and out.requires_grad == q.requires_grad


def test_fault_95_the_plain_guard_can_do_it_too(monkeypatch, no_miss):
    monkeypatch.setattr(guard, "NATIVE", False)
    q = r(2, 2, 4, 8)
    sdpa(q, r(2, 5, 8), r(2, 5, 8))
    sdpa(*four())
    no_miss()
    sdpa(q, r(2, 7, 8), r(2, 7, 8))
    assert counted()["passed_on"] == {four_dims.OTHER_DIMS.why: 2}


# --- fault 92: a dense mask while decoding

STEPS = range(100, 121)  # one bucket


def padded(batch, n, room=0):
    """A padding mask (b, 1, 1, n) as generate() makes it for left-padded prompts; room: a slice of a longer one."""
    seen = torch.arange(n + room)[None] >= torch.arange(batch)[:, None] * 7
    return seen[:, None, None, :n]


MASKS = {
    # the mask of a decode with batch 2, 4 heads and n keys; how many queries
    "padding, bool": (lambda n: padded(2, n), 1),
    "padding, added": (lambda n: torch.zeros(2, 1, 1, n).masked_fill(~padded(2, n), float("-inf")), 1),
    "a slice of a static cache's": (lambda n: padded(2, n, room=300 - n), 1),
    "for every head": (lambda n: padded(2, n).expand(2, 4, 1, n).contiguous(), 1),
    "expanded over heads": (lambda n: padded(2, n).expand(2, 4, 1, n), 1),
    "ALiBi": (lambda n: -torch.arange(n).flip(0).float() * torch.tensor([0.5, 0.25, 0.125, 0.0625])[None, :, None, None], 1),
    "2-D": (lambda n: torch.rand(1, n) < 0.9, 1),
    "speculation, four queries": (lambda n: padded(2, n) & torch.ones(4, n, dtype=torch.bool).tril(n - 4), 4),
    "one column for all keys": (lambda n: torch.zeros(2, 4, 1, 1), 1),
}  # fmt: skip


def step(n, q_len=1, heads=2):
    return r(2, 4, q_len, 16), r(2, heads, n, 16), r(2, heads, n, 16)


@pytest.fixture(params=[True, False], ids=["native", "plain"])
def either_guard(request, monkeypatch):
    monkeypatch.setattr(guard, "NATIVE", request.param and guard.NATIVE)


@pytest.mark.parametrize("door", ["attention", "sdpa"])
@pytest.mark.parametrize("name", MASKS)
def test_fault_92_a_decode_with_a_dense_mask_is_served_by_its_bucket(name, door, quick, either_guard):
    """While a decode's cache and its dense mask grow together, one entry serves each length of the bucket."""
    mask_for, q_len = MASKS[name]
    for n in STEPS:
        (q, k, v), mask = step(n, q_len), mask_for(n)
        out = fastattn.attention(q, k, v, mask) if door == "attention" else sdpa(q, k, v, mask, enable_gqa=True)
        assert expect(q, k, v, mask).forward(out) <= 1.0, n
    found = counted()
    assert (found["misses"], found["hits"], found["tunings"]) == (1, len(STEPS) - 1, 1)


def test_fault_92_the_default_too():
    with fastattn.options.scope(mode="cached"):
        for n in STEPS:
            (q, k, v), mask = step(n, heads=4), padded(2, n)
            assert torch.equal(sdpa(q, k, v, mask), F_sdpa(q, k, v, mask))
    assert counted()["misses"] == 1


def test_fault_92_the_next_bucket_is_a_miss(quick):
    low = length_buckets.bucket_bounds(100)[0]
    for n in range(low - 3, low + 3):
        fastattn.attention(*step(n), padded(2, n))
    assert (counted()["misses"], counted()["tunings"]) == (2, 2)


@pytest.mark.parametrize("other", [
    lambda n: padded(2, n + 1), lambda n: padded(2, n)[..., :1], lambda n: padded(1, n),
    lambda n: padded(2, n).expand(2, 4, 1, n),
    lambda n: padded(2, n).float(), lambda n: torch.rand(n, 2).T[:, None, None] < 0.9, lambda n: None,
], ids=["longer", "one key", "one batch", "expanded", "float", "transposed", "none"])  # fmt: skip
def test_fault_92_another_mask_is_not_taken_for_it(other, quick, either_guard):
    fastattn.attention(*step(100), padded(2, 100))
    (q, k, v), mask = step(105), other(105)
    if mask is not None and mask.shape[-1] == 106:
        with pytest.raises(RuntimeError, match="does not broadcast"):
            fastattn.attention(q, k, v, mask)
    else:
        assert expect(q, k, v, mask).forward(fastattn.attention(q, k, v, mask)) <= 1.0


def test_fault_92_a_plan_with_a_mask_says_which_lengths_it_takes(quick):
    planned = fastattn.plan(*step(100), padded(2, 100))
    assert planned.kv_lens == length_buckets.bucket_bounds(100)
    (q, k, v), mask = step(110), padded(2, 110)
    assert expect(q, k, v, mask).forward(planned(q, k, v, mask)) <= 1.0


def test_fault_92_a_mask_that_does_not_grow_with_the_keys_is_checked(quick, either_guard):
    """The same tensor for cache and mask, or a mask for other keys, must not pass for one that grows."""
    x = r(2, 2, 100, 100)
    q = r(2, 2, 1, 100)
    for _ in range(2):
        assert expect(q, x, x.clone(), x[:, :, :1]).forward(fastattn.attention(q, x, x.clone(), x[:, :, :1])) <= 1.0
