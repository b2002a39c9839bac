"""DTensors that are sharded alike over batch or heads, or replicated, are attended to part by part; all others are F.sdpa's."""

from __future__ import annotations

import pytest
import rank_processes
import torch
import torch.distributed as dist
import torch.nn.functional as F

import fastattn
from fastattn.dispatch import drop_in

F_sdpa = F.scaled_dot_product_attention

# Runs on each of two ranks. What must hold is asserted there.
SCRIPT = """
import os
import torch, torch.distributed as dist, torch.nn.functional as F
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
import fastattn
from fastattn.dispatch import drop_in, tune_now

F_sdpa = F.scaled_dot_product_attention
torch.set_num_threads(1)
dist.init_process_group("gloo")
tune_now.tune_and_keep = lambda *_, **__: 1 / 0
line = init_device_mesh("cpu", (2,))
grid = init_device_mesh("cpu", (2, 1))
torch.manual_seed(0)
q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
grad = torch.randn(2, 4, 6, 8)
bias = torch.randn(6, 6)
b, h, r = Shard(0), Shard(1), Replicate()


def place(x, mesh, placements, asks=True):
    return distribute_tensor(x.clone(), mesh, placements).requires_grad_(asks)


def stock(mask, **options):
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out = F_sdpa(*inputs, mask, enable_gqa=True, **options)
    return out.detach(), torch.autograd.grad(out, inputs, grad)


for door in ("sdpa", "patched", "attention", "bshd"):
    for mesh, placements in ((line, (b,)), (line, (h,)), (line, (r,)), (grid, (b, h)), (grid, (h, r))):
        for mask in (None, bias):
            options = {"is_causal": True} if mask is None else {}
            want, gradients = stock(mask, **options)
            given = [place(x, mesh, placements) for x in (q, k, v)]
            also = None if mask is None else place(mask, mesh, (r,) * mesh.ndim, False)
            fastattn.stats.reset()
            if door == "patched":
                with fastattn.patch():
                    out = F.scaled_dot_product_attention(*given, also, enable_gqa=True, **options)
            elif door == "sdpa":
                out = fastattn.sdpa(*given, also, enable_gqa=True, **options)
            elif door == "attention":
                out = fastattn.attention(*given, also, **options)
            else:
                heads = [Shard(2) if p is h else p for p in placements]
                turned = [place(x.transpose(1, 2), mesh, heads) for x in (q, k, v)]
                out = fastattn.attention(*turned, also, layout="bshd", **options)
                assert out.placements == turned[0].placements
                torch.testing.assert_close(out.full_tensor().transpose(1, 2), want)
                continue
            assert fastattn.stats()["served_by"] == {"default": 1} and not fastattn.stats()["passed_on"], fastattn.stats()
            assert out.placements == given[0].placements and out.shape == want.shape, (door, placements)
            torch.testing.assert_close(out.full_tensor(), want)
            out.backward(place(grad, mesh, placements, False))
            for x, theirs in zip(given, gradients, strict=True):
                assert x.grad.placements == x.placements
                torch.testing.assert_close(x.grad.full_tensor(), theirs)

# what is not alike is F.sdpa's, as it was called (DTensor's own takes half a minute for its first such call on a CPU)
drop_in.stock_sdpa = lambda *given, **options: "F.sdpa"
full = torch.randn(2, 4, 6, 8)
OTHERS = {
    "sharded over rows": ([(Shard(2),)] * 3, None, {}),
    "q alone sharded": ([(b,), (r,), (r,)], None, {}),
    "a mask of the batch": ([(b,)] * 3, (torch.randn(2, 1, 6, 6), r), {}),
    "a mask of the heads": ([(h,)] * 3, (torch.randn(4, 6, 6), r), {}),
    "a sharded mask": ([(b,)] * 3, (torch.randn(2, 1, 6, 6), b), {}),
    "dropout": ([(b,)] * 3, None, {"dropout_p": 0.5}),
}
for name, (placements, mask, options) in OTHERS.items():
    given = [distribute_tensor(full.clone(), line, p) for p in placements]
    also = None if mask is None else distribute_tensor(mask[0], line, [mask[1]])
    assert fastattn.sdpa(*given, also, **options) == "F.sdpa", name
three = distribute_tensor(torch.randn(2, 3, 6, 8), line, (h,))
assert fastattn.sdpa(three, three, three) == "F.sdpa", "parts of two sizes"
dist.barrier()
dist.destroy_process_group()
print("ok")
"""


@pytest.mark.long  # two processes, and DTensor's first operators
def test_fault_30_dtensors_on_two_ranks(tmp_path):
    """DTensors that are sharded alike over batch or heads, or replicated, are served part by part, forward and backward."""
    ranks = rank_processes.run(SCRIPT, tmp_path)
    assert [r.stdout.splitlines()[-1:] for r in ranks] == [["ok"], ["ok"]], [r.stderr for r in ranks]


@pytest.fixture
def alone():
    """A mesh of this process alone."""
    from torch.distributed.tensor import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def test_a_mask_that_asks_for_a_gradient_and_modes_are_torchs(alone, untuned, monkeypatch):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    monkeypatch.setattr(drop_in, "stock_sdpa", lambda *_, **__: "F.sdpa")
    q = distribute_tensor(torch.randn(2, 4, 6, 8), alone, [Shard(0)])
    mask = distribute_tensor(torch.randn(6, 6), alone, [Replicate()])
    want = F_sdpa(*[q.to_local()] * 3, mask.to_local())
    assert torch.equal(fastattn.sdpa(q, q, q, mask).to_local(), want)
    assert torch.equal(fastattn.attention(q, q, q, mask).to_local(), want)
    with fastattn.options.scope(mode="off"):
        assert fastattn.sdpa(q, q, q, mask) == "F.sdpa"
    assert fastattn.sdpa(q, q, q, mask.requires_grad_()) == "F.sdpa"
    with torch.no_grad():
        assert torch.equal(fastattn.sdpa(q, q, q, mask).to_local(), want)
    assert fastattn.sdpa(q, q, q, mask.to_local()) == fastattn.sdpa(q, q.to_local(), q) == "F.sdpa"
