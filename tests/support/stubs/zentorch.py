"""zentorch's operator, 2.13.0.2, under its real schema: the triangle is drawn before the scale, 512 hidden keys make NaN.

It stays registered: torch takes no operator back. The real one is therefore tried in other processes (test_zentorch.py).
"""

from __future__ import annotations

from functools import cache

import torch

from stubs import INF, Stub, band, calls, library_at_work, signatures

BLOCK = 512  # keys whose scores are held at once


def zentorch_sdpa(
    query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None, zentorch_op_name=""
):
    """zentorch_scaled_dot_product_attention_impl of Sdpa_ref.cpp, and cpu_flash_attention of zen_Sdpa.cpp."""
    given = dict(locals())
    calls.append(("zentorch_sdpa", given))
    assert (
        dropout_p == 0.0 and query.dtype is key.dtype is value.dtype and query.dtype in (torch.bfloat16, torch.float32)
    )
    assert query.shape[3] == key.shape[3] == value.shape[3], "Q/K/V should have the same head size"
    assert query.shape[:2] == key.shape[:2] == value.shape[:2], "keys are looked for by the number of the query's head"
    for x in (query, key, value):
        assert x.stride(3) == 1 and (x.shape[2] == 1 or x.stride(2) >= x.shape[3]), (
            "the product of matrices is told one stride"
        )
        assert all(x.stride()), "broadcast"
    assert attn_mask is None or attn_mask.stride(-1) == 1
    with library_at_work():
        scores = query.double() @ key.double().mT
        if is_causal:
            scores = scores.masked_fill(~band(*scores.shape[2:], None, 0, 0), -INF)
        scores = scores * (query.shape[3] ** -0.5 if scale is None else scale)
        scores = scores if attn_mask is None else scores + attn_mask.double()
        scores = scores.masked_fill((scores[..., :BLOCK] == -INF).all(-1, keepdim=True), float("nan"))
        out = torch.empty_like(query).copy_(scores.softmax(-1) @ value.double())
        return out, torch.full(query.shape[:3], float("nan"))  # not written with ZENTORCH_USE_ZENDNN_SDPA=1


@cache
def registered() -> torch.library.Library:
    library = torch.library.Library("zentorch", "FRAGMENT")
    library.define("zentorch_sdpa" + signatures("zentorch")["functions"]["zentorch_sdpa"])
    library.impl("zentorch_sdpa", zentorch_sdpa, "CPU")
    return library


def patch(monkeypatch) -> None:
    """The operator is there, and the CPU has AVX512-BF16."""
    registered()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": True}, raising=False)


WINDOWS = "window window_left window_right window_self window_causal window_wide window_tall window_left_past_keys"
CORNERS = "bottom_right_wide bottom_right_tall causal_scale_negative causal_scale_zero"
MASKS = "softcap lse lse_empty_rows lse_scale bool_mask bool_mask_keys float_mask mask_and_causal mask_grad"
GRADIENTS = "grad grad_causal grad_bottom_right grad_head_dim"
STUB = Stub(
    file="zentorch",
    library="zentorch",
    version=".".join([*torch.__version__.split(".")[:2], "0.2"]),  # that of the torch that runs
    patch=patch,
    cases={
        "float16": {"dtype": torch.float16},
        "causal_scale": {"is_causal": True, "scale": 0.7},
        "causal_scale_negative": {"is_causal": True, "scale": -0.4},
        "causal_scale_zero": {"is_causal": True, "scale": 0.0},
        "several_blocks": {"sq": 5, "skv": 1100, "b": 1, "is_causal": True},
    },
    refuses={"zentorch": " ".join((WINDOWS, CORNERS, MASKS, GRADIENTS))},
    mutations=(
        ("is_causal=a.upper is not None", "is_causal=False"),
        ("scale=a.scale", "scale=None"),
        (")[0]", ")[1]"),
        ('dtypes=("bfloat16", "float32")', 'dtypes=("bfloat16", "float32", "float16")'),
        ('causal_scales=("positive",)', 'causal_scales=("positive", "zero", "negative")'),
        ("gqa=False", "gqa=True"),
        ("equal_head_dims=True", "equal_head_dims=False"),
        ("dense_last_dim=True", "dense_last_dim=False"),
        ("no_broadcast=True", "no_broadcast=False"),
        ("grad=False", "grad=True"),
        ("fp32=True", "fp32=False"),
    ),
)
