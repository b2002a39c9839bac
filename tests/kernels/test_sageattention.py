"""SageAttention's adapters: what the grid of test_libraries cannot ask."""

from __future__ import annotations

import inspect
import sys
from types import ModuleType

import pytest
import torch
from building import problem_of, qkv
from library_grid import installed
from stubs import module, sage_2

from fastattn.environment.device import Device
from fastattn.environment.settings import Settings
from fastattn.kernels.adapters.sageattention import KERNELS
from fastattn.kernels.libraries import availability
from fastattn.planning import candidates

ROWS = {kernel.name: kernel for kernel in KERNELS}


def reasons(name: str, capability: int = 90, d: int = 64, **options) -> str:
    q, k, v = qkv(d=d, sq=64, dtype=torch.float16)
    p = problem_of(q, k, v, **options).replace(device="cuda", threads=0)
    device = Device("cuda", "made-up GPU", capability)
    return " ".join(
        r for row in candidates.decide(ROWS[name], p, device, Settings()) for r in getattr(row, "reasons", ())
    )


@pytest.mark.parametrize("name", ROWS)
def test_fault_16_it_needs_a_number(name):
    """What quantises its inputs is considered only where the caller gives a number for the accuracy."""
    assert "quantises its inputs" in reasons(name)
    assert "quantises its inputs" not in reasons(name, accuracy=0.1)


def test_each_function_is_for_its_gpus():
    served = {
        capability: {name for name in ROWS if "capability" not in reasons(name, capability, accuracy=0.1)}
        for capability in (75, 80, 89, 90, 100, 120)
    }
    assert served == {
        75: set(),
        80: {"sage_1", "sage_2_triton", "sage_2_fp16", "sage_2_fp16_in_fp16", "sage_2_fp16_mixed"},
        89: {"sage_1", "sage_2_triton", "sage_2_fp16", "sage_2_fp8"},
        90: {"sage_1", "sage_2_triton", "sage_2_fp16", "sage_2_fp8_sm90"},
        100: {"sage_1", "sage_2_triton"},
        120: {"sage_2_fp8_sm120", "sage_3"},
    }


def library(**changes) -> ModuleType:
    made = sage_2._modules()["sageattention.core"]
    return module("sageattention", core=module("sageattention.core", **{**vars(made), **changes}))


def without_a_mask() -> object:
    def sageattn_qk_int8_pv_fp16_triton(
        q, k, v, tensor_layout="HND", quantization_backend="triton", is_causal=False, sm_scale=None, smooth_k=True,
        return_lse=False, **kwargs,
    ):  # fmt: skip
        raise AssertionError("its tail is not masked")

    return sageattn_qk_int8_pv_fp16_triton


def test_a_2_2_0_of_before_august_2025_is_told_by_its_signature(monkeypatch):
    old = without_a_mask()
    assert "attn_mask" not in inspect.signature(old).parameters
    with installed(sage_2.STUB, monkeypatch):
        monkeypatch.setitem(sys.modules, "sageattention", library(sageattn_qk_int8_pv_fp16_triton=old))
        why = availability.why_unavailable(ROWS["sage_2_triton"])
        assert why and "takes no attn_mask: another version is needed" in why
        assert availability.why_unavailable(ROWS["sage_2_fp16"]) is None


def test_an_extension_that_was_not_built_is_a_reason(monkeypatch):
    with installed(sage_2.STUB, monkeypatch):
        monkeypatch.setitem(sys.modules, "sageattention", library(SM90_ENABLED=False))
        assert "SM90_ENABLED is False" in str(availability.why_unavailable(ROWS["sage_2_fp8_sm90"]))
        assert availability.why_unavailable(ROWS["sage_2_fp16"]) is None


def test_version_1_and_2_share_a_distribution(monkeypatch):
    with installed(sage_2.STUB, monkeypatch):
        assert (
            availability.why_unavailable(ROWS["sage_1"])
            == "package sageattention 2.2.0 >= 2.0, which is not known to work"
        )


def test_a_build_without_its_extension_says_so_and_not_that_it_imports_itself(monkeypatch, tmp_path):
    (tmp_path / "sageattention").mkdir()
    (tmp_path / "sageattention" / "__init__.py").write_text("from .core import sageattn\n")
    (tmp_path / "sageattention" / "core.py").write_text("from . import _fused\n")
    with installed(sage_2.STUB, monkeypatch):
        monkeypatch.delitem(sys.modules, "sageattention")
        monkeypatch.delitem(sys.modules, "sageattention.core", raising=False)
        monkeypatch.syspath_prepend(tmp_path)
        why = str(availability.why_unavailable(ROWS["sage_2_triton"]))
        assert "its extension sageattention._fused was not built" in why and "circular" not in why
