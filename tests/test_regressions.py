"""Faults that a review found and that no other test would have seen."""

from __future__ import annotations

import math
import threading

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn import api, attention, config, learnt, race, resolve, tuning
from fastattn.errors import NoKernelError


def half(std: float = 16.0) -> tuple[torch.Tensor, ...]:
    """bf16 q, k, v whose scores have that standard deviation: products rounded to bf16 cannot hold them."""
    q, k, v = (torch.randn(1, 2, 96, 64) for _ in range(3))
    return tuple(x.bfloat16() for x in (q * std, k, v))


@pytest.mark.parametrize("kernel", ["sdpa_math", "matmul+fp32", "matmul_mixed"])
def test_autocast_does_not_reach_the_products_of_a_kernel_whose_inputs_are_already_half(kernel):
    q, k, v = half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = attention(q, k, v, kernel=kernel)
    assert torch.equal(inside, attention(q, k, v, kernel=kernel))


def test_options_take_effect_after_a_scope_that_changed_nothing():
    q = torch.randn(1, 2, 20, 16)
    attention(q, q, q)
    with fastattn.options(mode=config.current().mode):
        pass
    fastattn.options(mode="off")
    assert api.front.first is None and not api.front.table


def test_garbage_in_the_first_call_does_not_decide_for_good(monkeypatch):
    q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))
    v[0, 0, -1] = math.nan
    attention(q, k, v)
    verdict = fastattn.explain(q, k, v).verdict
    assert verdict is not None
    assert not any("caller's tensors" in (t.reason or "") for t in verdict.trials)
    assert not any("changes its inputs" in (t.reason or "") for t in verdict.trials)


def test_the_callers_own_error_is_not_answered_by_a_cast(monkeypatch):
    q, k, v = (torch.randn(1, 2, 24, 16) for _ in range(3))
    monkeypatch.setattr(race, "HOPELESS", math.inf)
    monkeypatch.setattr(tuning, "_pick", lambda entrants, _: next(e for e in entrants if e.candidate.name == "matmul"))
    call = fastattn.plan(q, k, v)
    assert call.candidate == "matmul"
    with pytest.raises(RuntimeError):
        call(q, k.half(), v)  # F.sdpa refuses mixed dtypes too
    verdict = fastattn.explain(q, k, v).verdict
    assert verdict is not None and verdict.trial("matmul").tombstone is None


def test_masked_and_unmasked_calls_in_turn_are_hits(monkeypatch):
    q, k, v = (torch.randn(1, 2, 24, 16) for _ in range(3))
    mask = torch.zeros(24, 24)
    for given in (None, mask, None, mask):
        attention(q, k, v, given)
    monkeypatch.setattr(resolve, "attention", lambda *_: pytest.fail("a miss"))
    for given in (None, mask) * 10:
        attention(q, k, v, given)


def test_a_causal_bias_of_torch_leaves_no_dead_entries():
    from torch.nn.attention.bias import causal_lower_right

    q, k = torch.randn(1, 2, 8, 16), torch.randn(1, 2, 24, 16)
    for _ in range(5):
        out = attention(q, k, k, causal_lower_right(8, 24))
    assert not api.front.table
    assert torch.allclose(out, F.scaled_dot_product_attention(q, k, k, causal_lower_right(8, 24)), atol=1e-5)


def test_what_was_resolved_before_a_clear_is_not_published_after_it(monkeypatch):
    q = torch.randn(1, 2, 24, 16)
    real = resolve.attention

    def slow(*args):
        served = real(*args)
        learnt.forget_calls()
        return served

    monkeypatch.setattr(resolve, "attention", slow)
    attention(q, q, q)
    assert not api.front.table and api.front.first is None


def test_a_tuning_that_fails_does_not_reach_the_caller(monkeypatch, caplog):
    q = torch.randn(1, 2, 24, 16)

    def broken(*_, **__):
        raise RuntimeError("no memory for the reference")

    monkeypatch.setattr(tuning, "tune", broken)
    for _ in range(3):
        assert torch.equal(attention(q, q, q), F.scaled_dot_product_attention(q, q, q))
    assert sum("tuning failed" in record.message for record in caplog.records) == 1


def test_a_stored_plain_winner_is_not_served_with_another_conversion():
    q, k = torch.randn(2, 8, 1, 32), torch.randn(2, 2, 40, 32)
    assert fastattn.plan(q, k, k, kernel="torch_math").candidate == "torch_math"
    with pytest.raises(NoKernelError):
        attention(q, k, k, kernel="torch_math+fp32")


def test_an_order_is_not_dropped_under_dynamic_shapes():
    torch._dynamo.reset()
    run = torch.compile(lambda x: attention(x, x, x, kernel="matmul"), backend="eager", dynamic=True, fullgraph=True)
    with pytest.raises(Exception, match="static sizes"):
        run(torch.randn(1, 2, 24, 16))


def test_threads_that_read_no_verdict_just_before_one_was_found_do_not_tune_again(monkeypatch):
    q = torch.randn(1, 2, 26, 16)
    count, real = [], resolve.tune
    monkeypatch.setattr(resolve, "tune", lambda *a, **k: (count.append(1), real(*a, **k))[1])
    threads = [threading.Thread(target=attention, args=(q, q, q)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(count) == 1


