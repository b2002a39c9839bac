"""ffpa-attn 0.2.4, its kernels in CuTe: bhsd, the lower right corner, and what its CuTeDSLBackend asserts."""

from __future__ import annotations

import torch

from fastattn.problems.masks import Causal
from stubs import Stub, attend, band, module, signature, signed

FEWEST, DECODE = 512, 7


class Backend:
    """What a backend is told, by the fields of the real dataclasses."""

    def __init__(self, *given, **told):
        bound = type(self).__signature__.bind(*given, **told)
        bound.apply_defaults()
        self.told = bound.arguments


def backend(name: str) -> type[Backend]:
    own, common = signature("ffpa", name), signature("ffpa", "Backend")
    fields = {**common.parameters, **own.parameters}
    return type(name, (Backend,), {"__signature__": own.replace(parameters=fields.values())})


TritonBackend, CuTeDSLBackend = backend("TritonBackend"), backend("CuTeDSLBackend")


@signed("ffpa", "ffpa_attn_func")
def ffpa_attn_func(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, kwargs):
    assert set(kwargs) == {"forward_backend", "backward_backend"}, "got unexpected keyword argument(s)"
    forward, backward = kwargs["forward_backend"], kwargs["backward_backend"]
    assert type(forward) is type(backward) and forward.told["forward"] and backward.told["backward"]
    q, k, v = query, key, value
    q_len, kv_len, width = q.shape[2], k.shape[2], q.shape[3]
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    assert attn_mask is None and dropout_p == 0.0
    assert q.dtype in (torch.float16, torch.bfloat16), "only supports fp16/bf16"
    assert width == v.shape[3] and 256 < width <= 1024, "it leaves that to F.sdpa"
    assert q.shape[1] == k.shape[1] or enable_gqa
    assert not is_causal or q_len <= kv_len, "is_causal=True requires Nkv >= Nq"
    for x in (q, k, v):
        assert x.stride(-1) == 1
    if isinstance(forward, CuTeDSLBackend):
        assert width >= 320 and width % 64 == 0
        assert not (trains and is_causal) or q_len == kv_len, "its backward may draw another corner"
        for x in (q, k, v):
            assert x.contiguous().data_ptr() % 16 == 0, "misaligned address"
    else:
        assert width % 8 == 0
        assert kv_len >= FEWEST and not DECODE < q_len < FEWEST, "it leaves that to F.sdpa"
        assert not (trains and torch.are_deterministic_algorithms_enabled())
        assert backward.told["grad_kv_storage_dtype"] is backward.told["grad_q_storage_dtype"] is torch.float32
    visible = band(q_len, kv_len, None, 0 if is_causal else None, kv_len - q_len)
    out = attend(q, k, v, scale=width**-0.5 if scale is None else scale, visible=visible)[0]
    if isinstance(forward, CuTeDSLBackend) or q.is_contiguous():
        return out.contiguous()
    return out.transpose(1, 2).contiguous().transpose(1, 2)  # as the queries lie


BANDS = "top_left_wide top_left_tall bottom_right_tall grad_bottom_right"
MASKS = " bool_mask bool_mask_keys float_mask mask_and_causal mask_grad lse lse_empty_rows lse_scale"
REFUSED = (
    BANDS + MASKS + " window window_left window_right window_self window_causal window_wide window_tall"
    " window_left_past_keys softcap scale_zero scale_negative float32 head_dim_20 head_dim_v head_dim_v_small"
    " grad_head_dim packed"
)  # fmt: skip


def modules():
    return {"ffpa_attn": module("ffpa_attn", ffpa_attn_func=ffpa_attn_func, TritonBackend=TritonBackend,
                                CuTeDSLBackend=CuTeDSLBackend)}  # fmt: skip


STUB = Stub(
    file="ffpa",
    library="ffpa-attn",
    version="0.2.4",
    modules=modules,
    kernels=("ffpa_cute",),
    sizes={"d": 320},
    copies=("ffpa_cute",),  # it answers in bhsd memory, F.sdpa as the queries lie
    cases={
        "head_dim_264": {"d": 264, "grad": True},
        "head_dim_v_512": {"d": 320, "dv": 512},
        "grad_wide_causal": {"sq": 5, "skv": 19, "grad": True, "mask": Causal("bottom_right")},
        "grad_wide": {"sq": 5, "skv": 19, "grad": True},
    },
    refuses={"ffpa_cute": REFUSED + " grad_wide_causal"},
    mutations=(
        ("is_causal=a.upper is not None", "is_causal=False"),
        ("is_causal=a.upper is not None", "is_causal=True"),
        ("scale=a.scale", "scale=None"),
        ("enable_gqa=q.shape[1] != k.shape[1]", "enable_gqa=False"),
        ('corner="bottom_right"', 'corner="top_left"'),
        ("forward_backend=forward, backward_backend=backward", "forward_backend=forward"),
        ("ffpa_attn.CuTeDSLBackend, \"forward\")(forward=True)", "ffpa_attn.TritonBackend, \"forward\")(forward=True)"),
        ("head_dim_multiple=64, aligned=True", "head_dim_multiple=64"),
        ("head_dim_multiple=64", "head_dim_multiple=8"),
        ("equal_head_dims=True, dense", "equal_head_dims=False, dense"),
        ("dense_last_dim=True", "dense_last_dim=False"),
        ("p.needs_grad and p.causal is not None and p.q_len != p.kv_len", "False"),
        ("p.causal is not None and p.q_len > p.kv_len", "False"),
        ("min=257", "min=1"),
    ),
)  # fmt: skip
