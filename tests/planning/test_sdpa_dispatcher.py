"""torch's own dispatcher, modelled: against torch itself on the CPU, and against sdp_utils.cpp's filters on made-up GPUs."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from building import CPU, facts_of, mask_of, problem_of, qkv
from fakes import problem
from library_grid import installed
from stubs import torch_cuda

from fastattn.environment.device import Device
from fastattn.environment.settings import Settings
from fastattn.planning import candidates, default_choice
from fastattn.planning.sdpa_dispatcher import SINCE, kernel_taken
from fastattn.problems.call_facts import CallFacts, ordinary_facts

H100 = Device("cuda", "made-up H100", 90, torch="2.13.0+cu130", cuda="13.0", cudnn=92300)
A100 = replace(H100, name="made-up A100", capability=80)
CHOICES = {0: "torch_math", 1: "torch_flash"}
MADE = [
    {}, {"dtype": torch.float64}, {"dtype": torch.float16}, {"hq": 8, "hkv": 2}, {"d": 20}, {"d": 16, "dv": 32}, {"skv": 5},
    {"memory": "last_stride_2"}, {"memory": ("contiguous", "last_stride_2", "contiguous")}, {"memory": "expanded_heads"},
    {"memory": "packed_dims"}, {"grad": True}, {"d": 1, "memory": "last_stride_2"}, {"layout": "bshd"},
]  # fmt: skip
TOLD = [{}, {"is_causal": True}, {"dropout_p": 0.5}, {"scale": 0.3}, "bool", "float", "mask grad", "mask broadcast"]


@pytest.mark.parametrize("made, told", list(product(MADE, TOLD)), ids=str)
def test_what_f_sdpa_takes_on_the_cpu_is_what_torch_says(made, told):
    q, k, v = qkv(**made)
    layout = made.get("layout", "bhsd")
    options, mask = (told, None) if isinstance(told, dict) else ({}, None)
    if isinstance(told, str):
        kind = (
            torch.bool if told in ("bool", "mask broadcast") else torch.float64 if q.dtype is torch.float64 else q.dtype
        )
        heads, q_len, kv_len = made.get("hq", 4), 19, made.get("skv", 19)
        mask = mask_of("11qk" if told == "mask broadcast" else "bhqk", kind, 2, heads, q_len, kv_len)
        mask = mask.requires_grad_() if told == "mask grad" else mask
    p, facts = problem_of(q, k, v, mask, layout, **options), facts_of(q, k, v, mask, layout, **options)
    four = [x.transpose(1, 2) if layout == "bshd" else x for x in (q, k, v)]
    grouped = four[0].shape[1] != four[1].shape[1]
    told = {"is_causal": False, "dropout_p": 0.0, "scale": None} | options
    choice = torch._fused_sdp_choice(
        *four, mask, told["dropout_p"], told["is_causal"], scale=told["scale"], enable_gqa=grouped
    )
    assert kernel_taken(p, CPU, facts) == CHOICES[choice]


def test_switches_are_asked_on_the_cpu_as_torch_asks_them(monkeypatch):
    q, k, v = qkv()
    for name in ("flash", "math"):
        enable = getattr(torch.backends.cuda, f"enable_{name}_sdp")
        enable(False)
        try:
            assert (
                kernel_taken(problem_of(q, k, v), CPU, facts_of(q, k, v)) == CHOICES[torch._fused_sdp_choice(q, k, v)]
            )
        finally:
            enable(True)


BIG = {"device": "cuda", "batch": 4, "q_heads": 32, "kv_heads": 32, "q_len": 4096, "kv_len": 4096, "head_dim": 128}
HALF = {**BIG, "dtype": "bfloat16"}
MASK = {"mask": "bool", "mask_shape": "bhqk", "mask_strides": "contiguous"}
ODD = {"dense_last_dims": False}
AWRY = {"aligned": (True, False, True)}
# (changes of the problem, of the facts, of the device) -> what an A100 takes, what an H100 takes; None: as torch 2.13 does
FILTERS = [
    ({}, {}, {}, "flash", "cudnn"),
    ({"dtype": "float32"}, {}, {}, "efficient", "efficient"),
    ({"dtype": "float64"}, {}, {}, "math", "math"),
    # head dims: padded for flash, multiples of 16 bytes for the efficient kernel, of 8 for cuDNN
    ({"head_dim": 20}, {}, {}, "flash", "flash"),
    ({"head_dim": 20, **MASK}, {}, {}, "math", "math"),
    ({"head_dim": 20, "dtype": "float32"}, {}, {}, "efficient", "efficient"),
    ({"head_dim": 22, "dtype": "float32"}, {}, {}, "math", "math"),
    ({"head_dim": 20, "dtype": "float32"}, {}, {"capability": 75}, "efficient", "efficient"),
    ({"head_dim": 22, "dtype": "float32"}, {}, {"capability": 75}, "efficient", "efficient"),
    ({"head_dim": 256}, {}, {}, "flash", "flash"),
    ({"head_dim": 256}, {}, {"torch": "2.14.1"}, "flash", "cudnn"),
    ({"head_dim": 256}, {}, {"torch": "2.14.1", "cudnn": 92200}, "flash", "flash"),
    ({"head_dim": 192, "needs_grad": True}, {}, {"torch": "2.14.1"}, "flash", "flash"),
    ({"head_dim": 264}, {}, {}, "efficient", "efficient"),
    ({"head_dim": 192, "head_dim_v": 128}, {}, {}, "efficient", "cudnn"),
    ({"head_dim": 192, "head_dim_v": 128, "needs_grad": True}, {}, {"torch": "2.14.1"}, "efficient", "cudnn"),
    ({"head_dim": 128, "head_dim_v": 64}, {}, {}, "efficient", "cudnn"),
    # masks, triangles, windows
    ({**MASK}, {}, {}, "efficient", "cudnn"),
    ({**MASK}, {"dense_mask": False}, {}, "math", "math"),
    ({**MASK, "mask": "bfloat16", "mask_grad": True, "needs_grad": True}, {}, {}, "efficient", "efficient"),
    ({**MASK, "mask": "bfloat16"}, {"mask_asks_grad": True}, {}, "efficient", "efficient"),
    ({"causal": "top_left"}, {}, {}, "flash", "cudnn"),
    ({"causal": "top_left", "q_len": 100}, {}, {}, "efficient", "cudnn"),
    ({"causal": "bottom_right", "q_len": 100}, {}, {}, "efficient", "cudnn"),
    ({"window": (8, 8)}, {}, {}, "efficient", "cudnn"),
    # groups
    ({"kv_heads": 8}, {}, {}, "flash", "cudnn"),
    ({"kv_heads": 8, **MASK}, {}, {}, "math", "cudnn"),
    ({"kv_heads": 8, **MASK}, {}, {"torch": "2.14.0"}, "efficient", "cudnn"),
    ({"kv_heads": 8, "dtype": "float32"}, {}, {}, "math", "math"),
    # determinism, dropout
    ({"deterministic": True, "needs_grad": True}, {}, {}, "flash", "flash"),
    ({"deterministic": True, "needs_grad": True, **MASK}, {}, {}, "efficient", "efficient"),
    ({"dropout": True}, {}, {}, "flash", "flash"),
    ({"dropout": True}, {"sixteenths": True}, {}, "flash", "cudnn"),
    ({"dropout": True}, {}, {"torch": "2.11.0"}, "flash", "cudnn"),
    ({"dropout": True, "q_len": 1}, {"sixteenths": True}, {}, "flash", "flash"),
    # how they lie
    ({"strides": ("gapped",) * 3}, {}, {}, "flash", "cudnn"),
    ({"strides": ("other",) * 3}, ODD, {}, "math", "math"),
    ({"dtype": "float32"}, AWRY, {}, "math", "math"),
    ({"dtype": "float32"}, AWRY, {"torch": "2.12.0"}, "efficient", "efficient"),
    ({}, {"extent": 2**31}, {}, "flash", "cudnn"),
    # lengths and grids
    ({"kv_len": 1}, {}, {}, "flash", "flash"),
    ({"kv_len": 0}, {}, {}, "math", "math"),
    ({"batch": 70_000, "q_len": 1, "kv_len": 8}, {}, {}, "flash", "flash"),
    ({"batch": 70_000, "q_len": 1, "kv_len": 8}, {}, {"torch": "2.12.1"}, "flash", "cudnn"),
    # silicon
    ({}, {}, {"capability": 75}, "math", "math"),
    ({"dtype": "float16"}, {}, {"capability": 75}, "efficient", "efficient"),
    ({"head_dim": 200, "needs_grad": True}, {}, {"capability": 89}, "efficient", "efficient"),
    ({"head_dim": 256, "needs_grad": True}, {}, {"capability": 89}, "flash", "flash"),
    ({"head_dim": 256, "needs_grad": True, "dropout": True}, {}, {"capability": 120}, "efficient", "efficient"),
    ({}, {}, {"capability": 130}, "math", "math"),
    # switches
    ({}, {"switched_off": ("flash",)}, {}, "efficient", "cudnn"),
    ({}, {"switched_off": ("cudnn",)}, {}, "flash", "flash"),
    ({}, {"switched_off": ("flash", "efficient")}, {}, "math", "cudnn"),
    ({}, {"switched_off": ("flash", "efficient", "math")}, {}, "cudnn", "cudnn"),
    ({"dtype": "float32"}, {"switched_off": ("efficient", "math")}, {}, "math", "math"),
]  # fmt: skip


@pytest.mark.parametrize("changes, facts, on, a100, h100", FILTERS, ids=str)
def test_what_f_sdpa_takes_on_cuda_is_what_sdp_utils_says(changes, facts, on, a100, h100):
    sizes = {"head_dim_v": changes.get("head_dim", 128)}
    p = problem(**{**HALF, **sizes, **changes})
    facts = ordinary_facts(p)._replace(**facts)
    for silicon, want in ((A100, a100), (H100, h100)):
        assert kernel_taken(p, replace(silicon, **on), facts) == f"torch_{want}", silicon.name


def test_every_filter_that_came_later_is_tried_before_and_after():
    versions = {tuple(map(int, on.get("torch", "2.13").split(".")[:2])) for *_, on, _, _ in FILTERS}
    assert all(any(v < since for v in versions) and any(v >= since for v in versions) for since in SINCE.values())


@pytest.mark.parametrize("capability, cuda, cudnn, prefers", [
    (90, "12.8", 92300, True), (90, "12.8", 91500, False), (103, "12.9", 92300, True), (107, "12.9", 92300, False),
    (107, "13.0", 92300, True), (101, "13.0", 92300, True), (110, "13.0", 92300, False), (89, "13.0", 92300, False),
    (120, "13.0", 92300, False), (90, "", 92300, True),
])  # fmt: skip
def test_which_devices_prefer_cudnn(capability, cuda, cudnn, prefers, monkeypatch):
    device = replace(H100, capability=capability, cuda=cuda, cudnn=cudnn)
    assert device.prefers_cudnn == prefers
    monkeypatch.setenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
    assert not device.prefers_cudnn


# --- what follows from it: the default is served where it runs, and nowhere else


def served_untuned(p, device, facts=None):
    found = candidates.decisions(p, device, Settings(), facts=facts)
    return [c.name for c in default_choice.fallbacks(p, device, Settings(), found, facts)]


@pytest.mark.parametrize("change", [
    {"strides": ("gapped",) * 3}, {"head_dim": 20, "head_dim_v": 20}, {"dtype": "float32", "head_dim": 36, "head_dim_v": 36},
    {"deterministic": True, "needs_grad": True}, {"deterministic": True, **MASK},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("device", [A100, H100], ids=lambda d: d.name)
def test_the_default_serves_untuned_where_a_fused_kernel_of_torch_does(change, device):
    assert served_untuned(problem(**{**HALF, **change}), device)[0] == "default"


def test_flash_has_offsets_of_64_bits_and_the_others_may_not():
    p = problem(**HALF)
    far = CallFacts(extent=2**31)
    assert default_choice.why_not_default(p, A100, Settings(), [], far) is None
    for device, other in ((H100, p), (A100, p.replace(dtype="float32"))):
        assert "32-bit" in (default_choice.why_not_default(other, device, Settings(), [], far) or "")


@pytest.mark.parametrize("facts", [{"aligned": (True, True, False)}, {"aligned_rows": (False, True, True)}], ids=str)
def test_the_default_is_not_served_where_it_would_read_vectors_that_start_awry(facts):
    p, facts = problem(**HALF), CallFacts(**facts)
    for device in (A100, H100):
        assert "16 bytes" in (default_choice.why_not_default(p, device, Settings(), [], facts) or "")
        assert served_untuned(p, device, facts)[0] != "default"
    padded = p.replace(head_dim=20, head_dim_v=20)
    assert default_choice.why_not_default(padded, A100, Settings(), [], facts) is None, "F.sdpa copies what it pads"
    math = p.replace(dtype="float64", batch=1, q_len=8, kv_len=8)
    assert default_choice.why_not_default(math, A100, Settings(), [], facts) is None


def test_an_untuned_log_sum_exp_is_torchs_flash_kernels_on_cuda(monkeypatch):
    with installed(torch_cuda.STUB, monkeypatch):
        assert served_untuned(problem(**{**HALF, "lse": True}), H100) == ["torch_flash", "sdpa_math+chunks"]
        assert served_untuned(problem(**{**HALF, "lse": True, "head_dim": 20, "head_dim_v": 20}), A100)[0] == (
            "torch_flash+head_dim_pad"
        )
        assert served_untuned(problem(**{**HALF, "lse": True, **MASK}), A100) == ["sdpa_math+chunks"]


def test_an_untuned_log_sum_exp_is_torchs_flash_kernels_on_the_cpu_in_float32():
    p = problem(lse=True)
    assert served_untuned(p, CPU) == ["torch_flash", "sdpa_math"]
    assert served_untuned(p.replace(needs_grad=True), CPU)[0].startswith("torch_flash")
    for half in ("bfloat16", "float16"):
        assert served_untuned(p.replace(dtype=half), CPU) == ["torch_flash+fp32", "sdpa_math"]
    assert served_untuned(p.replace(softcap=5.0), CPU) == ["sdpa_math"]
    decisions = candidates.decisions(p, CPU, Settings(kernels=("matmul",)))
    assert [c.name for c in default_choice.fallbacks(p, CPU, Settings(kernels=("matmul",)), decisions)] == ["sdpa_math"]
