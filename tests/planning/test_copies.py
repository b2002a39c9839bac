"""How q, k and v lie, and which of them is copied for a kernel: the one that it cannot read, and no other."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from building import facts_of, problem_of
from fakes import made_up, problem
from library_grid import installed
from stubs import flash_attn_2, flash_attn_3, torch_cuda

from fastattn.environment.device import Device
from fastattn.environment.settings import Settings
from fastattn.kernels.kernel import Arguments
from fastattn.planning import candidates, default_choice
from fastattn.planning.conversions import BY_NAME, blocks
from fastattn.planning.conversions.conversion import NO, OPTIONAL, REQUIRED
from fastattn.planning.decision import Accepted
from fastattn.problems.call_facts import ordinary_facts
from fastattn.problems.layouts import stride_class, strides_of_class
from fastattn.tuning.accuracy.probes import _strided

B, H, S, D = 2, 4, 16, 64
H100 = Device("cuda", "made-up H100", 90, cuda="13.0", cudnn=92300)
HALF = torch.bfloat16


def bhsd(x, order):
    return x.permute([order.index(name) for name in "bhsd"])


COMMON = {  # how models and libraries really lay out their tensors, as (b, h, s, d) views
    "Megatron's split sbhd": lambda: bhsd(torch.randn(S, B, 3, H, D, dtype=HALF)[:, :, 1], "sbhd"),
    "Megatron's interleaved sbh(3d)": lambda: bhsd(torch.randn(S, B, H, 3 * D, dtype=HALF)[..., D : 2 * D], "sbhd"),
    "flash-attn's own cache": lambda: bhsd(torch.randn(B, S + 9, 2, H, D, dtype=HALF)[:, :S, 0], "bshd"),
    "a slice of lengths and heads": lambda: torch.randn(B, H + 2, S + 9, D, dtype=HALF)[:, :H, :S],
    "a batch of every second": lambda: torch.randn(2 * B, H, S, D, dtype=HALF)[::2],
}


@pytest.mark.parametrize("layout", COMMON)
def test_a_common_layout_is_read_as_it_lies(layout, monkeypatch):
    """Whatever has a last stride of 1 is read as it lies: a slice of a cache, or of a projection, is copied for no kernel that
    takes strides, nor kept from F.sdpa."""
    q, k, v = (COMMON[layout]() for _ in range(3))
    p, facts = problem_of(q, k, v).replace(device="cuda", threads=0), facts_of(q, k, v)
    assert p.strides == ("gapped",) * 3 and facts.dense_last_dims
    for stub, name in (
        (torch_cuda.STUB, "torch_flash"),
        (flash_attn_2.STUB, "flash_attn_2"),
        (flash_attn_3.STUB, "flash_attn_3"),
    ):
        with installed(stub, monkeypatch):
            found = candidates.decisions(p, H100, Settings(), facts=facts)
            assert [c.name for c in candidates.by_name(name, found)] == [name]
    found = candidates.decisions(p, H100, Settings(), facts=facts)
    assert default_choice.fallbacks(p, H100, Settings(), found, facts)[0].name == "default"


@pytest.mark.parametrize("size", [(B, H, S, D), (1, 8, 4096, 128), (8, 1, 33, 64)])
def test_the_sample_of_a_class_lies_as_its_members_do(size):
    """What is checked and timed for a class lies as the class says, with rows at multiples of 16 bytes."""
    strides = strides_of_class(size, "gapped")
    assert strides[3] == 1 and all(step % 8 == 0 for step in strides[:3])
    assert stride_class(size, strides) == ("gapped" if size[1] > 1 and size[0] > 1 else stride_class(size, strides))
    assert stride_class((B, H, S, D), strides_of_class((B, H, S, D), "other")) == "other"
    p = problem(q_len=S, kv_len=S, head_dim=D, q_heads=H, kv_heads=H, batch=B, strides=("gapped",) * 3)
    assert ordinary_facts(p).dense_last_dims and all(ordinary_facts(p).aligned_rows)


# --- one copy, where one is needed

GIVEN = [
    ("contiguous", "other", "contiguous"), ("gapped", "gapped", "other"), ("other",) * 3, ("expanded", "gapped", "other"),
    ("gapped", "cache_bshd", "packed"),
]  # fmt: skip


def tensors(classes):
    return [_strided(torch.randn(B, H, S, D, dtype=HALF), cls) for cls in classes]


def received(kernel, given, p, facts, q_len=S):
    """Which of q, k and v the kernel gets as they were, behind the copies that it asks for."""
    got = []

    def step(q, k, v, mask, a):
        got.extend((q, k, v))
        return q

    row = BY_NAME["contiguous"]
    row.wrap(step, kernel, p, facts)(*given, None, Arguments(0.125))
    assert all(torch.equal(a, b) for a, b in zip(got, given, strict=True))
    return tuple(
        a.data_ptr() == b.data_ptr() and a.stride() == b.stride() for a, b in zip(got, given, strict=True)
    ), got


@pytest.mark.parametrize("classes, no_broadcast", list(product(GIVEN, (False, True))), ids=str)
def test_only_the_tensor_that_needs_it_is_copied(classes, no_broadcast):
    """A kernel that wants a last stride of 1 gets a copy of the tensor that has another, and the others as they are."""
    kernel = made_up("vectors", lambda *_: None, dense_last_dim=True, no_broadcast=no_broadcast)
    given = tensors(classes)
    p, facts = problem_of(*given), facts_of(*given)
    needs = [cls == "other" or (cls == "expanded" and no_broadcast) for cls in classes]
    assert BY_NAME["contiguous"].when(kernel, p, facts) == (REQUIRED if any(needs) else NO)
    kept, _ = received(kernel, given, p, facts)
    assert list(kept) == [not need for need in needs]


def misaligned(x):
    flat = torch.empty(x.numel() + 1, dtype=x.dtype)[1:]
    return flat.view(x.shape).copy_(x)


@pytest.mark.parametrize("which", list(product((False, True), repeat=3)), ids=str)
def test_only_what_starts_awry_is_moved(which):
    """So it is with what does not start at a multiple of 16 bytes."""
    kernel = made_up("vectors", lambda *_: None, aligned=True)
    given = [misaligned(x) if is_awry else x for x, is_awry in zip(tensors(("contiguous",) * 3), which, strict=True)]
    p, facts = problem_of(*given), facts_of(*given)
    assert facts.aligned == tuple(not is_awry for is_awry in which)
    assert BY_NAME["contiguous"].when(kernel, p, facts) == (REQUIRED if any(which) else NO)
    kept, got = received(kernel, given, p, facts)
    assert kept == facts.aligned and all(x.data_ptr() % 16 == 0 for x in got)


def test_rows_that_start_awry_are_copied_unless_they_are_padded():
    kernel = made_up("vectors", lambda *_: None, aligned=True, head_dim_multiple=8)
    q, k, v = tensors(("contiguous",) * 3)
    k = torch.randn(B, H, S, D + 1, dtype=HALF)[..., :D]
    kept, _ = received(kernel, (q, k, v), problem_of(q, k, v), facts_of(q, k, v))
    assert kept == (True, False, True)
    q, k, v = (x[..., :20] for x in (q, torch.randn(B, H, S, 21, dtype=HALF), v))
    assert BY_NAME["contiguous"].when(kernel, problem_of(q, k, v), facts_of(q, k, v)) == NO


def test_a_mask_that_starts_awry_costs_nobody_a_copy():
    """How a mask lies is the mask's affair: q, k and v are not copied for it."""
    q, k, v = tensors(("contiguous",) * 3)
    mask = misaligned(torch.randn(S, S, dtype=HALF))
    facts = facts_of(q, k, v, mask)
    assert mask.data_ptr() % 16 and facts.aligned == (True, True, True)
    kernel = made_up("vectors", lambda *_: None, aligned=True, dense=True)
    assert BY_NAME["dense"].when(kernel, problem_of(q, k, v, mask), facts) == NO


def test_where_a_copy_is_worth_trying_all_three_are_copied():
    kernel = made_up("copies", lambda *_: None, dense_last_dim=True, contiguous=True)
    given = [x.repeat(1, 1, 4, 1).transpose(1, 2).contiguous().transpose(1, 2) for x in tensors(("contiguous",) * 3)]
    p, facts = problem_of(*given), facts_of(*given)
    assert BY_NAME["contiguous"].when(kernel, p, facts) == OPTIONAL
    assert received(kernel, given, p, facts)[0] == (False,) * 3


# --- blocks


def test_blocks_are_as_large_as_the_device_wants_them():
    """On CUDA a block takes a share of the memory that a kernel may use; a cache's worth would be thousands of launches."""
    p = problem(device="cuda", dtype="bfloat16", batch=4, q_heads=32, kv_heads=32, q_len=4096, kv_len=4096, head_dim=128,
                head_dim_v=128)  # fmt: skip
    meta = [torch.empty(4, 32, 4096, 128, dtype=HALF, device="meta") for _ in range(2)]
    large = list(blocks.blocks_of(*meta, Arguments(0.1), target=blocks.chunk_bytes(p)))
    small = list(blocks.blocks_of(*meta, Arguments(0.1), target=blocks.chunk_bytes(p.replace(device="cpu"))))
    assert len(large) < 50 < 1000 < len(small)
    rows, batch, heads = (getattr(large[0], name) for name in ("rows", "batch", "heads"))
    scores = 4 * 4096 * (rows.stop - rows.start) * (batch.stop - batch.start) * (heads.stop - heads.start)
    assert 3 * scores <= p.memory_limit


def test_chunks_ask_for_the_size_of_their_device(monkeypatch):
    """The conversion itself cuts by the device's size, forwards and where autograd follows."""
    seen = []
    monkeypatch.setattr(blocks, "blocks_of", lambda q, k, a, sizes=None, target=None: seen.append(target) or iter(()))
    monkeypatch.setattr(blocks, "_joined", lambda parts: None)
    q = torch.zeros(1, 1, 4, 8)
    for device, needs_grad in product(("cpu", "cuda"), (False, True)):
        p = problem(device=device, q_len=4, kv_len=4, head_dim=8, head_dim_v=8, needs_grad=needs_grad)
        step = blocks.chunks(lambda *_: q, None, p, ordinary_facts(p))  # type: ignore[arg-type]
        step(q, q, q, None, Arguments(0.1, needs_grad=needs_grad))
        assert seen.pop() == blocks.chunk_bytes(p) == (2**25 if device == "cuda" else blocks.CHUNK_BYTES)


def test_what_fits_is_not_cut():
    """Scores that fit are not cut at all: up to 32 MiB on CUDA."""
    kernel = next(d.kernel for d in candidates.decisions(problem(), H100, Settings()) if isinstance(d, Accepted) and
                  d.kernel.name == "sdpa_math")  # fmt: skip
    p = problem(device="cuda", q_len=1024, kv_len=1024, q_heads=8, kv_heads=8)
    assert blocks.when_chunks(kernel, p, ordinary_facts(p)) == NO
    assert blocks.when_chunks(kernel, p.replace(device="cpu"), ordinary_facts(p)) == OPTIONAL
    assert blocks.when_chunks(kernel, p.replace(q_len=1200), ordinary_facts(p)) == OPTIONAL
