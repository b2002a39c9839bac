"""stats(): every call is counted once, as a hit, a miss or a call that was passed on, and by who answered."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fakes import DEFAULT, FAST, Clock, add, honest, made_up, qkv, turn

import fastattn
from fastattn import attention
from fastattn.dispatch import entries as table
from fastattn.dispatch.attention import entries
from fastattn.dispatch.four_dims import OTHER_DIMS

F_sdpa = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    fastattn.stats.reset()
    return turn(monkeypatch, Clock({"default": DEFAULT, "matmul": FAST}))


def test_hits_misses_tunings_and_who_answered():
    for _ in range(5):
        attention(*qkv(20))
    with fastattn.patch():
        for _ in range(3):
            F.scaled_dot_product_attention(*qkv(20))
    found = fastattn.stats()
    assert (found["calls"], found["hits"], found["misses"], found["tunings"]) == (8, 6, 2, 1)
    assert found["served_by"] == {"matmul": 8}
    assert found["tuning_s"] >= 0 and not found["passed_on"] and not found["untuned"]


def test_what_was_passed_on_and_why():
    with fastattn.options.scope(mode="off"):
        attention(*qkv(20))
    with fastattn.patch():
        for _ in range(2):
            q, k, v = qkv(20)
            F.scaled_dot_product_attention(q, k[0], v[0])  # each batch entry with the same keys
    found = fastattn.stats()
    assert found["passed_on"] == {"mode is off": 1, OTHER_DIMS.why: 2}
    assert found["calls"] == 3 and found["hits"] == found["misses"] == 0


def test_what_was_served_untuned_and_who_was_demoted(monkeypatch):
    with fastattn.options.scope(mode="cached"):
        attention(*qkv(20))
    assert list(fastattn.stats()["untuned"].values()) == [1]

    def fragile(q, k, v, mask, a):
        if q[0, 0, 0, 0] == 7:
            raise RuntimeError("broken")
        return honest(q, k, v, mask, a)

    add(monkeypatch, made_up("fragile", fragile))
    turn(monkeypatch, Clock({"default": DEFAULT, "fragile": FAST}))
    q, k, v = qkv(24)
    attention(q, k, v)
    q[0, 0, 0, 0] = 7
    attention(q, k, v)
    [(what, raised)] = fastattn.stats()["demoted"].items()
    assert what.startswith("fragile for 1 x ") and raised == "RuntimeError: broken"


def test_hits_are_not_lost_when_entries_are_dropped(monkeypatch):
    monkeypatch.setattr(table, "LIMIT", 2)
    monkeypatch.setattr(table, "SAME_BYTES", 1)
    with fastattn.options.scope(mode="cached"):
        for n in (16, 17, 18, 19):
            for _ in range(3):
                attention(*qkv(n))
        attention(*qkv(16, heads=2, head_dim=64))  # the bytes of another one
        fastattn.clear()
        attention(*qkv(16))
    assert fastattn.stats()["hits"] == 8


def test_what_was_saved_by_the_tunings_own_times(clock):
    """Three hits of a problem whose default takes 4 ms and whose winner 1 ms; the default's own hits save nothing."""
    for _ in range(4):
        attention(*qkv(20))
    assert fastattn.stats()["saved_s"] == pytest.approx(3 * (DEFAULT - FAST))
    assert "saved     about 9 ms, by the times of the tunings (an estimate)" in repr(fastattn.stats())
    clock.costs["matmul"] = 2 * DEFAULT
    for _ in range(4):
        attention(*qkv(24))
    assert fastattn.stats()["served_by"]["default"] == 4
    fastattn.clear()
    assert fastattn.stats()["saved_s"] == pytest.approx(3 * (DEFAULT - FAST)), "what is dropped is counted"
    fastattn.stats.reset()
    assert fastattn.stats()["saved_s"] == 0 and "saved" not in repr(fastattn.stats())


def test_times_of_other_lengths_say_nothing_of_what_was_saved():
    """A decode's verdict is of its bucket's canonical length."""
    q, _, _ = qkv(1)
    for n in range(100, 104):
        k = qkv(n)[1]
        attention(q, k, k.clone())
    assert fastattn.stats()["served_by"] == {"matmul": 4} and fastattn.stats()["saved_s"] == 0


def test_reset_starts_anew():
    attention(*qkv(20))
    attention(*qkv(20))
    fastattn.stats.reset()
    assert fastattn.stats()["calls"] == 0
    attention(*qkv(20))
    assert fastattn.stats()["hits"] == fastattn.stats()["calls"] == 1


def test_it_is_a_dict_that_prints_as_a_few_lines():
    attention(*qkv(20))
    found = fastattn.stats()
    assert isinstance(found, dict) and "1 calls: 0 hits, 1 misses, 0 passed on; 1 tunings" in repr(found)
    assert "served by         1  matmul" in repr(found)


# --- nothing raises after the answer is there


def test_a_guard_that_cannot_be_built_costs_a_miss_not_the_answer(monkeypatch):
    def broken(*_):
        raise RuntimeError("no guard")

    q, k, v = qkv(20)
    monkeypatch.setattr(table, "build_guard", broken)
    assert torch.allclose(attention(q, k, v), F_sdpa(q, k, v), atol=1e-5)
    assert torch.allclose(fastattn.sdpa(q, k, v), F_sdpa(q, k, v), atol=1e-5)
    assert not entries.table
