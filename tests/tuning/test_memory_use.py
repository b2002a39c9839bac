"""Memory is measured on CUDA without a trace in the statistics that the caller reads."""

from __future__ import annotations

import pytest
import torch

from fastattn.tuning import memory_use


class Allocator:
    """torch.cuda's statistics, over bytes that a test allocates."""

    def __init__(self, monkeypatch, now, peak, left=10**9):
        self.now, self.peak, self.left, self.resets = now, peak, left, 0
        for name, answer in {
            "synchronize": lambda device: None,
            "memory_allocated": lambda device: self.now,
            "max_memory_allocated": lambda device: self.peak,
            "reset_peak_memory_stats": self.reset,
        }.items():
            monkeypatch.setattr(torch.cuda, name, answer)
        monkeypatch.setattr(torch, "empty", self.empty)

    def reset(self, device):
        self.resets += 1
        self.peak = self.now

    def take(self, size, out=None):
        if self.now + size > self.left:
            raise torch.OutOfMemoryError("none is left")
        self.peak = max(self.peak, self.now + size)
        return out

    def empty(self, size, dtype, device):
        assert dtype is torch.uint8 and torch.device(device).type == "cuda"
        self.take(size)


class OnCuda(torch.Tensor):
    device = torch.device("cuda", 0)


@pytest.mark.parametrize("before, took, left, after", [
    (5000, 700, 10**9, 5000),  # the caller's own peak is put back
    (1200, 700, 10**9, 1700),  # a higher one is true
    (1000, 0, 10**9, 1000),
    (5000, 700, 3000, 1700),  # where memory has gone meanwhile it cannot be
])  # fmt: skip
def test_the_callers_peak_is_what_it_was(before, took, left, after, monkeypatch):
    x = torch.zeros(4).as_subclass(OnCuda)
    stats = Allocator(monkeypatch, now=1000, peak=before, left=left)
    _, temporary, _ = memory_use.measure_memory(lambda: stats.take(took, x), [x])
    assert temporary == max(0, took - 16) and stats.resets == 1
    assert stats.peak == after


def test_it_is_put_back_where_the_candidate_raises(monkeypatch):
    x = torch.zeros(4).as_subclass(OnCuda)
    stats = Allocator(monkeypatch, now=1000, peak=5000)

    def broken():
        raise RuntimeError("no kernel image")

    with pytest.raises(RuntimeError, match="no kernel image"):
        memory_use.measure_memory(broken, [x])
    assert stats.peak == 5000
