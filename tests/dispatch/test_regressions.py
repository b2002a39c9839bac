"""Faults that a review found and that no other test would have seen."""

from __future__ import annotations

import math
import threading

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from fakes import Clock, turn

import fastattn
from fastattn import attention
from fastattn.dispatch import resolve, tune_now
from fastattn.dispatch.attention import entries
from fastattn.dispatch.entries import drop_all
from fastattn.dispatch.session import session
from fastattn.environment.errors import NoKernelError
from fastattn.environment.settings import current_settings
from fastattn.problems import call_options, masks
from fastattn.problems.spelling import command_line
from fastattn.tuning import choose, screening
from fastattn.verdicts.verdict import Outcome


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
    with fastattn.options(mode=current_settings().mode):
        pass
    fastattn.options(mode="off")
    assert entries.first is entries._ask_table and not entries.table


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
    monkeypatch.setattr(screening, "TOO_SLOW", math.inf)
    monkeypatch.setattr("fastattn.verdicts.verdict.NOISY", math.inf)
    monkeypatch.setattr(choose, "pick", lambda entrants, _: next(e for e in entrants if e.candidate.name == "matmul"))
    call = fastattn.plan(q, k, v)
    assert call.candidate == "matmul"
    with pytest.raises(RuntimeError):
        call(q, k.half(), v)  # F.sdpa refuses mixed dtypes too
    verdict = fastattn.explain(q, k, v).verdict
    assert verdict is not None and verdict.trial("matmul").outcome is not Outcome.DEMOTED


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
    assert not entries.table
    assert torch.allclose(out, F.scaled_dot_product_attention(q, k, k, causal_lower_right(8, 24)), atol=1e-5)


def test_what_was_resolved_before_a_clear_is_not_published_after_it(monkeypatch):
    q = torch.randn(1, 2, 24, 16)
    real = resolve.attention

    def slow(*args):
        served = real(*args)
        drop_all()
        return served

    monkeypatch.setattr(resolve, "attention", slow)
    attention(q, q, q)
    assert not entries.table and entries.first is entries._ask_table


def test_a_tuning_that_fails_does_not_reach_the_caller(monkeypatch, caplog):
    q = torch.randn(1, 2, 24, 16)

    def broken(*_, **__):
        raise RuntimeError("no memory for the reference")

    monkeypatch.setattr(tune_now, "tune_problem", broken)
    for _ in range(3):
        assert torch.equal(attention(q, q, q), F.scaled_dot_product_attention(q, q, q))
    assert sum("tuning failed" in record.message for record in caplog.records) == 1


def test_a_stored_plain_winner_is_not_served_with_another_conversion():
    q, k = torch.randn(2, 8, 1, 32), torch.randn(2, 2, 40, 32)
    assert fastattn.plan(q, k, k, kernel="torch_math").candidate == "torch_math"
    with pytest.raises(NoKernelError):
        attention(q, k, k, kernel="torch_math+fp32")


def test_an_order_is_not_dropped_under_dynamic_shapes():
    x = torch.randn(1, 2, 24, 16)
    for dropout_p, error in ((0.0, "matmul_shifted' cannot run"), (0.5, "static sizes")):  # the operator draws none
        torch._dynamo.reset()
        run = torch.compile(
            lambda x: attention(x, x, x, kernel="matmul_shifted", dropout_p=dropout_p),
            backend="eager", dynamic=True, fullgraph=True,
        )  # fmt: skip
        with pytest.raises(Exception, match=error):
            run(x)


def test_threads_that_read_no_verdict_just_before_one_was_found_do_not_tune_again(monkeypatch):
    q = torch.randn(1, 2, 26, 16)
    count, real = [], tune_now.tune_and_keep
    monkeypatch.setattr(tune_now, "tune_and_keep", lambda *a, **k: (count.append(1), real(*a, **k))[1])
    threads = [threading.Thread(target=attention, args=(q, q, q)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(count) == 1


# --- what a reviewer of the options found

BOTTOM = masks.Causal("bottom_right")


def every_third(score, b, h, i, j):
    return score + torch.where(j % 3 == 0, 2.0, 0.0)


def by_hand(q, k, v, seen=None, softcap=0.0, change=lambda scores: scores):
    scores = q.double() @ k.double().mT * q.shape[-1] ** -0.5
    scores = change(softcap * torch.tanh(scores / softcap) if softcap else scores)
    scores = scores if seen is None else scores.masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ v.double()).to(q.dtype)


@pytest.mark.parametrize("mode", ["auto", "cached", "off"])
def test_a_score_mod_is_told_each_keys_own_number_in_a_window(mode):
    q, k, v = torch.randn(1, 2, 1, 16), *torch.randn(2, 1, 2, 40, 16)
    j = torch.arange(40)
    want = by_hand(q, k, v, (j >= 34)[None], change=lambda s: s + torch.where(j % 3 == 0, 2.0, 0.0))
    with fastattn.options(mode=mode):
        torch.testing.assert_close(attention(q, k, v, BOTTOM, window=(5, 0), score_mod=every_third), want)


def compiled(call, how):
    """The traced call, as it stands in the graph; test_compile.py and test_flex.py have what inductor makes of one."""
    backend = {"compiled": "aot_eager", "inductor": "inductor"}
    return torch.compile(call, fullgraph=True, backend=backend[how]) if how in backend else call


INDUCTOR = pytest.param("inductor", marks=pytest.mark.long)


@pytest.mark.parametrize("how", ["eager", "off", "compiled", INDUCTOR])
def test_a_block_mask_keeps_its_softcap(how, caplog):
    from torch.nn.attention.flex_attention import create_block_mask

    q, k, v = torch.randn(3, 1, 2, 64, 16).unbind()
    block = create_block_mask(lambda b, h, i, j: j <= i, None, None, 64, 64, device="cpu")
    want = by_hand(q, k, v, torch.ones(64, 64, dtype=torch.bool).tril(), softcap=2.0)

    def call(q, k, v):
        return attention(q, k, v, block, softcap=2.0)

    with fastattn.options(mode="off" if how == "off" else "auto"):
        torch.testing.assert_close(compiled(call, how)(q, k, v), want)
    assert "budgets" not in caplog.text


@pytest.mark.parametrize("how", ["compiled", INDUCTOR])
def test_a_traced_score_mod_takes_bands_and_refuses_an_order_it_cannot_carry_out(how):
    q, k, v = torch.randn(3, 1, 2, 64, 16).unbind()
    i, j = torch.arange(64)[:, None], torch.arange(64)
    want = by_hand(q, k, v, (j <= i) & (j >= i - 5), change=lambda s: s + torch.where(j % 3 == 0, 2.0, 0.0))
    banded = compiled(lambda *x: attention(*x, is_causal=True, window=(5, 0), score_mod=every_third), how)
    torch.testing.assert_close(banded(q, k, v), want)
    ordered = torch.compile(lambda *x: attention(*x, kernel="torch_flash", score_mod=every_third), backend="eager")
    with pytest.raises(fastattn.NoKernelError, match="torch_flash"):
        ordered(q, k, v)


@pytest.mark.parametrize("how", ["off", "compiled", INDUCTOR])
def test_plain_math_is_cast_by_autocast_as_f_sdpa_is(how):
    q, k, v = torch.randn(3, 1, 2, 64, 16).unbind()

    def call(q, k, v):
        return attention(q, k, v, softcap=2.0, return_lse=True)

    with torch.autocast("cpu", torch.bfloat16):
        out, lse = call(q, k, v)
        with fastattn.options(mode="off" if how == "off" else "auto"):
            out_2, lse_2 = compiled(call, how)(q, k, v)
    assert out.dtype is out_2.dtype is torch.bfloat16 and lse.dtype is lse_2.dtype is torch.float32
    torch.testing.assert_close(lse, lse_2, atol=0.01, rtol=0)


def test_a_window_in_a_list_may_change_between_calls():
    q, k, v = torch.randn(3, 1, 2, 64, 16).unbind()
    window = [3, 0]
    first = attention(q, k, v, window=window)
    window[0] = 40
    assert not torch.equal(first, attention(q, k, v, window=window))


def test_explain_says_so_where_no_kernel_can():
    q, k, v = torch.randn(3, 1, 2, 64, 16).unbind()
    found = fastattn.explain(q.requires_grad_(), k, v, score_mod=every_third)
    assert found.served_by == "nothing" and "NoKernelError" in found.why and len(found.rows) > 5
    with pytest.raises(fastattn.NoKernelError):
        attention(q, k, v, score_mod=every_third)


def test_a_whole_number_is_an_accuracy_too():
    assert type(call_options.parse_options({"accuracy": 1}).accuracy) is float


def test_a_recomputing_backward_takes_many_gradients_at_once_and_can_be_differentiated():
    q, k, v = (torch.randn(2, 4, 64, 32, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    out = attention(q, k, v, kernel="matmul_mixed")
    grads = torch.randn(3, *out.shape, dtype=out.dtype)
    batched = torch.autograd.grad(out, (q, k, v), grads, is_grads_batched=True, retain_graph=True)
    single = torch.autograd.grad(out, (q, k, v), grads[1], retain_graph=True)
    for many, one in zip(batched, single, strict=True):
        torch.testing.assert_close(many[1], one, atol=2e-2, rtol=2e-2)
    first = torch.autograd.grad(out, q, grads[0], create_graph=True)[0]
    found = torch.autograd.grad(first.sum(), (q, k, v))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        plain = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    want = torch.autograd.grad(torch.autograd.grad(plain, q, grads[0], create_graph=True)[0].sum(), (q, k, v))
    for got, right in zip(found, want, strict=True):
        torch.testing.assert_close(got, right, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("q_len", [1, 4])
@pytest.mark.parametrize("options", [{}, {"window": (100, 0)}, {"window": (10, 0)}, {"kernel": "torch_flash"}], ids=str)
def test_a_decode_loop_under_a_causal_mask_hits(q_len, options, monkeypatch):
    misses = []
    resolved = resolve.attention
    monkeypatch.setattr(resolve, "attention", lambda *given: misses.append(1) or resolved(*given))
    q, k, v = torch.randn(1, 8, q_len, 64), *torch.randn(2, 1, 2, 260, 64)
    i, j = torch.arange(q_len)[:, None], torch.arange(260)
    for kv_len in range(188, 250):
        out = attention(q, k[:, :, :kv_len], v[:, :, :kv_len], BOTTOM, **options)
        at = i + kv_len - q_len
        seen = (j <= at) & (j >= at - options.get("window", (1000, 0))[0])
        want = by_hand(q, *(x[:, :, :kv_len].repeat_interleave(4, 1) for x in (k, v)), seen[:, :kv_len])
        torch.testing.assert_close(out, want)
    assert len(misses) <= 8  # bucket edges, and the family's first lengths


def test_under_a_default_device_calls_are_served_and_hit(monkeypatch):
    turn(monkeypatch, Clock())  # by a real one another kernel may win the second time, whose float16 is not the same
    q, k, v = torch.randn(3, 2, 4, 64, 32, dtype=torch.float16).unbind()
    padding = torch.ones(2, 1, 1, 64, dtype=torch.bool)
    calls = [{}, {"is_causal": True}, {"window": (3, 2)}, {"mask": padding}, {"return_lse": True, "softcap": 3.0}]
    want = [attention(q, k, v, **call) for call in calls]
    fastattn.clear()
    with torch.device("meta"):  # whatever is made without a device is good for nothing
        for call, right in zip(calls, want, strict=True):
            for _ in range(2):
                torch.testing.assert_close(attention(q, k, v, **call), right)
            assert fastattn.explain(q, k, v, **call).verdict is not None
    assert entries.table


def test_a_miss_under_autocast_is_tuned_by_the_command_it_is_answered_with(monkeypatch):
    from fastattn.cli.main import main

    turn(monkeypatch, Clock())  # by a crowded one nothing is complete
    q, k, v = torch.randn(3, 1, 2, 64, 32).unbind()
    with fastattn.options(mode="cached"), torch.autocast("cpu", torch.bfloat16):
        attention(q, k, v, is_causal=True)
    [missed] = fastattn.misses() if hasattr(fastattn, "misses") else session.misses
    CliRunner().invoke(main, ["tune", *command_line(missed).split()], catch_exceptions=False)
    assert session.complete_verdict(missed, current_settings()) is not None


def test_a_tensor_that_a_score_mod_holds_may_want_a_gradient():
    slope = torch.ones(2, requires_grad=True)
    q, k, v = torch.randn(3, 1, 2, 64, 16).unbind()
    with pytest.raises(fastattn.NoKernelError, match="gradients are not supported"):
        attention(q, k, v, score_mod=lambda s, b, h, i, j: s * slope[h])
