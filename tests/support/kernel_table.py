"""One row for each kernel: problems that it accepts, and those that it refuses, with the reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import stubs
from building import CPU
from fakes import problem

from fastattn.environment.device import Device
from fastattn.environment.settings import Settings
from fastattn.kernels import registry
from fastattn.planning import candidates
from fastattn.planning.decision import Accepted, Rejected
from fastattn.problems.call_facts import CallFacts

H100 = Device("cuda", "made-up H100", 90, cuda="12.8", cudnn=91600)
A100 = Device("cuda", "made-up A100", 80, cuda="12.8", cudnn=91600)
V100 = Device("cuda", "made-up V100", 70, cuda="12.8", cudnn=91600)
MADE_UP = {"cpu": CPU, "cuda": H100, "a100": A100, "v100": V100}

CAUSAL = {"causal": "top_left"}
BOTTOM = {"causal": "bottom_right", "kv_len": 100}
BOOL = {"mask": "bool", "mask_shape": "11qk"}
BIAS = {"mask": "float32", "mask_shape": "1hqk"}
GRAD = {"needs_grad": True}
BF16 = {"dtype": "bfloat16"}
GQA = {"q_heads": 8, "kv_heads": 2}
WINDOW = {"window": (8, 8)}
SOFTCAP = {"softcap": 30.0}
DROPOUT = {"dropout": True}
LSE = {"lse": True}
BLOCK = {"mask": "block"}
SCORE_MOD = {"score_mod": True}


@dataclass
class Case:
    """A kernel on a device. accepts: changes to a Problem that it can do; refuses: the exact reason -> changes."""

    name: str
    accepts: list[dict[str, Any]]
    refuses: dict[str, dict[str, Any]] = field(default_factory=dict)
    device: str = "cpu"


TABLE = [
    Case(
        "default",
        accepts=[{}, CAUSAL, BOTTOM, BOOL, {**BIAS, "mask_grad": True}, GRAD, GQA, {"kv_len": 0}, WINDOW, DROPOUT],
        refuses={"softcap (30) is not supported": SOFTCAP, "return_lse: the log-sum-exp is not supported": LSE},
    ),
    Case(
        "flex",
        accepts=[{}, CAUSAL, BOTTOM, GQA, BF16, WINDOW, SOFTCAP, BLOCK, SCORE_MOD],
        refuses={
            "gradients are not supported": GRAD,
            "dropout is not supported": DROPOUT,
            "return_lse: the log-sum-exp is not supported": LSE,
            "a mask is not supported (bool 11qk)": BOOL,
            "kv_len 0 < 1": {"kv_len": 0},
        },
    ),
    Case(
        "flex",
        device="cuda",
        accepts=[{}, BF16, CAUSAL, GRAD, LSE, WINDOW, SOFTCAP, BLOCK, SCORE_MOD],
        refuses={
            "head_dim 8 < 16": {"head_dim": 8},
            "dropout is not supported": DROPOUT,
            "batch 65536 > 65535": {"batch": 65536},
        },
    ),
    Case(
        "torch_flash",
        accepts=[{}, CAUSAL, BOTTOM, BOOL, BIAS, GRAD, GQA, {"head_dim": 37}, {"head_dim_v": 40}, {"dtype": "float64"}],
        refuses={
            "kv_len 0 < 1": {"kv_len": 0},
            "q_len 0 < 1": {"q_len": 0},
            "a gradient for the mask is not supported": {**BIAS, **GRAD, "mask_grad": True},
            "switched off by torch.backends.cuda.enable_flash_sdp(False) or sdpa_kernel(...)": {
                "switched_off": ("flash",)
            },
        },
    ),
    Case(
        "torch_math",
        accepts=[{}, CAUSAL, BOTTOM, BOOL, BIAS, GRAD, GQA, {"head_dim": 37}],
        refuses={
            "kv_len 0 < 1": {"kv_len": 0},
            "switched off by torch.backends.cuda.enable_math_sdp(False) or sdpa_kernel(...)": {
                "switched_off": ("math",)
            },
        },
    ),
    Case(
        "matmul",
        accepts=[
            {},
            CAUSAL,
            BOTTOM,
            BOOL,
            BIAS,
            GQA,
            BF16,
            GRAD,
            {**BIAS, **GRAD, "mask_grad": True},
            WINDOW,
            SOFTCAP,
            LSE,
        ],
        refuses={"dropout is not supported": DROPOUT, "a BlockMask is not supported": BLOCK},
    ),
    Case(
        "matmul_mixed",
        accepts=[BF16, {**BF16, **CAUSAL}, {**BF16, **BOOL}],
        refuses={
            "dtype float32 is not one of bfloat16": {},
            "dtype float16 is not one of bfloat16": {"dtype": "float16"},
            "dropout is not supported": {**BF16, **DROPOUT},
        },
    ),
    Case(
        "matmul_shifted",
        accepts=[BF16, {**BF16, **CAUSAL}, {**BF16, **BOOL}, {**BF16, **WINDOW}],
        refuses={
            "softcap (30) is not supported": {**BF16, **SOFTCAP},
            "return_lse: the log-sum-exp is not supported": {**BF16, **LSE},
            "dtype float32 is not one of bfloat16": {},
            "scale negative is not one of positive": {**BF16, "scale": "negative"},
            "gradients are not supported": {**BF16, **GRAD},
        },
    ),
    Case(
        "sdpa_math",
        accepts=[
            {},
            CAUSAL,
            BOTTOM,
            BOOL,
            BIAS,
            GRAD,
            GQA,
            {"kv_len": 0},
            {"deterministic": True},
            WINDOW,
            SOFTCAP,
            DROPOUT,
            LSE,
        ],
        refuses={"a score_mod is not supported": SCORE_MOD, "a BlockMask is not supported": BLOCK},
    ),
    Case(
        "torch_flash",
        device="cuda",
        accepts=[BF16, {**BF16, **CAUSAL}, {**BF16, **GRAD}, {**BF16, "head_dim": 37}, {**BF16, **GQA}],
        refuses={
            "dtype float32 is not one of float16, bfloat16": {},
            "head_dim 264 > 256": {**BF16, "head_dim": 264},
            "kv_len 0 < 1": {**BF16, "kv_len": 0},
            "a mask is not supported (bool 11qk)": {**BF16, **BOOL},
            "scale negative is not one of positive": {**BF16, "scale": "negative"},
            "causal top_left with q_len 64 != kv_len 100, it draws bottom_right": {**BF16, **CAUSAL, "kv_len": 100},
        },
    ),
    Case("torch_flash", device="v100", accepts=[], refuses={"capability 70 < 80": BF16}),
    Case(
        "torch_efficient",
        device="cuda",
        accepts=[
            {},
            BF16,
            CAUSAL,
            BOTTOM,
            BOOL,
            BIAS,
            GRAD,
            GQA,
            {"head_dim": 37},
            {"aligned": (True, True, False)},
            {"deterministic": True},
        ],
        refuses={
            "dtype float64 is not one of float16, bfloat16, float32": {"dtype": "float64"},
            "batch 65536 > 65535": {"batch": 65536},
        },
    ),  # fmt: skip
    Case(
        "torch_cudnn",
        device="cuda",
        accepts=[
            BF16,
            {**BF16, **CAUSAL},
            {**BF16, **BOOL},
            {**BF16, **GRAD},
            {**BF16, **GQA},
            {**BF16, "head_dim": 37},
        ],
        refuses={
            "head_dim 264 > 256": {**BF16, "head_dim": 264},
            "kv_len 1 < 2": {**BF16, "kv_len": 1},
            "dtype float32 is not one of float16, bfloat16": {},
        },
    ),
    Case("torch_cudnn", device="a100", accepts=[BF16]),
    Case("default", device="cuda", accepts=[{}, BF16, CAUSAL, BOTTOM, BOOL, BIAS, GRAD, GQA]),
    Case(
        "torch_math",
        device="cuda",
        accepts=[{}, BF16, CAUSAL, BOOL, GRAD, GQA],
        refuses={"kv_len 0 < 1": {"kv_len": 0}},
    ),
    Case("matmul", device="cuda", accepts=[], refuses={"needs cpu, this device is cuda": {}}),
    Case("matmul_shifted", device="cuda", accepts=[], refuses={"needs cpu, this device is cuda": BF16}),
    Case("sdpa_math", device="cuda", accepts=[{}, CAUSAL, BOTTOM, BOOL, BIAS, GRAD, GQA]),
]


def decide(name, device, changes):
    """(whether it is accepted, its reasons)."""
    silicon = MADE_UP[device]
    [kernel] = [k for k in registry.rows_for(silicon.type) if k.name == name]
    of_call = set(CallFacts._fields)
    facts = CallFacts(**{name: value for name, value in changes.items() if name in of_call})
    p = problem(**{"device": silicon.type, **{name: value for name, value in changes.items() if name not in of_call}})
    found = candidates.decide(kernel, p, silicon, Settings(), facts=facts)
    return any(isinstance(d, Accepted) for d in found), [r for d in found if isinstance(d, Rejected) for r in d.reasons]


def check_case(case):
    """Also for docs/adding-a-kernel.md's own row."""
    for changes in case.accepts:
        assert decide(case.name, case.device, changes) == (True, []), changes
    for reason, changes in case.refuses.items():
        accepted, reasons = decide(case.name, case.device, changes)
        assert not accepted and reason in reasons, (reason, reasons)


def check_table():
    """What a library brings has its rows beside its stub: tests/support/stubs."""

    def its(stub: stubs.Stub) -> tuple[str, ...]:
        return stub.kernels or tuple(k.name for k in import_module(f"fastattn.kernels.adapters.{stub.file}").KERNELS)

    elsewhere = {name for stub in stubs.all_stubs() if stub.file != "torch_cuda" for name in its(stub)}
    assert {case.name for case in TABLE} == set(registry.names()) - elsewhere
    rows = {
        (kernel.name, device) for kernel in registry.rows() if kernel.name not in elsewhere for device in kernel.devices
    }
    assert rows <= {(case.name, MADE_UP[case.device].type) for case in TABLE}
