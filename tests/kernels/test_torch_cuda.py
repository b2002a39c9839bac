"""torch's CUDA rows, beyond the grid: rows that see nothing, biases that lie badly, limits of head dims."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import library_grid
import pytest
import torch
from building import problem_of, qkv
from fakes import problem
from library_grid import installed, row_of, silicon
from stubs import torch_cuda, torch_lower, xformers

from fastattn.environment.device import Device
from fastattn.environment.settings import Settings
from fastattn.kernels.libraries import availability
from fastattn.planning import candidates, default_choice
from fastattn.planning.decision import Rejected
from fastattn.problems.dense_masks import as_bias, sees_nothing

INF = float("inf")
WITH_MASK = [
    (torch_cuda.STUB, "torch_efficient"),
    (torch_cuda.STUB, "torch_cudnn"),
    (torch_lower.STUB, "aten_efficient"),
]


@pytest.mark.parametrize("stub, name", WITH_MASK)
def test_a_row_whose_last_key_the_triangle_hides_has_no_log_sum_exp(stub, name, monkeypatch):
    mask = torch.rand(2, 4, 19, 19) < 0.7
    mask[..., :3] = False
    monkeypatch.setattr(library_grid, "mask_of", lambda *_: mask)
    call = {"mask": ("bhqk", torch.bool), "is_causal": True, "return_lse": True}
    with installed(stub, monkeypatch):
        assert library_grid.run(row_of(stub, name), stub, call) == []


GROUPS = {"hq": 8, "hkv": 2, "sq": 5}
OF_GROUPS = ({**GROUPS, "mask": ("1hqk", "grad"), "grad": True}, {**GROUPS, "is_causal": True, "return_lse": True})


@pytest.mark.parametrize("torch_version", ["2.13.0", "2.14.0+cu130", "2.15.0"])
@pytest.mark.parametrize("stub, name", [(torch_cuda.STUB, "torch_efficient"), (torch_lower.STUB, "aten_efficient")])
def test_the_efficient_kernel_takes_fewer_kv_heads_since_torch_2_14(stub, name, torch_version, monkeypatch):
    """The stub refuses them before that, as the kernel does."""
    monkeypatch.setattr(availability, "library_version", cache(lambda _: torch_version))
    for call in OF_GROUPS:
        with installed(stub, monkeypatch):
            assert library_grid.run(row_of(stub, name), stub, call) == []
    p = problem(device="cuda", dtype="float16", q_heads=8, kv_heads=2, causal="top_left")
    found = candidates.decide(row_of(stub, name), p, silicon(stub, name), Settings(kernels=(f"+{name}",)))
    assert [d.name for d in found] == [f"{name}+gqa_expand" if torch_version < "2.14" else name]


@pytest.mark.parametrize("letters, kind", [("b11k", torch.bool), ("bhqk", torch.bool), ("1hqk", "grad")])
@pytest.mark.parametrize(
    "stub, name",
    [(torch_cuda.STUB, "torch_efficient"), (torch_lower.STUB, "aten_efficient"), (xformers.STUB, "xformers_cutlass")],
)
def test_a_query_group_may_be_folded_and_then_no_key_is_repeated(stub, name, letters, kind, monkeypatch):
    """Decoding with grouped queries and a mask, by kernels that take as many kv heads as queries: the clock decides."""
    call = {
        "hq": 8,
        "hkv": 2,
        "sq": 1,
        "skv": 33,
        "mask": (letters, kind),
        "grad": kind == "grad",
        "return_lse": kind != "grad",
    }
    call["dtype"] = torch.float32 if kind == "grad" else torch.float16
    with installed(stub, monkeypatch):
        assert library_grid.run(row_of(stub, name), stub, call) == []  # every candidate of it
        p = problem(device="cuda", dtype="float16", q_heads=8, kv_heads=2, q_len=1, mask="bool", mask_shape=letters)
        found = candidates.decide(row_of(stub, name), p, silicon(stub, name), Settings(kernels=(f"+{name}",)))
    assert [d.conversions[-1] for d in found] == ["gqa_fold", "gqa_expand"]


def test_what_a_mask_and_a_band_leave_no_key():
    mask = torch.zeros(1, 1, 3, 4)
    mask[..., 0, 0] = mask[..., 1, :2] = -INF
    assert sees_nothing(mask, 3, 4).tolist() == [[[False, False, False]]]
    assert sees_nothing(mask, 3, 4, upper=0).tolist() == [[[True, True, False]]]
    assert sees_nothing(mask[0, 0], 3, 4, lower=-1, upper=0).tolist() == [[[True, True, False]]]
    assert sees_nothing(torch.full((1, 1, 1, 1), -INF), 3, 4).tolist() == [[[True, True, True]]]


@pytest.mark.parametrize(
    "lies", ["as it should", "odd rows", "odd start", "last dim strided", "one key", "one row", "two dims"]
)
def test_fault_04_a_bias_is_copied_where_vectors_cannot_read_it(lies):
    """A bias that vectors cannot read as it lies is copied to rows that they can, in the dtype of the queries."""
    made = {
        "as it should": torch.randn(2, 1, 5, 40)[..., :33],
        "odd rows": torch.randn(2, 1, 5, 33),
        "odd start": torch.randn(2, 1, 5, 41)[..., 1:34],
        "last dim strided": torch.randn(2, 1, 33, 5).mT,
        "one key": torch.randn(2, 1, 5, 1),
        "one row": torch.randn(2, 1, 1, 33),
        "two dims": torch.randn(5, 33),
    }[lies]
    bias = as_bias(made, torch.empty(0, dtype=made.dtype), (2, 3, 5, 33))
    assert (bias.data_ptr() == made.data_ptr()) == (lies == "as it should")
    torch_cuda.check_bias(bias, made, (2, 3, 5, 33))
    assert torch.equal(bias, made.expand(2, 3, 5, 33))
    assert as_bias(made, torch.empty(0, dtype=torch.float16), (2, 3, 5, 33)).dtype is torch.float16


def reasons(stub, name, capability=90, cudnn=92300, changes=None, torch_version=torch.__version__, **made):
    """Why a row refuses a call, on that silicon."""
    grad, changes = made.pop("grad", False), changes or {}
    q, k, v = qkv(dtype=torch.bfloat16, grad=grad, **{"sq": 4, **made})
    p = problem_of(q, k, v).replace(device="cuda", threads=0, **changes)
    device = silicon(stub, name)
    device = type(device)("cuda", "made-up GPU", capability, torch=torch_version, cuda="12.8", cudnn=cudnn)
    [found, *_] = candidates.decide(row_of(stub, name), p, device, Settings(kernels=(f"+{name}",)))
    return found.reasons if isinstance(found, Rejected) else ()


@pytest.mark.parametrize(("head_dims", "capability", "cudnn", "grad", "can"), [
    ((128, 128), 80, 91900, True, True),
    ((192, 128), 90, 91900, True, True),
    ((192, 128), 90, 91000, False, False),
    ((192, 128), 89, 91900, False, False),
    ((192, 192), 90, 91900, False, False),
    ((256, 256), 90, 92300, True, True),
    ((256, 256, "2.13.0"), 90, 92300, False, False),
    ((256, 256), 90, 92200, False, False),
    ((256, 128), 90, 92300, False, True),
    ((256, 128), 90, 92300, True, False),
    ((256, 256), 107, 92500, False, False),
    ((256, 256), 120, 92600, False, False),
    ((264, 264), 90, 92600, False, False),
])  # fmt: skip
def test_cudnn_takes_the_head_dims_that_torch_lets_it_take(head_dims, capability, cudnn, grad, can, monkeypatch):
    with installed(torch_cuda.STUB, monkeypatch):
        d, dv, torch_version = (*head_dims, "2.14.1")[:3]
        found = reasons(
            torch_cuda.STUB, "torch_cudnn", capability, cudnn, torch_version=torch_version, d=d, dv=dv, grad=grad
        )
    assert (not found) == can, found


@pytest.mark.parametrize(("head_dim", "dropout", "can"), [
    (192, True, True), (200, False, False), (256, False, True), (256, True, False),
])  # fmt: skip
def test_flash_trains_wide_heads_on_small_silicon_as_torch_lets_it(head_dim, dropout, can, monkeypatch):
    for stub, name in ((torch_cuda.STUB, "torch_flash"), (torch_lower.STUB, "aten_flash")):
        with installed(stub, monkeypatch):
            found = reasons(stub, name, 89, d=head_dim, grad=True, changes={"dropout": dropout})
            assert (not found) == can, found
            assert not reasons(stub, name, 90, d=head_dim, grad=True, changes={"dropout": dropout})


def test_another_flash_implementation_drops_nothing(monkeypatch):
    for stub, name in ((torch_cuda.STUB, "torch_flash"), (torch_lower.STUB, "aten_flash")):
        with installed(stub, monkeypatch):
            [reason] = reasons(stub, name, changes={"dropout": True, "flash_impl": "FA3"})
        assert "FA3" in reason


def test_bfloat16_needs_sm80(monkeypatch):
    for stub, name in WITH_MASK[:1] + WITH_MASK[2:]:
        with installed(stub, monkeypatch):
            assert any("bfloat16 on sm75" in reason for reason in reasons(stub, name, 75))


@pytest.mark.parametrize(("stub", "name"), WITH_MASK)
def test_a_float32_mask_beside_half_inputs_is_not_cast(stub, name, monkeypatch):
    """It would be rounded, and what is merely very low (finfo.min) would become hidden."""
    with installed(stub, monkeypatch):
        found = reasons(stub, name, changes={"mask": "float32", "mask_shape": "11qk"})
    assert any("float32 mask beside" in reason for reason in found), found


def test_fault_09_cudnn_plans_for_each_length_where_the_default_would_not(monkeypatch):
    """Where lengths change, a kernel that plans anew for each is used only where torch's default plans as well."""
    with installed(torch_cuda.STUB, monkeypatch):
        for capability, can in ((80, False), (89, False), (90, True), (100, True)):
            found = reasons(torch_cuda.STUB, "torch_cudnn", capability, changes={"lengths": "kv"})
            assert (not found) == can, (capability, found)


def test_the_default_runs_what_torch_was_told_to_prefer(monkeypatch):
    h100 = Device("cuda", "made-up H100", 90, cuda="12.8", cudnn=92300)
    p = problem(device="cuda", dtype="bfloat16", head_dim=64)
    with installed(torch_cuda.STUB, monkeypatch):
        assert default_choice.default_runs(p, h100) == "torch_cudnn"
        monkeypatch.setenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
        assert default_choice.default_runs(p, h100) == "torch_flash"
        assert default_choice.default_runs(p, replace(h100, capability=80)) == "torch_flash"


def test_the_default_is_not_served_where_it_would_run_a_known_fault(monkeypatch):
    """A window becomes a mask for F.sdpa, and cuDNN's backward is wrong with masks at such lengths."""
    h100 = Device("cuda", "made-up H100", 90, cuda="12.8", cudnn=92300)
    for change in (
        {"window": (8, 8)},
        {"causal": "bottom_right", "kv_len": 1408},
        {"mask": "bool", "mask_shape": "bhqk"},
    ):
        p = problem(
            device="cuda", dtype="bfloat16", head_dim=64, needs_grad=True, q_len=704, **{"kv_len": 704, **change}
        )
        found = candidates.decisions(p, h100, Settings())
        assert "NaN in the gradient of q" in (default_choice.why_not_default(p, h100, Settings(), found) or ""), change
    p = problem(device="cuda", dtype="bfloat16", head_dim=64, needs_grad=True, q_len=704, kv_len=704, causal="top_left")
    assert default_choice.why_not_default(p, h100, Settings(), candidates.decisions(p, h100, Settings())) is None


def test_the_default_is_not_served_where_it_would_raise(monkeypatch):
    """Its memory-efficient kernel takes no float32 mask beside half inputs; without cuDNN it is what F.sdpa runs."""
    a100 = Device("cuda", "made-up A100", 80, cuda="12.8", cudnn=92300)
    p = problem(device="cuda", dtype="bfloat16", head_dim=64, mask="float32", mask_shape="bhqk")
    found = candidates.decisions(p, a100, Settings())
    assert default_choice.default_runs(p, a100) == "torch_efficient"
    assert "float32 mask" in (default_choice.why_not_default(p, a100, Settings(), found) or "")
    assert [c.kernel.name for c in default_choice.fallbacks(p, a100, Settings(), found)] == ["sdpa_math"]
