"""Fault 51: one tuning per problem whatever the threads do, scopes that do not leak, and a child that works after fork."""

from __future__ import annotations

import os
import threading
import time

import children
import pytest
import torch

import fastattn
from fastattn import attention
from fastattn.dispatch import tune_now
from fastattn.dispatch.session import session
from fastattn.environment.settings import current_settings

F_sdpa = torch.nn.functional.scaled_dot_product_attention
TIMEOUT_S = 60


def in_threads(count, work):
    """Run work(index) in threads that start together; whatever one raises fails the test."""
    barrier, errors = threading.Barrier(count), []

    def run(index):
        try:
            barrier.wait(TIMEOUT_S)
            work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(count)]
    [t.start() for t in threads]
    [t.join(TIMEOUT_S) for t in threads]
    assert not any(t.is_alive() for t in threads), "a thread hangs"
    assert not errors, errors


@pytest.fixture
def tunings(monkeypatch):
    """Problems tuned so far; a tuning waits until all threads that want it have called."""
    real, seen = tune_now.tune_and_keep, []

    def counted(problem, *args, **how):
        seen.append(problem)
        time.sleep(0.2)
        return real(problem, *args, **how)

    monkeypatch.setattr(tune_now, "tune_and_keep", counted)
    return seen


def test_fault_51_32_threads_on_one_new_problem_tune_once(tunings):
    """Threads that meet one new problem together tune it once."""
    q, k, v = (torch.randn(1, 2, 24, 16) for _ in range(3))
    want, outputs = F_sdpa(q.double(), k.double(), v.double()), [None] * 32

    def work(index):
        outputs[index] = attention(q, k, v)

    in_threads(32, work)
    assert len(tunings) == 1
    assert all(torch.allclose(out.double(), want, atol=1e-5) for out in outputs)
    assert not session.being_tuned
    attention(q, k, v)
    assert len(tunings) == 1, "the verdict of the first tuning was lost"


def test_fault_51_threads_on_different_problems_tune_each_once(tunings):
    inputs = [torch.randn(1, 2, 24 + i // 2, 16) for i in range(8)]
    in_threads(8, lambda i: attention(inputs[i], inputs[i], inputs[i]))
    for x in inputs:
        attention(x, x, x)
    assert sorted(p.q_len for p in tunings) == [24, 25, 26, 27]


def test_a_tuning_that_raises_leaves_the_problem_open(monkeypatch):
    """The lock on a problem is given back, so that the next call may tune."""
    x = torch.randn(1, 2, 24, 16)
    with monkeypatch.context() as patch:
        patch.setattr(tune_now, "tune_problem", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            attention(x, x, x)
    assert not session.being_tuned
    attention(x, x, x)
    assert fastattn.explain(x, x, x).verdict is not None


def test_fault_32_two_threads_with_opposite_scopes(tmp_path):
    """Options of a scope hold for its own thread: two threads with opposite ones do not meet."""
    x = torch.randn(1, 2, 24, 16)
    found = {0: set(), 1: set()}

    def work(index):
        only = ["torch_math", "sdpa_math"][index]
        for _ in range(20):
            with fastattn.options(mode="cached", kernels=[only]):
                assert current_settings().kernels == (only,)
                found[index].update(t.candidate for t in fastattn.explain(x, x, x).rows if not t.reason)
                assert torch.allclose(attention(x, x, x), F_sdpa(x, x, x), atol=1e-5)

    in_threads(2, work)
    assert "torch_math" in found[0] and "torch_math" not in found[1]
    assert current_settings().kernels == ()


def test_scopes_made_together_leave_nothing_behind():
    """What two threads do when both enter a scope at once."""
    before = current_settings()
    first, second = fastattn.options(mode="off"), fastattn.options(mode="cached")
    with first, second:
        assert current_settings().mode == "cached"
    assert current_settings() == before


def test_a_scope_is_not_seen_by_other_threads():
    seen = []
    with fastattn.options(mode="off"):
        in_threads(2, lambda _: seen.append(current_settings().mode))
    assert seen == ["auto", "auto"]


FORK = """
import os, sys, threading, time
import torch, fastattn
from fastattn.dispatch.session import session
from fastattn.dispatch import attention as api, tune_now

torch.set_num_threads(1)  # a forked child must not use the parent's pool of threads, whoever calls torch
real, at_work = tune_now.tune_problem, threading.Event()
def slow(*args, **how):
    at_work.set()
    time.sleep(1.0)
    return real(*args, **how)
tune_now.tune_problem = slow
x = torch.randn(1, 2, 24, 16)
want = torch.nn.functional.scaled_dot_product_attention(x, x, x)
parent = threading.Thread(target=lambda: fastattn.attention(x, x, x))
parent.start()
assert at_work.wait(30)
assert session.being_tuned
if sys.argv[1] == "locked":  # fork while another thread holds every lock
    held = threading.Event()
    def hold():
        with session.lock, session.counts._lock, api.entries._lock:
            held.set()
            time.sleep(3)
    threading.Thread(target=hold, daemon=True).start()
    assert held.wait(30)
pid = os.fork()
if pid == 0:
    tune_now.tune_problem = real
    ok = not session.being_tuned
    ok &= torch.allclose(fastattn.attention(x, x, x), want, atol=1e-5)
    ok &= fastattn.explain(x, x, x).verdict is not None  # it tuned, and hits from now on
    ok &= torch.allclose(fastattn.attention(x, x, x), want, atol=1e-5)
    os._exit(0 if ok else 7)
deadline = time.time() + 30
while time.time() < deadline:
    done, status = os.waitpid(pid, os.WNOHANG)
    if done:
        break
    time.sleep(0.05)
else:
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    os._exit(9)  # the child hangs
parent.join(30)
assert torch.allclose(fastattn.attention(x, x, x), want, atol=1e-5)
os._exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("how", ["tuning", "locked"])
def test_fault_51_fork_during_a_tuning_the_child_works(how, tmp_path):
    done = children.run(FORK, how, env={"FASTATTN_CACHE_DIR": str(tmp_path / "forked")}, timeout=TIMEOUT_S)
    assert done.returncode == 0, (done.returncode, done.stderr)
