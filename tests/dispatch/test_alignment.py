"""On CUDA an entry for tensors at multiples of 16 bytes serves no others, and the other way round; a CPU is asked nothing."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from fakes import DEFAULT, FAST, Clock, turn
from library_grid import installed
from stubs import flash_attn_2, torch_cuda

import fastattn
from fastattn.dispatch import guard_conditions
from fastattn.dispatch.session import session
from fastattn.environment.device import Device

H100 = Device("cuda", "made-up H100", 90, cuda="12.8", cudnn=92300)


def made(which=(True, True, True)):
    """q, k and v; which of them start at a multiple of 16 bytes."""
    found = []
    for is_aligned in which:
        flat = torch.randn(2 * 4 * 64 * 64 + 8, dtype=torch.bfloat16)
        x = flat[(0 if is_aligned else 1) :][: 2 * 4 * 64 * 64].view(2, 4, 64, 64)
        assert (x.data_ptr() % 16 == 0) is is_aligned
        found.append(x)
    return found


def misses():
    return fastattn.stats()["misses"]


@pytest.fixture
def on_h100(monkeypatch):
    """FlashAttention 2 wins there; its stub faults where a tensor starts elsewhere, as the real one does."""
    turn(monkeypatch, Clock({"default": DEFAULT, "flash_attn_2": FAST, "flash_attn_2+contiguous": 1.1 * FAST}))
    with monkeypatch.context() as patch, installed(torch_cuda.STUB, patch), installed(flash_attn_2.STUB, patch):
        patch.setattr(Device, "of", staticmethod(lambda device: H100))
        fastattn.clear()
        yield
    fastattn.clear()


def same(out, q, k, v):
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    return bool((out - exact).abs().max() < 0.02)


@pytest.mark.parametrize("which", [w for w in product((True, False), repeat=3) if not all(w)], ids=str)
def test_an_entry_made_from_aligned_tensors_does_not_match_others(which, on_h100):
    """The kernel would read vectors that start where they may not."""
    for _ in range(2):
        assert same(fastattn.attention(*(x := made())), *x)
    assert fastattn.explain(*made()).served_by == "flash_attn_2"
    at = misses()
    assert same(fastattn.attention(*(x := made(which))), *x)
    assert misses() == at + 1
    assert same(fastattn.attention(*(x := made(which))), *x) and same(fastattn.attention(*(x := made())), *x)
    assert misses() == at + 1, "each has its entry by now"


def test_an_entry_that_copies_is_not_for_tensors_that_need_no_copy(on_h100):
    awry = (True, False, True)
    for _ in range(2):
        assert same(fastattn.attention(*(x := made(awry))), *x)
    found = fastattn.explain(*made(awry))
    assert found.served_by == "flash_attn_2+contiguous" and "on copies" in found.why
    at = misses()
    for which in ((True, True, True), (False, False, True), (False, True, True)):
        assert same(fastattn.attention(*(x := made(which))), *x)
    assert misses() == at + 3


def test_a_mask_may_start_anywhere(on_h100):
    masks = [torch.randn(64 * 64 + 1, dtype=torch.bfloat16)[at:][: 64 * 64].view(64, 64) for at in (0, 1)]
    fastattn.attention(*made(), masks[0])
    at = misses()
    fastattn.attention(*made(), masks[1])
    assert misses() == at


def test_the_untuned_default_reads_it_too(on_h100):
    """F.sdpa's kernels fault on these (pytorch#183484): torch's flash kernel serves, on a copy of the one that does."""
    with fastattn.options.scope(mode="cached"):
        fastattn.attention(*made())
        assert fastattn.explain(*made()).served_by == "default"
        at = misses()
        q, k, v = made((True, True, False))
        assert same(fastattn.attention(q, k, v), q, k, v) and misses() == at + 1
        assert fastattn.explain(q, k, v).served_by == "torch_flash+contiguous"


def test_on_a_cpu_nothing_is_read(monkeypatch):
    asked = []
    monkeypatch.setattr("fastattn.dispatch.guard.alignment_conditions", lambda tensors: asked.append(tensors) or [])
    fastattn.clear()
    session.tuning_s = 0.0
    fastattn.attention(*made())
    at = misses()
    fastattn.attention(*made((False, True, False)))
    assert misses() == at and not asked


def test_the_conditions_are_one_look_where_all_are_aligned():
    q, k, v = made()
    [one] = guard_conditions.alignment_conditions({"q": q, "k": k, "m": v})
    assert one == "not (q.data_ptr() | k.data_ptr()) & 15"
    q, k, v = made((False, True, True))
    assert guard_conditions.alignment_conditions({"q": q, "k": k, "v": v}) == [
        "q.data_ptr() & 15", "not k.data_ptr() & 15", "not v.data_ptr() & 15",
    ]  # fmt: skip
