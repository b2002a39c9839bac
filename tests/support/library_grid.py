"""The grid of calls that every library's rows are held to, over stubs that are installed for a test; and the mutations.

A mutation is one text of an adapter replaced by another: one convention that the adapter no longer keeps. killers.json names
the kernel and the grid call that turn red for each, so that the mutation run need not search; find_killers.py writes it.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import stubs
import torch
from building import CPU, Expected, back, classified, corner, expect, hold, mask_of, qkv

from fastattn.environment.device import Device
from fastattn.environment.settings import Settings
from fastattn.kernels.adapters import flash_attn_3
from fastattn.kernels.kernel import Kernel
from fastattn.kernels.libraries import availability, catalogue, import_probe
from fastattn.kernels.limits import OneOf
from fastattn.planning import binding, candidates
from fastattn.planning.decision import Accepted, Rejected
from fastattn.problems.masks import Causal
from fastattn.problems.rewriting import caches, sequences

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
# Packed sequences: (lengths of queries, of keys), tokens behind the last, and whether the lengths are on a GPU, where no one
# reads them; only for rows that have an entry point for them.
SAME, OWN, HOLES = ((5, 9, 1), (5, 9, 1)), ((5, 2, 9), (7, 2, 3)), ((0, 5, 3, 0), (4, 0, 6, 0))
PACKED: dict[str, dict[str, Any]] = {
    "packed": {"lengths": SAME},
    "packed_causal": {"lengths": SAME, "is_causal": True},
    "packed_own_lengths": {"lengths": OWN},
    "packed_top_left": {"lengths": OWN, "is_causal": True},
    "packed_bottom_right": {"lengths": OWN, "mask": BR},
    "packed_window": {"lengths": SAME, "window": (3, 2)},
    "packed_window_left": {"lengths": SAME, "window": (3, -1)},
    "packed_window_right": {"lengths": SAME, "window": (-1, 2)},
    "packed_window_causal": {"lengths": OWN, "window": (2, 5), "mask": BR},
    "packed_empty": {"lengths": HOLES, "mask": BR, "return_lse": True},
    "packed_grad": {"lengths": HOLES, "mask": BR, "grad": True, "hq": 4, "hkv": 2},
    "packed_grad_window": {"lengths": SAME, "window": (3, 0), "is_causal": True, "grad": True},
    "packed_behind": {"lengths": OWN, "behind": 3, "grad": True},
    "packed_nothing": {"lengths": ((0,), (0,)), "behind": 3, "return_lse": True},
    "packed_nothing_grad": {"lengths": ((0,), (0,)), "behind": 3, "grad": True},
    "packed_one_query": {"lengths": ((1, 1, 1), (5, 9, 2)), "hq": 8, "hkv": 2},
    "packed_softcap": {"lengths": SAME, "softcap": 2.0},
    "packed_scale": {"lengths": SAME, "scale": 0.7, "return_lse": True},
    "packed_scale_negative": {"lengths": SAME, "scale": -0.4},
    "packed_gqa": {"lengths": SAME, "hq": 8, "hkv": 2, "is_causal": True},
    "packed_head_dim_20": {"lengths": SAME, "d": 20},
    "packed_head_dim_v": {"lengths": SAME, "d": 16, "dv": 32},
    "packed_misaligned": {"lengths": SAME, "memory": "misaligned"},
    "packed_float32": {"lengths": SAME, "dtype": torch.float32},
    "unread": {"lengths": OWN, "unread": True},
    "unread_causal": {"lengths": SAME, "is_causal": True, "unread": True},
    "unread_top_left": {"lengths": OWN, "is_causal": True, "unread": True},
    "unread_behind": {"lengths": OWN, "mask": BR, "behind": 3, "unread": True, "return_lse": True},
    "unread_grad": {"lengths": HOLES, "mask": BR, "behind": 2, "unread": True, "grad": True},
    "unread_longest_told": {"lengths": OWN, "unread": True, "max_q_len": 9, "max_kv_len": 7, "window": (2, 0), "mask": BR},
    "unread_one_or_none": {"lengths": ((1, 0, 1), (5, 3, 2)), "behind": 1, "unread": True, "max_q_len": 1, "hq": 8, "hkv": 2},
}  # fmt: skip
# Caches that are filled to some lengths, what lies behind is NaN, or finite where the lengths are on a GPU; only for rows that
# have an entry point for them.
FILL = {"b": 3, "sq": 1, "skv": 33, "filled": (33, 5, 20)}
CACHED: dict[str, dict[str, Any]] = {
    "filled": {**FILL},
    "filled_rows": {**FILL, "sq": 4},
    "filled_corner": {**FILL, "sq": 4, "mask": BR, "layout": "bshd"},
    "filled_window": {**FILL, "sq": 4, "mask": BR, "window": (3, 0)},
    "filled_window_decode": {**FILL, "mask": BR, "window": (3, -1)},
    "filled_short": {**FILL, "sq": 4, "mask": BR, "filled": (33, 2, 20), "return_lse": True},
    "filled_empty": {**FILL, "filled": (33, 0, 20), "return_lse": True, "hq": 8, "hkv": 2},
    "filled_softcap": {**FILL, "softcap": 2.0},
    "filled_scale": {**FILL, "scale": 0.7},
    "filled_scale_negative": {**FILL, "sq": 4, "mask": BR, "scale": -0.4},
    "filled_head_dim_20": {**FILL, "d": 20},
    "filled_grad": {**FILL, "sq": 4, "grad": True},
    "filled_float32": {**FILL, "dtype": torch.float32},
    "filled_causal": {**FILL, "sq": 4, "is_causal": True},
    "unread_filled": {**FILL, "unread": True, "hq": 8, "hkv": 2},
    "unread_filled_corner": {**FILL, "sq": 4, "mask": BR, "unread": True, "return_lse": True, "layout": "bshd"},
    "unread_filled_window": {**FILL, "sq": 4, "mask": BR, "window": (3, 0), "unread": True},
    "unread_filled_empty": {**FILL, "filled": (33, 0, 20), "unread": True},
}  # fmt: skip
# Caches in pages, whose table is not read either: what is not pages of the size that a kernel takes is gathered.
PAGES = {**FILL, "skv": 512, "filled": (512, 5, 300), "page": 256, "unread": True}
PAGED: dict[str, dict[str, Any]] = {
    "paged": {**PAGES},
    "paged_corner": {**PAGES, "sq": 4, "mask": BR, "layout": "bshd", "return_lse": True},
    "paged_window": {**PAGES, "sq": 4, "mask": BR, "window": (3, 0)},
    "paged_window_decode": {**PAGES, "mask": BR, "window": (260, -1)},
    "paged_empty": {**PAGES, "filled": (512, 0, 256), "return_lse": True, "hq": 8, "hkv": 2},
    "paged_small": {**PAGES, "skv": 40, "filled": (40, 5, 32), "page": 16, "sq": 3, "mask": BR},
    "paged_half_a_page": {**PAGES, "skv": 300, "filled": (300, 1, 257)},
    "paged_softcap": {**PAGES, "softcap": 2.0},
    "paged_scale_negative": {**PAGES, "sq": 4, "mask": BR, "scale": -0.4},
    "paged_head_dim_20": {**PAGES, "d": 20},
    "paged_head_dim_24": {**PAGES, "d": 24, "dv": 16},
    "paged_head_dim_v_24": {**PAGES, "d": 16, "dv": 24},
    "paged_grad": {**PAGES, "sq": 4, "grad": True},
    "paged_float32": {**PAGES, "dtype": torch.float32},
}  # fmt: skip
MADE = ("b", "hq", "hkv", "sq", "skv", "d", "dv", "memory", "layout", "dtype", "grad")
STUBS = stubs.all_stubs()
H100 = Device("cuda", "made-up H100", 90, cuda="12.8", cudnn=92300)


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


@contextmanager
def gpu(monkeypatch, *those: stubs.Stub):
    """A machine with an H100 and these libraries."""
    with monkeypatch.context() as patch, ExitStack() as stack:
        patch.setattr(Device, "of", staticmethod(lambda device: H100))
        for stub in those:
            stack.enter_context(installed(stub, patch))
        yield


def forget() -> None:
    availability.forget_libraries()
    flash_attn_3.flags.cache_clear()  # what the build of the library before this one left out


def silicon(stub: stubs.Stub, kernel: str) -> Device:
    if row_of(stub, kernel).devices == ("cpu",):
        return CPU
    return Device("cuda", "made-up GPU", stub.capabilities.get(kernel, stub.capability), cuda="12.8", cudnn=92300)


def packed(case: dict[str, Any]) -> dict[str, Any]:
    """A call of packed sequences as one of a batch of one, with a Mask; "seen" is what it leaves, by a loop over sequences."""
    rest = {name: value for name, value in case.items() if name not in ("lengths", "behind", "unread")}
    most = [rest.pop(name, None) for name in ("max_q_len", "max_kv_len")]
    is_unread, behind, corner = case.get("unread", False), case.get("behind", 0), rest.pop("mask", None)
    ends = [torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32) for lengths in case["lengths"]]
    ends = [ends[0]] * 2 if torch.equal(*ends) else ends
    tokens = [int(cu[-1]) + behind for cu in ends]
    told = {name: rest.pop(name) for name in ("is_causal", "window") if name in rest}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequences, "is_readable", lambda _: not is_unread)
        patch.setattr(sequences, "is_on_gpu", lambda _: True)
        q, k = (torch.empty(n, 1, 8) for n in tokens)
        mask = sequences.of_packed(q, k, k, corner, told, *ends, *most).mask
    seen = torch.zeros(1, 1, *tokens, dtype=torch.bool)
    left, right = (10**6 if n < 0 else n for n in told.get("window", (-1, -1)))
    right = 0 if corner or told.get("is_causal") else right
    for (first, last), (first_key, last_key) in zip(*(pairwise(cu.tolist()) for cu in ends), strict=True):
        i, j = torch.arange(last - first)[:, None], torch.arange(last_key - first_key)
        at = j - i - (len(j) - len(i) if corner else 0)
        seen[0, 0, first:last, first_key:last_key] = (at <= right) & (at >= -left)
    return {**rest, "b": 1, "sq": tokens[0], "skv": tokens[1], "layout": "bshd", "mask": mask, "seen": seen}


def cached(case: dict[str, Any]) -> dict[str, Any]:
    """A call on a cache as one with a Mask; "seen" is what it leaves, by a loop over its entries.

    The mask of one in pages stands for those: a Call cuts its cache into them.
    """
    rest = {name: value for name, value in case.items() if name not in ("unread", "page")}
    is_unread, corner, filled = case.get("unread", False), rest.pop("mask", None), case["filled"]
    told = {name: rest.pop(name) for name in ("window",) if name in rest}
    q, k = torch.empty(len(filled), 1, case["sq"], 8), torch.empty(len(filled), 1, case["skv"], 8)
    lengths = torch.tensor(filled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caches, "is_readable", lambda _: not is_unread)
        patch.setattr(caches, "is_on_gpu", lambda _: is_unread)
        table = None
        if "page" in case:
            table = torch.zeros(len(filled), -(-case["skv"] // case["page"]), dtype=torch.int32)
            k = torch.empty(1, 1, case["page"], 8)
        mask = caches.of_cache(q, k, k, corner, "bhsd", told, lengths, table).mask
        mask = mask if table is None else replace(mask, table=None)
    i, j = torch.arange(case["sq"])[:, None], torch.arange(case["skv"])
    left = told.get("window", (-1,))[0]
    seen = []
    for n in filled:
        at = i + n - case["sq"]
        near = (j <= at) & (j >= at - (10**6 if left < 0 else left))
        seen.append((j < n) & near if corner else (j < n).expand(case["sq"], -1))
    return {**rest, "mask": mask, "seen": torch.stack(seen)[:, None], "behind": 1e4 if is_unread else float("nan")}


EXPECTED: dict[str, Expected] = {}  # call -> what is right


def run(kernel: Kernel, stub: stubs.Stub, case: dict[str, Any], dtype: torch.dtype | None = None) -> list[str]:
    """Hold every candidate of a kernel for a call to float64; the reasons where there is none."""
    torch.default_generator.manual_seed(0)
    told = repr(case)
    case = packed(case) if "lengths" in case else cached(case) if "filled" in case else case
    options = {k: v for k, v in case.items() if k not in (*MADE, "mask", "seen", "filled", "behind")}
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
    p, facts = classified(q, k, v, mask, layout, **options)
    p = p.replace(device=kernel.devices[0], threads=0)
    settings = Settings(kernels=(f"+{kernel.name}",))
    found = candidates.decide(kernel, p, silicon(stub, kernel.name), settings, facts=facts)
    if isinstance(found[0], Rejected):
        return list(found[0].reasons)
    asked = {name: options[name] for name in ("scale", "window", "softcap") if name in options}
    drawn = corner(mask, options.get("is_causal", False))
    wanted = (
        f"{told} {sorted(made.items())}"  # it decides the numbers, which are drawn from one seed: kernels share them
    )
    if wanted not in EXPECTED:
        copies = (x.clone() if isinstance(x, torch.Tensor) else x for x in (q, k, v, case.get("seen", mask)))
        EXPECTED[wanted] = expect(*copies, layout=layout, corners=drawn, **asked)
    want = EXPECTED[wanted]
    if "filled" in case:  # the reference has its own: it multiplies what is hidden by zero
        k, v = k.clone(), v.clone()
        for b, n in enumerate(case["filled"]):
            back(layout, k)[b, :, n:] = back(layout, v)[b, :, n:] = case["behind"]
    for candidate in found:
        assert isinstance(candidate, Accepted)
        call = binding.bind(candidate, p, options.get("scale"), facts, structured=isinstance(mask, Causal))
        before = [x.detach().clone() for x in (q, k, v)]
        rounds = kernel.approximate or (
            kernel.unfused and made["dtype"].itemsize == 2
        )  # scores to q's dtype, as plain matmul
        rung = "dtype" if rounds else "exact"
        dense = mask if isinstance(mask, torch.Tensor) or "seen" in case else None
        found_lse = []

        def told_apart(*given, call=call, found_lse=found_lse):
            found = call(*given)
            found_lse.append(isinstance(found, tuple))
            return found

        hold(want, told_apart, q, k, v, dense, rung)
        assert found_lse == [p.lse], "with a log-sum-exp where it is asked for, and only there"
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, (q, k, v), strict=True)), (
            f"{candidate.name} changed its inputs"
        )
    return []


def calls_of(stub: stubs.Stub, kernel: Kernel) -> dict[str, dict[str, Any]]:
    """The calls that a row is held to, by name."""
    own = {
        **(PACKED if kernel.load_packed else {}),
        **(CACHED if kernel.load_cached else {}),
        **(PAGED if kernel.load_cached or kernel.load_paged else {}),
    }
    return {**GRID, **own, **stub.cases}


def rows_of(stub: stubs.Stub, file: ModuleType | None = None) -> list[Kernel]:
    """The stubbed kernels of its file; torch's own on the CPU are tested with the real thing."""
    found = (file or import_module(f"fastattn.kernels.adapters.{stub.file}")).KERNELS
    return [
        k
        for k in found
        if (k.devices == ("cuda",) or k.library != "torch") and (not stub.kernels or k.name in stub.kernels)
    ]


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
        refused = bool(run(kernel, stub, calls_of(stub, kernel)[case]))
    except Exception:
        return True
    return refused != (case in stub.refuses.get(kernel.name, "").split())


def find_killer(stub: stubs.Stub, kernels: list[Kernel]) -> tuple[str, str] | None:
    """The first kernel and case of all that are red, while the stub is installed."""
    each = ((kernel, case) for kernel in kernels for case in calls_of(stub, kernel))
    return next(((kernel.name, case) for kernel, case in each if is_red(kernel, stub, case)), None)


def known_killers() -> dict[str, tuple[str, str]]:
    """The mutation run still searches for whatever killers.json does not name, or does not name any more."""
    known = json.loads(KILLERS.read_text(encoding="utf-8")) if KILLERS.exists() else {}
    return {name: tuple(killer) for name, killer in known.items()}
