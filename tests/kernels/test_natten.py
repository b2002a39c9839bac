"""NATTEN beyond the grid: its widths on Hopper, determinism, and a build without kernels."""

from __future__ import annotations

import sys

import pytest
import stubs
import torch
from building import expect, hold, problem_of, qkv
from library_grid import installed, row_of, silicon
from stubs import natten

from fastattn.environment.settings import Settings
from fastattn.kernels.libraries import availability
from fastattn.planning import binding, candidates
from fastattn.planning.decision import Rejected


def decided(name, q, k, v, **changes):
    p = problem_of(q, k, v).replace(device="cuda", threads=0, **changes)
    return p, candidates.decide(row_of(natten.STUB, name), p, silicon(natten.STUB, name), Settings())[0]


@pytest.mark.parametrize(
    "d, dv, width", [(32, 32, 32), (33, 33, 64), (40, 64, 64), (64, 24, 64), (100, 9, 128), (250, 9, 256)]
)
def test_hopper_pads_to_a_width_it_is_built_for(monkeypatch, d, dv, width):
    with installed(natten.STUB, monkeypatch):
        q, k, v = qkv(b=1, hq=2, d=d, dv=dv, dtype=torch.bfloat16)
        p, found = decided("natten_hopper", q, k, v)
        stubs.calls.clear()
        hold(expect(q, k, v), binding.bind(found, p, None), q, k, v)
        assert stubs.calls[-1][1]["query"].shape[3] == width


@pytest.mark.parametrize(
    "d, grad, reason", [(72, False, "none of 32, 64, 128"), (250, True, "> 128"), (257, False, "none")]
)
def test_hopper_refuses_what_it_is_not_built_for(monkeypatch, d, grad, reason):
    with installed(natten.STUB, monkeypatch):
        _, found = decided("natten_hopper", *qkv(b=1, d=d, dtype=torch.float16, grad=grad))
        assert isinstance(found, Rejected) and any(reason in why and str(d) in why for why in found.reasons), found


@pytest.mark.parametrize("name, splits", [("natten_cutlass", 1), ("natten_blackwell", None)])
def test_a_deterministic_backward_does_not_split_the_keys(monkeypatch, name, splits):
    with installed(natten.STUB, monkeypatch):
        q, k, v = qkv(d=32, dtype=torch.float16, grad=True)
        p, found = decided(name, q, k, v, deterministic=True)
        stubs.calls.clear()
        binding.bind(found, p, None)(q, k, v, None)
        assert stubs.calls[-1][1]["backward_kv_splits"] == splits


@pytest.mark.parametrize("name, capability", [("natten_cutlass", 52), ("natten_hopper", 100), ("natten_blackwell", 90)])
def test_each_backend_is_for_its_silicon(monkeypatch, name, capability):
    with installed(natten.STUB, monkeypatch):
        monkeypatch.setitem(natten.CAPABILITIES, name, capability)
        _, found = decided(name, *qkv(d=32, dtype=torch.float16))
        assert isinstance(found, Rejected) and f"capability {capability}" in found.reasons[0]


def test_a_build_without_kernels_is_a_reason(monkeypatch):
    with installed(natten.STUB, monkeypatch):
        sys.modules["natten"].HAS_LIBNATTEN = False
        assert "without libnatten" in (availability.why_unavailable(row_of(natten.STUB, "natten_cutlass")) or "")


def test_a_libnatten_that_cannot_be_loaded_says_why(monkeypatch):
    """natten itself swallows it, and goes on without."""
    with installed(natten.STUB, monkeypatch):
        broken = type("Broken", (), {"find_spec": staticmethod(_undefined_symbol)})
        monkeypatch.setattr(sys, "meta_path", [broken, *sys.meta_path])
        sys.modules["natten"].HAS_LIBNATTEN, sys.modules["natten"].__path__ = False, []
        why = availability.why_unavailable(row_of(natten.STUB, "natten_cutlass")) or ""
        assert "undefined symbol: _ZN3c10" in why and "without" not in why


def _undefined_symbol(name, *_):
    if name == "natten.libnatten":
        raise ImportError("libnatten.so: undefined symbol: _ZN3c10")
