"""Fault 89 of reference/faults2.md: scratch memory that threads keep while nobody works in it."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fakes import qkv

import fastattn
from fastattn.kernels import workspace
from fastattn.kernels.adapters import matmul
from fastattn.kernels.workspace import ALL_BYTES, KEPT_BYTES, scratch

THREADS = 12
MIB = 2**20
CALLS = {
    "float32": lambda: fastattn.attention(*qkv(1024, heads=2), kernel="matmul"),
    "bfloat16": lambda: fastattn.attention(*qkv(1024, heads=2, dtype=torch.bfloat16), kernel="matmul_mixed"),
    "training": lambda: fastattn.attention(*qkv(1024, heads=1, grad=True), kernel="matmul").sum().backward(),
    "decode": lambda: fastattn.attention(
        *qkv(1, 2048, heads=8, head_dim=64, dtype=torch.bfloat16), kernel="matmul_mixed"
    ),
}


@pytest.fixture(autouse=True)
def nothing_kept():
    """No thread keeps anything when a test begins."""
    for room in list(workspace._rooms.values()):
        room().kept.clear()


def held():
    """Bytes of scratch that are alive, whoever keeps them."""
    gc.collect()
    found = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.dtype is torch.uint8]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}.values())


def in_pool(work, count=THREADS):
    """Run work() in `count` threads at once; the pool, whose threads then wait for more."""
    together = threading.Barrier(count)

    def run():
        together.wait(60)
        work()

    pool = ThreadPoolExecutor(count)
    for done in [pool.submit(run) for _ in range(count)]:
        done.result(60)
    return pool


@pytest.mark.usefixtures("untuned")
@pytest.mark.parametrize("call", [
    "float32", "training", *(pytest.param(call, marks=pytest.mark.long) for call in ("bfloat16", "decode")),
])  # fmt: skip
def test_fault_89_idle_threads_keep_no_more_than_one_bound_together(call):
    """What threads keep of scratch memory is bounded for all of them together, however many there are."""
    CALLS[call]()
    alone = held()
    with in_pool(CALLS[call]):
        assert alone > 0
        assert held() <= max(ALL_BYTES, alone)


def test_fault_89_the_thread_that_came_last_keeps_what_it_needs():
    with in_pool(lambda: scratch("a", torch.empty(0), (4, MIB), torch.uint8)):
        blocks, again = (
            [scratch(name, torch.empty(0), (KEPT_BYTES,), torch.uint8).data_ptr() for name in "abc"] for _ in range(2)
        )
        assert blocks == again, "its own is never taken from it"
        assert held() == 3 * KEPT_BYTES, "the others forgot theirs"


def test_fault_89_who_used_it_longest_ago_forgets_it():
    asked, told = [threading.Event() for _ in range(3)], []

    def work(index):
        asked[index].wait(60)
        told.append(scratch("a", torch.empty(0), (7 * MIB,), torch.uint8).data_ptr())

    with ThreadPoolExecutor(3) as pool:
        workers = [pool.submit(work, index) for index in range(3)]
        for event, worker in zip(asked, workers, strict=True):
            event.set()
            worker.result(60)
        sizes = [room().size() for _, room in sorted(workspace._rooms.items(), key=lambda item: item[1]().last)]
        assert [size for size in sizes if size] == [7 * MIB] * 2 and sum(sizes) <= ALL_BYTES


def test_fault_89_a_thread_that_is_at_work_is_not_disturbed():
    """Its block is forgotten while it writes there: nobody else gets that memory before it is done."""
    mine = scratch("a", torch.empty(0), (KEPT_BYTES // 8,), torch.float64).fill_(3.0)
    with in_pool(lambda: scratch("a", torch.empty(0), (KEPT_BYTES // 8,), torch.float64).fill_(7.0)):
        assert (mine == 3.0).all()
        assert held() - KEPT_BYTES <= ALL_BYTES
    del mine


def test_what_is_still_worked_in_is_not_given_out_again():
    """A signal handler may ask in the middle of a call."""
    mine = scratch("a", torch.empty(0), (64,), torch.float64).fill_(3.0)
    inner = scratch("a", torch.empty(0), (64,), torch.float64).fill_(7.0)
    assert (mine == 3.0).all() and mine.data_ptr() != inner.data_ptr()
    place = inner.data_ptr()
    del inner
    assert scratch("a", torch.empty(0), (64,), torch.float64).data_ptr() == place, "whoever holds the old one keeps it"
    assert (mine == 3.0).all()


@pytest.mark.usefixtures("untuned")
def test_a_signal_handler_that_calls_does_not_change_the_answer(monkeypatch):
    q, k, v = qkv(64)
    want, softmax, others = fastattn.attention(q, k, v, kernel="matmul"), matmul.softmax, []

    def interrupted(scores, see):
        if not others:
            others.append(None)
            others[0] = fastattn.attention(*qkv(64, seed=1), kernel="matmul")
        return softmax(scores, see)

    monkeypatch.setattr(matmul, "softmax", interrupted)
    assert torch.equal(fastattn.attention(q, k, v, kernel="matmul"), want) and not torch.equal(others[0], want)


def test_fault_89_the_answers_of_many_threads_are_right():
    want = fastattn.attention(*qkv(256, heads=2), kernel="matmul")

    def work():
        for length in (256, 512, 256, 64, 256):
            got = fastattn.attention(*qkv(length, heads=2), kernel="matmul")
            assert length != 256 or torch.equal(got, want)

    in_pool(work).shutdown()


def test_fault_89_threads_that_end_keep_nothing():
    in_pool(lambda: scratch("a", torch.empty(0), (MIB,), torch.uint8)).shutdown()
    gc.collect()
    assert held() == 0 and all(room() is not None for room in workspace._rooms.values())
