"""The grid of calls that every library's rows are held to, over stubs that are installed for a test; and the mutations.

A mutation is one text of an adapter replaced by another: one convention that the adapter no longer keeps. killers.json names
the kernel and the grid call that turn red for each, so that the mutation run need not search; find_killers.py writes it.
"""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import stubs
import torch
from building import corner, expect, facts_of, hold, mask_of, problem_of, qkv

from fastattn.environment.device import Device
from fastattn.environment.settings import Settings
from fastattn.kernels.kernel import Kernel
from fastattn.kernels.libraries import availability, catalogue, import_probe
from fastattn.kernels.limits import OneOf
from fastattn.planning import binding, candidates
from fastattn.planning.decision import Accepted, Rejected
from fastattn.problems.masks import Causal

BR = Causal("bottom_right")
WIDE, TALL = {"sq": 5, "skv": 19}, {"sq": 19, "skv": 5}
# name -> how the tensors are made, the mask (letters, dtype) or a structured one, and the options of the call
GRID: dict[str, dict[str, Any]] = {
    "plain": {},
    "wide": {**WIDE},
    "tall": {**TALL},
    "one_key": {"sq": 7, "skv": 1},
    "batch_of_one": {"b": 1},
    "causal": {"is_causal": True},
    "top_left_wide": {**WIDE, "is_causal": True},
    "top_left_tall": {**TALL, "is_causal": True},
    "bottom_right_wide": {**WIDE, "mask": BR},
    "bottom_right_tall": {**TALL, "mask": BR},
    "decode": {"sq": 1, "skv": 33, "mask": BR},
    "window": {"window": (3, 2)},
    "window_left": {"window": (3, -1)},
    "window_right": {"window": (-1, 2)},
    "window_self": {"window": (0, 0)},
    "window_causal": {"window": (3, 0), "is_causal": True},
    "window_wide": {**WIDE, "window": (3, 2), "mask": BR},
    "window_tall": {**TALL, "window": (2, 2), "mask": BR},
    "window_left_past_keys": {**TALL, "window": (6, -1), "mask": BR},
    "softcap": {"softcap": 2.0},
    "gqa": {"hq": 8, "hkv": 2},
    "mqa_causal": {"hq": 4, "hkv": 1, "is_causal": True},
    "gqa_decode": {"hq": 8, "hkv": 2, "sq": 1, "skv": 33},
    "head_dim_20": {"d": 20},
    "head_dim_v": {"d": 16, "dv": 32},
    "head_dim_v_small": {"d": 32, "dv": 16},
    "scale": {"scale": 0.7},
    "scale_zero": {"scale": 0.0},
    "scale_negative": {"scale": -0.4},
    "lse": {"return_lse": True},
    "lse_empty_rows": {**TALL, "hq": 4, "hkv": 2, "mask": BR, "return_lse": True},
    "lse_scale": {"return_lse": True, "scale": 0.7},
    "bool_mask": {"mask": ("bhqk", torch.bool)},
    "bool_mask_keys": {"mask": ("b11k", torch.bool), "skv": 33},
    "float_mask": {"mask": ("1hqk", None), "skv": 33},
    "mask_and_causal": {"mask": ("11qk", torch.bool), "is_causal": True},
    "mask_grad": {"mask": ("bhqk", "grad"), "grad": True},
    "grad": {"grad": True, "hq": 4, "hkv": 2},
    "grad_causal": {"grad": True, "is_causal": True},
    "grad_bottom_right": {**TALL, "grad": True, "mask": BR},
    "grad_head_dim": {"grad": True, "d": 20},
    "bshd": {"layout": "bshd", **WIDE, "hq": 3},
    "sbhd": {"layout": "sbhd", **WIDE, "hq": 3},
    "packed": {"memory": "packed", "d": 20},
    "packed_dims": {"memory": "packed_dims"},
    "last_stride_2": {"memory": "last_stride_2"},
    "odd_rows": {"memory": "dims_before_rows"},
    "expanded": {"memory": "expanded_heads"},
    "misaligned": {"memory": "misaligned"},
    "float32": {"dtype": torch.float32},
}  # fmt: skip
MADE = ("b", "hq", "hkv", "sq", "skv", "d", "dv", "memory", "layout", "dtype", "grad")
STUBS = stubs.all_stubs()


def sizes_for(kernel: Kernel) -> dict[str, int]:
    """The head_dim of a grid call, where a kernel has but a few."""
    wanted = [need.values for need in kernel.needs if isinstance(need, OneOf) and need.field == "head_dim"]
    return {"d": wanted[0][0]} if wanted else {}


def misaligned(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, one element off a multiple of 16 bytes."""
    room = x.new_empty(x.numel() + 1)
    return room[1:].view(x.shape).copy_(x)


@contextmanager
def installed(stub: stubs.Stub, monkeypatch):
    """Its library is found, at its version, and imported without a child process."""
    for name, made in stub.modules().items():
        monkeypatch.setitem(sys.modules, name, made)
    stub.patch(monkeypatch)
    known = catalogue.library_of(stub.library)
    real = catalogue.installed_distribution
    monkeypatch.setattr(
        catalogue, "installed_distribution", lambda lib: (stub.library, stub.version) if lib is known else real(lib)
    )
    monkeypatch.setattr(import_probe, "why_import_crashes", lambda *_: None)
    forget()
    try:
        yield
    finally:
        forget()


def forget() -> None:
    availability.forget_libraries()


def silicon(stub: stubs.Stub, kernel: str) -> Device:
    return Device("cuda", "made-up GPU", stub.capabilities.get(kernel, stub.capability), cuda="12.8", cudnn=92300)


def run(kernel: Kernel, stub: stubs.Stub, case: dict[str, Any], dtype: torch.dtype | None = None) -> list[str]:
    """Hold every candidate of a kernel for a call to float64; the reasons where there is none."""
    torch.manual_seed(0)
    options = {k: v for k, v in case.items() if k not in (*MADE, "mask")}
    made = {"dtype": dtype or getattr(torch, kernel.dtypes[0]), **sizes_for(kernel), **stub.sizes}
    made |= {k: v for k, v in case.items() if k in MADE}
    off_by_one = made.get("memory") == "misaligned"
    q, k, v = qkv(**{**made, "memory": "contiguous"} if off_by_one else made)
    if off_by_one:
        q, k, v = (misaligned(x) for x in (q, k, v))
    mask, layout = case.get("mask"), case.get("layout", "bhsd")
    if isinstance(mask, tuple):
        letters, kind = mask
        b, h, s, kv_len = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
        mask = mask_of(letters, kind if isinstance(kind, torch.dtype) else made["dtype"], b, h, s, kv_len)
        mask = mask.requires_grad_() if kind == "grad" else mask
    if kernel.approximate:
        options["accuracy"] = 0.5
    p = problem_of(q, k, v, mask, layout, **options).replace(device="cuda", threads=0)
    facts = facts_of(q, k, v, mask, layout, **options)
    settings = Settings(kernels=(f"+{kernel.name}",))
    found = candidates.decide(kernel, p, silicon(stub, kernel.name), settings, facts=facts)
    if isinstance(found[0], Rejected):
        return list(found[0].reasons)
    asked = {name: options[name] for name in ("scale", "window", "softcap") if name in options}
    want = expect(q, k, v, mask, layout=layout, corners=corner(mask, options.get("is_causal", False)), **asked)
    for candidate in found:
        assert isinstance(candidate, Accepted)
        call = binding.bind(candidate, p, options.get("scale"), facts, structured=isinstance(mask, Causal))
        before = [x.detach().clone() for x in (q, k, v)]
        rounds = kernel.approximate or (
            kernel.unfused and made["dtype"].itemsize == 2
        )  # scores to q's dtype, as plain matmul
        rung = "dtype" if rounds else "exact"
        dense = mask if isinstance(mask, torch.Tensor) else None
        hold(want, call, q, k, v, dense, rung)
        assert isinstance(call(q, k, v, dense), tuple) is p.lse, (
            "with a log-sum-exp where it is asked for, and only there"
        )
        assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True)), (
            f"{candidate.name} changed its inputs"
        )
    return []


def rows_of(stub: stubs.Stub, file: ModuleType | None = None) -> list[Kernel]:
    """The stubbed kernels of its file; what runs on the CPU is tested with the real thing."""
    found = (file or import_module(f"fastattn.kernels.adapters.{stub.file}")).KERNELS
    return [k for k in found if k.devices == ("cuda",) and (not stub.kernels or k.name in stub.kernels)]


EACH = [pytest.param(stub, kernel.name, id=kernel.name) for stub in STUBS for kernel in rows_of(stub)]


def row_of(stub: stubs.Stub, name: str) -> Kernel:
    return next(kernel for kernel in rows_of(stub) if kernel.name == name)


# --- the mutations

# its name -> (stub, text of the adapter, what replaces it)
MUTATIONS = {
    f"{name}: {text} -> {other}": (stub, text, other)
    for name, stub in stubs.named_stubs().items()
    for text, other in stub.mutations
}
assert len(MUTATIONS) == sum(len(stub.mutations) for stub in STUBS), "two mutations have one name"
KILLERS = Path(__file__).parent / "killers.json"  # mutation -> [kernel, case]


def broken(stub: stubs.Stub, text: str, other: str) -> list[Kernel]:
    """The rows of the stub's adapter with one text replaced."""
    name = f"fastattn.kernels.adapters.{stub.file}"
    source = import_module(name).__spec__.loader.get_source(name)
    assert text in source, "the mutation's text is gone from the adapter"
    module = ModuleType(f"broken_{stub.file}")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(source.replace(text, other), f"<{stub.file} broken>", "exec"), module.__dict__)
    return rows_of(stub, module)


def is_red(kernel: Kernel, stub: stubs.Stub, case: str) -> bool:
    """Whether a call of the grid is wrong, or refused where it should not be, or the other way round."""
    try:
        refused = bool(run(kernel, stub, {**GRID, **stub.cases}[case]))
    except Exception:
        return True
    return refused != (case in stub.refuses.get(kernel.name, "").split())


def find_killer(stub: stubs.Stub, kernels: list[Kernel]) -> tuple[str, str] | None:
    """The first kernel and case of all that are red, while the stub is installed."""
    each = ((kernel, case) for kernel in kernels for case in {**GRID, **stub.cases})
    return next(((kernel.name, case) for kernel, case in each if is_red(kernel, stub, case)), None)


def known_killers() -> dict[str, tuple[str, str]]:
    """The mutation run still searches for whatever killers.json does not name, or does not name any more."""
    known = json.loads(KILLERS.read_text(encoding="utf-8")) if KILLERS.exists() else {}
    return {name: tuple(killer) for name, killer in known.items()}
