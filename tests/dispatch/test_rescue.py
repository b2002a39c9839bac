"""Fault 53, the circuit breaker: a winner that raises is answered in the same call, demoted on disk, reported once."""

from __future__ import annotations

import json
import logging
import os
import sys
import textwrap
import threading

import children
import pytest
import torch
from building import problem_of
from fakes import FAST, Clock, add, check, honest, made_up, qkv, row, turn

import fastattn
from fastattn.dispatch import rescue
from fastattn.verdicts.verdict import Outcome


class Fragile:
    """Right, and by far the fastest, until `error` is set."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.calls = 0

    def __call__(self, q, k, v, mask, a):
        self.calls += 1
        if self.error is not None:
            raise self.error
        return honest(q, k, v, mask, a)


@pytest.fixture
def fragile(monkeypatch):
    kernel = Fragile()
    add(monkeypatch, made_up("fragile", kernel))
    turn(monkeypatch, Clock({"default": 4e-3, "fragile": FAST}))
    return kernel


def stored(directory):
    [path] = directory.rglob("*.json")
    return json.loads(path.read_text())


def test_fault_53_a_winner_that_raises_on_call_5_is_answered_in_that_call(fragile, own_store, caplog):
    """Where a winner starts to raise another kernel answers that very call; it is not asked again, and told of once."""
    q, k, v = qkv(64)
    for _ in range(4):
        check(q, k, v)
    assert fastattn.explain(q, k, v).served_by == stored(own_store)["winner"] == "fragile"
    fragile.error = RuntimeError("illegal instruction\nat 0x0")
    with caplog.at_level(logging.WARNING, "fastattn"):
        check(q, k, v)  # the fifth
        calls = fragile.calls
        for _ in range(5):
            check(q, k, v)
    assert fragile.calls == calls, "it was asked again after it was demoted"
    [record] = caplog.records
    assert "fragile" in record.getMessage() and "RuntimeError: illegal instruction" in record.getMessage()


def test_stats_say_what_was_demoted_for_which_problem(fragile):
    for q_len in (64, 128):
        fragile.error = None
        check(*qkv(q_len))
        fragile.error = RuntimeError("illegal instruction")
        check(*qkv(q_len))
    demoted = fastattn.stats()["demoted"]
    assert list(demoted.values()) == ["RuntimeError: illegal instruction"] * 2
    assert all(name.startswith("fragile for ") for name in demoted)
    fastattn.stats.reset()
    found = fastattn.stats()
    assert found["demoted"] == demoted, "it still holds"
    assert found["tunings"] == found["calls"] == 0 and found["tuning_s"] == 0.0


def test_fault_53_it_is_demoted_on_disk_with_its_exception(fragile, own_store):
    q, k, v = qkv(64)
    check(q, k, v)
    fragile.error = RuntimeError("illegal instruction\nat 0x0")
    check(q, k, v)
    kept = stored(own_store)
    [trial] = [t for t in kept["trials"] if t["candidate"] == "fragile"]
    assert trial["outcome"] == "demoted" and trial["reason"] == "RuntimeError: illegal instruction"
    assert trial["time_us"] > 0  # what was measured is kept
    assert kept["winner"] != "fragile"
    assert row("fragile", q, k, v).outcome is Outcome.DEMOTED
    assert "demoted: it raised RuntimeError" in str(fastattn.explain(q, k, v))


def test_the_next_of_the_same_verdict_serves_then(monkeypatch, caplog):
    kernel = Fragile()
    add(monkeypatch, made_up("fragile", kernel), made_up("second", honest))
    turn(monkeypatch, Clock({"default": 4e-3, "fragile": FAST, "second": 1.3 * FAST}))
    q, k, v = qkv(64)
    check(q, k, v)
    kernel.error = RuntimeError("broken")
    with caplog.at_level(logging.WARNING, "fastattn"):
        check(q, k, v)
    assert fastattn.explain(q, k, v).served_by == "second"
    assert "second serves from now on" in caplog.text


def test_one_after_the_other_may_fail(monkeypatch):
    first, second = Fragile(), Fragile()
    add(monkeypatch, made_up("first", first), made_up("second", second))
    turn(monkeypatch, Clock({"default": 4e-3, "first": FAST, "second": 1.3 * FAST}))
    q, k, v = qkv(64)
    check(q, k, v)
    first.error = second.error = RuntimeError("broken")
    for _ in range(3):
        check(q, k, v)
    assert fastattn.explain(q, k, v).served_by not in ("first", "second")


def test_gradients_come_from_what_answered(fragile):
    q, k, v = qkv(64, grad=True)
    check(q, k, v)
    assert fastattn.explain(q, k, v).served_by == "fragile"
    fragile.error = RuntimeError("broken")
    check(q, k, v)  # forward and backward


def test_a_plan_that_raises_is_answered_too(fragile):
    q, k, v = qkv(64)
    plan = fastattn.plan(q, k, v)
    assert plan.candidate == "fragile"
    want = plan(q, k, v)
    fragile.error = RuntimeError("broken")
    torch.testing.assert_close(plan(q, k, v), want)


def test_fault_53_a_plan_that_is_held_does_not_ask_again(fragile, caplog):
    """Its holder has no miss that would notice the demotion."""
    q, k, v = qkv(64)
    plan = fastattn.plan(q, k, v)
    fragile.error = RuntimeError("broken")
    plan(q, k, v)
    calls = fragile.calls
    for _ in range(5):
        plan(q, k, v)
    assert fragile.calls == calls and len(caplog.records) == 1


def test_fault_53_both_of_two_failures_stay_on_disk(monkeypatch, own_store):
    """Also when both happen to one Call, made when neither was known."""
    first, second = Fragile(), Fragile()
    add(monkeypatch, made_up("first", first), made_up("second", second))
    turn(monkeypatch, Clock({"default": 4e-3, "first": FAST, "second": 1.3 * FAST}))
    q, k, v = qkv(64)
    plan = fastattn.plan(q, k, v)
    first.error = RuntimeError("broken")
    plan(q, k, v)
    second.error = RuntimeError("broken too")
    plan(q, k, v)
    kept = stored(own_store)
    assert {t["candidate"]: t["reason"] for t in kept["trials"] if t["outcome"] == "demoted"} == {
        "first": "RuntimeError: broken", "second": "RuntimeError: broken too",
    }  # fmt: skip
    assert kept["winner"] not in ("first", "second")


def test_fault_53_threads_that_fail_together_are_all_answered_and_reported_once(monkeypatch, caplog):
    barrier, errors, outputs = threading.Barrier(4), [], [None] * 4

    def run(q, k, v, mask, a):
        if errors:
            barrier.wait(60)
            raise errors[0]
        return honest(q, k, v, mask, a)

    add(monkeypatch, made_up("together", run))
    turn(monkeypatch, Clock({"default": 4e-3, "together": FAST}))
    q, k, v = qkv(64)
    fastattn.attention(q, k, v)
    assert fastattn.explain(q, k, v).served_by == "together"
    want = fastattn.attention(q, k, v)
    errors.append(RuntimeError("broken"))

    def work(index):
        outputs[index] = fastattn.attention(q, k, v)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(4)]
    [t.start() for t in threads]
    [t.join(60) for t in threads]
    for out in outputs:
        torch.testing.assert_close(out, want)
    assert len(caplog.records) == 1


def test_other_problems_of_the_same_kernel_keep_their_verdicts(fragile):
    one, other = qkv(64), qkv(80)
    check(*one)
    check(*other)
    fragile.error = RuntimeError("broken")
    check(*one)
    fragile.error = None
    assert fastattn.explain(*one).served_by != "fragile"
    assert fastattn.explain(*other).served_by == "fragile"


def test_fault_53_a_new_process_skips_the_demoted(fragile, own_store):
    q, k, v = qkv(64)
    check(q, k, v)
    fragile.error = RuntimeError("broken")
    check(q, k, v)
    script = """
        import sys
        import fakes, fastattn, pytest, torch
        from fastattn.dispatch import tune_now
        from fastattn.kernels import registry
        def run(*args):
            raise SystemExit("the demoted kernel was called")
        registry._registered.append(fakes.made_up("fragile", run))
        tune_now.tune_and_keep = lambda *a, **b: 1 / 0  # nothing is tuned anew
        torch.set_num_threads(int(sys.argv[1]))
        q, k, v = fakes.qkv(64)
        fastattn.attention(q, k, v)
        why = fastattn.explain(q, k, v)
        print(why.served_by, "|", fakes.row("fragile", q, k, v).reason)
    """
    ran = children.run(
        textwrap.dedent(script),
        str(torch.get_num_threads()),  # with another number it is another problem
        env={"FASTATTN_CACHE_DIR": str(own_store), "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert ran.returncode == 0, ran.stderr
    served, _, cause = ran.stdout.strip().partition(" | ")
    assert served == fastattn.explain(q, k, v).served_by and cause == "RuntimeError: broken"


@pytest.mark.parametrize("what", [
    "invalid configuration argument", "no kernel image is available for execution on the device",
    "too many resources requested for launch",
])  # fmt: skip
def test_fault_20_a_launch_that_was_never_made_is_answered(what, fragile):
    """A launch that was never made, say for want of a kernel image, is answered in the same call by another kernel.

    torch's flash at a batch of 65,536, a library built for another GPU: every later call is as good as ever.
    """
    check(*qkv(64))
    fragile.error = RuntimeError(f"CUDA error: {what}")
    check(*qkv(64))
    assert fastattn.explain(*qkv(64)).served_by != "fragile"


# --- what is not swallowed


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        KeyboardInterrupt(),
    ],
    ids=["out of memory", "sticky", "interrupt"],
)
def test_fault_49_out_of_memory_and_a_broken_device_are_raised(error, fragile, own_store, caplog):
    """A broken device and memory that has run out reach the caller as they are, and demote nobody."""
    q, k, v = qkv(64)
    check(q, k, v)
    fragile.error = error
    with pytest.raises(type(error)) as raised:
        fastattn.attention(q, k, v)
    assert raised.value is error and not caplog.records
    fragile.error = None
    assert fastattn.explain(q, k, v).served_by == "fragile"
    assert "demoted" not in json.dumps(stored(own_store))


def test_the_callers_own_error_is_raised_and_nobody_is_demoted(fragile, own_store, monkeypatch, caplog):
    """Whatever serves raises the same: it is the call that is wrong. Here: storage that was freed under the tensor."""
    from fastattn.planning import binding

    q, k, v = qkv(64)
    check(q, k, v)
    fragile.error = ValueError("the caller's own")

    def bind(*args, **named):
        def run(*given):
            raise ValueError("the caller's own, from another kernel")

        return run

    monkeypatch.setattr(binding, "bind", bind)
    with pytest.raises(ValueError, match="^the caller's own$"):
        fastattn.attention(q, k, v)
    assert not caplog.records and "demoted" not in json.dumps(stored(own_store))


class BreaksInBackward(torch.autograd.Function):
    error: Exception | None = None

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if BreaksInBackward.error is not None:
            raise BreaksInBackward.error
        return grad


def test_an_error_in_the_backward_is_raised_as_it_is_and_nobody_is_demoted(monkeypatch, own_store, caplog):
    """By then the call was answered long ago, and what the kernel saved is no other kernel's."""
    add(monkeypatch, made_up("later", lambda q, k, v, mask, a: BreaksInBackward.apply(honest(q, k, v, mask, a))))
    turn(monkeypatch, Clock({"default": 4e-3, "later": FAST}))
    q, k, v = qkv(64, grad=True)
    check(q, k, v)
    assert fastattn.explain(q, k, v).served_by == "later"
    error = ValueError("no gradient today")
    monkeypatch.setattr(BreaksInBackward, "error", error)
    out = fastattn.attention(q, k, v)
    with pytest.raises(ValueError) as raised:
        out.sum().backward()
    assert raised.value is error and q.grad is None
    assert fastattn.explain(q, k, v).served_by == "later"
    assert not caplog.records and "demoted" not in json.dumps(stored(own_store))
    with fastattn.options(kernels=["-later"]):  # what the user can do
        fastattn.attention(q, k, v).sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize("error", [RuntimeError("broken"), ValueError("head_dim 32")], ids=lambda e: type(e).__name__)
def test_an_order_is_not_rescued(error, fragile):
    """kernel="name" runs or raises; nothing else answers in its place."""
    q, k, v = qkv(64)
    fastattn.attention(q, k, v, kernel="fragile")
    fragile.error = error
    with pytest.raises(type(error)):
        fastattn.attention(q, k, v, kernel="fragile")


def test_the_problem_of_these_tests_is_one_kind():
    assert problem_of(*qkv(64)).digest == problem_of(*qkv(64, seed=3)).digest


def test_what_raises_while_a_graph_is_captured_is_answered_and_keeps_its_place(fragile, own_store, monkeypatch, caplog):
    q, k, v = qkv(64)
    check(q, k, v)
    before = stored(own_store)
    fragile.error = RuntimeError("it plans on the host")
    with monkeypatch.context() as capture:
        capture.setattr(rescue, "is_capturing", lambda x: True)
        check(q, k, v)
    assert stored(own_store) == before and "fragile" not in caplog.text
    fragile.error = None
    fastattn.clear()
    check(q, k, v)
    assert fastattn.explain(q, k, v).served_by == "fragile"
