"""xFormers and MSLK, beyond the grid: the operator of each row, a graph for the mask alone, limits of silicon and of grids."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import stubs
import torch
from building import expect, hold, mask_of, problem_of, qkv
from library_grid import installed, row_of, rows_of
from stubs.mslk import STUB as MSLK
from stubs.xformers import OPERATORS, STUB

from fastattn import masks
from fastattn.environment.device import Device
from fastattn.environment.settings import Settings
from fastattn.planning import binding, candidates
from fastattn.planning.decision import Rejected

HALF = torch.bfloat16


def stub_of(name):
    return MSLK if name.startswith("mslk") else STUB


def decide(name, capability=90, mask=None, changes=None, **made):
    q, k, v = qkv(**{"dtype": HALF, "d": 64, **made})
    p = problem_of(q, k, v, mask).replace(device="cuda", threads=0, **(changes or {}))
    silicon = Device("cuda", "made-up GPU", capability, cuda="12.8", cudnn=92300)
    found = candidates.decide(row_of(stub_of(name), name), p, silicon, Settings(kernels=(f"+{name}",)), certain=True)
    return found[0], p, (q, k, v)


NAMED = {"splitk": "triton_splitk", "blackwell": "cutlass_blackwell"}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kernel", [*rows_of(STUB), *rows_of(MSLK)], ids=lambda k: k.name)
def test_each_row_pins_its_own_operator(kernel, grad, monkeypatch):
    if grad and not kernel.grad:
        pytest.skip("no backward")
    library, name = kernel.name.split("_")
    with installed(stub_of(library), monkeypatch):
        found, p, given = decide(kernel.name, 100 if name == "blackwell" else 90, grad=grad)
        stubs.calls.clear()
        binding.bind(found, p, None)(*given, None)
    [(_, told)] = stubs.calls
    pinned = told["op"] if grad else (told["op"],)
    wanted = NAMED.get(name, name)
    assert [op.kind.removeprefix("mslk_") for op in pinned] == [wanted] * len(pinned)


def test_a_mask_alone_gets_its_gradient(monkeypatch):
    """xFormers looks at q, k and v alone: the gradient would be None without a word."""
    q, k, v = qkv(dtype=HALF, d=64)
    mask = mask_of("bhqk", HALF, 2, 4, 19, 19).requires_grad_()
    with installed(STUB, monkeypatch):
        found, p, _ = decide("xformers_cutlass", mask=mask)
        assert p.needs_grad and p.mask_grad
        out = binding.bind(found, p, None)(q, k, v, mask)
        grad = torch.randn_like(out)
        [given] = torch.autograd.grad(out, mask, grad)
    wide = mask.detach().double().requires_grad_()
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), wide)
    [wanted] = torch.autograd.grad(exact, wide, grad.double())
    assert torch.allclose(given.double(), wanted, atol=2e-2) and given.abs().max() > 0


def test_inputs_that_ask_for_a_graph_may_be_used_without_one(monkeypatch):
    """Under no_grad a pinned operator is called without a backward: split-K has none."""
    q, k, v = qkv(dtype=HALF, d=64, grad=True)
    with torch.no_grad(), installed(STUB, monkeypatch):
        p = problem_of(q, k, v).replace(device="cuda", threads=0)
        [found] = candidates.decide(
            row_of(STUB, "xformers_splitk"), p, Device("cuda", "a GPU", 90), Settings(), certain=True
        )
        hold(expect(q, k, v), binding.bind(found, p, None), q, k, v)


def test_an_operator_that_was_not_built_is_a_reason(monkeypatch):
    monkeypatch.setattr(OPERATORS["flash3"].FwOp, "is_available", lambda: False, raising=False)
    with installed(STUB, monkeypatch):
        found, _, _ = decide("xformers_flash3")
        assert isinstance(found, Rejected)
        assert "its flash3 operator was not built, and the package flash_attn_3 is not there" in found.reasons[0]
        assert not isinstance(decide("xformers_flash")[0], Rejected)


@pytest.mark.parametrize("library", ["xformers", "mslk"])
def test_split_k_says_that_it_is_there_without_triton(library, monkeypatch):
    with installed(stub_of(library), monkeypatch):
        monkeypatch.setitem(sys.modules, "triton", None)
        found, _, _ = decide(f"{library}_splitk")
        assert isinstance(found, Rejected) and "triton is not there" in found.reasons[0]


def test_blackwell_without_its_kernels_is_a_reason(monkeypatch):
    with installed(MSLK, monkeypatch):
        monkeypatch.setattr(torch.ops, "mslk", SimpleNamespace())  # MSLK_PYTHON_ONLY=1
        found, _, _ = decide("mslk_blackwell", 100)
        assert isinstance(found, Rejected) and "its kernels for sm100 are not loaded" in found.reasons[0]


@pytest.mark.parametrize(("name", "can", "cannot"), [
    ("xformers_flash", (80, 90, 120), (75,)),
    ("xformers_flash3", (80, 90), (75, 100, 120)),
    ("xformers_cutlass", (80, 90), (100, 120)),  # no dense bias at all on Blackwell
    ("xformers_splitk", (80, 100), (75,)),
    ("mslk_flash3", (80, 90), (75, 100, 120)),
    ("mslk_blackwell", (100,), (90, 103, 110, 120)),  # built for sm100a alone
])  # fmt: skip
def test_silicon(name, can, cannot, monkeypatch):
    with installed(stub_of(name), monkeypatch):
        assert not any(isinstance(decide(name, capability)[0], Rejected) for capability in can)
        for capability in cannot:
            assert any(f"capability {capability}" in reason for reason in decide(name, capability)[0].reasons)


def test_fault_06_limits_of_grids(monkeypatch):
    """A batch or a number of heads beyond a kernel's grid on a GPU is refused, with both numbers."""
    with installed(STUB, monkeypatch):
        for name in ("xformers_flash", "xformers_flash3", "xformers_cutlass"):
            assert "batch 65536 > 65535" in decide(name, changes={"batch": 65536})[0].reasons
        many = decide("xformers_splitk", changes={"batch": 40_000})[0].reasons
    assert many == ("batch 40000 times 4 heads > 65535, a grid dimension",)


def test_flash3_trains_from_64_on(monkeypatch):
    with installed(STUB, monkeypatch):
        [reason] = decide("xformers_flash3", d=40, grad=True)[0].reasons
        assert reason == "training with head dims 40 and 40 < 64"
        assert not isinstance(decide("xformers_flash3", d=40)[0], Rejected)


@pytest.mark.parametrize(("head_dim", "width"), [(80, 128), (96, 128), (64, 64), (129, 256), (8, 16)])
@pytest.mark.parametrize("library", ["xformers", "mslk"])
def test_split_keys_are_padded_to_the_next_width_that_it_has(library, head_dim, width, monkeypatch):
    stub = stub_of(library)
    with installed(stub, monkeypatch):
        found, p, (q, k, v) = decide(f"{library}_splitk", d=head_dim, sq=1, skv=33)
        assert found.conversions == (("head_dim_pad",) if width != head_dim else ())
        stubs.calls.clear()
        out = binding.bind(found, p, None)(q, k, v, None)
    assert out.shape == q.shape and {told["query"].shape[-1] for _, told in stubs.calls} == {width}
    with installed(stub, monkeypatch):
        assert "head_dim 520 > 512" in " ".join(decide(f"{library}_splitk", d=520, sq=1)[0].reasons)


def test_cutlass_takes_float32_in_fours(monkeypatch):
    with installed(STUB, monkeypatch):
        for dtype, head_dim, pads in ((torch.float32, 20, False), (torch.float32, 22, True), (HALF, 20, True)):
            found, _, _ = decide("xformers_cutlass", d=head_dim, dtype=dtype)
            assert ("head_dim_pad" in found.conversions) is pads


PACKED = masks.Document([7, 9, 3])
OWN = masks.Packed([7, 9, 3], [9, 9, 1], "bottom_right")


@pytest.mark.parametrize(("name", "mask", "more", "found"), [
    ("xformers_flash", masks.Causal() & PACKED, {}, ("packed",)),
    ("xformers_flash", OWN, {}, ("packed",)),
    ("xformers_flash", PACKED & masks.Window(3, 2), {}, "packed sequences with a window (3, 2) that no triangle ends"),
    ("xformers_cutlass", masks.Causal() & PACKED, {}, ("packed",)),
    ("xformers_cutlass", masks.Causal() & PACKED, {"lse": True}, ("mask_dense", "mask_additive")),
    ("xformers_cutlass", masks.Causal() & masks.Window(3, 0) & PACKED, {}, ("mask_dense", "mask_additive")),
    ("xformers_cutlass", OWN, {}, ("mask_dense", "mask_additive")),
    ("xformers_splitk", PACKED, {}, ("mask_dense", "mask_additive")),
    ("mslk_blackwell", PACKED, {}, "a mask is not supported (bool 11qk)"),
], ids=lambda x: getattr(x, "__name__", None) or str(x))  # fmt: skip
def test_packed_sequences_are_told_where_they_can_be(name, mask, more, found, monkeypatch):
    """Cutlass: what it is not told it takes as a mask."""
    with installed(stub_of(name), monkeypatch):
        decision, _, _ = decide(name, 100 if name == "mslk_blackwell" else 90, mask, more, b=1, sq=19)
    if isinstance(found, str):
        assert found in " ".join(decision.reasons)
    else:
        assert decision.conversions == found


def test_a_library_without_those_classes_serves_all_but_packed_sequences(monkeypatch):
    with installed(STUB, monkeypatch):
        monkeypatch.delattr(sys.modules["xformers.ops.fmha"].attn_bias, "_SeqLenInfo")
        found, p, given = decide("xformers_flash")
        binding.bind(found, p, None)(*given, None)
        found, p, given = decide("xformers_flash", mask=PACKED, b=1)
        with pytest.raises(AttributeError, match="_SeqLenInfo"):
            binding.bind(found, p, None)(*given, PACKED)
