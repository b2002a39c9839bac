"""MSLK 1.1.0: xFormers' operators under another name (its signatures are compared), and cutlass' for sm100.

That one gives a log-sum-exp (b, heads, q) for grouped inputs too, and takes q_len <= kv_len alone.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from stubs import Stub, module, signatures
from stubs.xformers import FLASH, NOT_PACKED, OPERATORS, operators
from stubs.xformers import STUB as XFORMERS

assert signatures("mslk")["functions"] == signatures("xformers")["functions"]


def modules():
    fmha = operators("mslk.attention.fmha")
    fmha.flash3 = OPERATORS["mslk_flash3"]
    attention = module("mslk.attention", fmha=fmha)
    named = {"mslk": module("mslk", attention=attention), "mslk.attention": attention, fmha.__name__: fmha}
    return {**named, "triton": module("triton")}


STUB = Stub(
    file="mslk",
    library="mslk-cuda",
    version="1.1.0",
    modules=modules,
    patch=lambda monkeypatch: monkeypatch.setattr(torch.ops, "mslk", SimpleNamespace(fmha_fwd=None), raising=False),
    capabilities={"mslk_blackwell": 100},
    sizes=XFORMERS.sizes,
    cases={**XFORMERS.cases, "padded_v": {"d": 64, "dv": 16, "memory": "transposed"}},
    refuses={
        **{name.replace("xformers", "mslk"): refused for name, refused in XFORMERS.refuses.items()},
        "mslk_flash3": f"{FLASH} grad {NOT_PACKED}",
        "mslk_blackwell": "tall one_key top_left_wide top_left_tall bottom_right_tall window_tall window_left_past_keys softcap"
        " scale_zero scale_negative lse_empty_rows bool_mask bool_mask_keys float_mask mask_and_causal mask_grad grad"
        " grad_causal grad_bottom_right grad_head_dim float32 lse_grad lse_mask lse_zero lse_mask_and_window grad_window"
        " grad_one_head gqa_mask window_top_left_wide",
    },
    mutations=(
        ('"splitk", "triton_splitk"', '"splitk", "flash"'),
        ('"cutlass", "cutlass"', '"cutlass", "flash"'),
        ('xformers.load("cutlass_blackwell"', 'xformers.load("cutlass"'),
        ("operator, MODULE", "operator"),
        ("head_dim_multiple=64,  # to 64 or", "head_dim_multiple=8,  # to 64 or"),
        ("head_dim_multiple=64,  # to 64, ", "head_dim_multiple=8,  # to 64, "),
        ("dense=True", "dense=False"),
        ("grad=False", "grad=True"),
        ("lambda p, _: p.q_len > p.kv_len", "lambda p, _: False"),
        ('OneOf("scale", ("positive",))', 'OneOf("scale", ("positive", "negative"))'),
    ),
)
