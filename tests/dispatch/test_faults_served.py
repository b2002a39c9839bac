"""Faults 91, 92 and 95: calls that were passed on or missed at every token are served by an entry, as any other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from building import expect
from fakes import FAST, Clock, add, honest, made_up, turn

import fastattn
from fastattn import sdpa
from fastattn.dispatch import passed_on

F_sdpa = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def counted_anew():
    fastattn.stats.reset()


@pytest.fixture
def quick(monkeypatch):
    """A kernel that wins wherever it is timed."""
    add(monkeypatch, made_up("quick", honest))
    return turn(monkeypatch, Clock({"default": 4e-3, "quick": FAST}))


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
    monkeypatch.setattr(passed_on, "f_sdpa_broadcasts", lambda: False)
    sdpa(*one_head())
    assert counted()["passed_on"] == {"different head counts without enable_gqa": 1}


@pytest.mark.parametrize("broken", [True, False])
def test_fault_91_torch_is_asked_once(broken, monkeypatch):
    asked = []

    def stock(*given):
        asked.append(given)
        if broken:
            raise RuntimeError

    monkeypatch.setattr(passed_on, "sdpa", stock)
    passed_on.f_sdpa_broadcasts.cache_clear()
    try:
        assert [passed_on.f_sdpa_broadcasts() for _ in range(2)] == [not broken] * 2 and len(asked) == 1
    finally:
        passed_on.f_sdpa_broadcasts.cache_clear()
