"""torch 2.13's CUDA kernels below its dispatcher: flash has the bottom-right corner, the others the top-left one.

Where no key is visible flash says a log-sum-exp of +inf and the efficient kernel 0, which it also pads to a multiple of 32.
"""

from __future__ import annotations

import torch

from fastattn.kernels import kernel
from fastattn.kernels.libraries import availability
from stubs import INF, Stub, attend, band, check_aligned, check_half, of_operator, signed

HALF = (torch.float16, torch.bfloat16)


def torch_op(name):
    return signed("torch", name, real=of_operator(name))


def lies_like(out, like):
    """The same numbers, in memory ordered as `like` is."""
    order = sorted(range(4), key=lambda i: (-like.stride(i), i))
    return out.permute(order).contiguous().permute([order.index(i) for i in range(4)])


def triangle(q, k, at):
    return band(q.shape[2], k.shape[2], None, 0, at)


@torch_op("_scaled_dot_product_flash_attention")
def flash(query, key, value, dropout_p, is_causal, return_debug_mask, scale):
    check_half(query, key, value)
    check_aligned(query, key, value)
    head_dim = query.shape[3]
    assert head_dim == key.shape[3] == value.shape[3] <= 256 and head_dim % 8 == 0
    assert query.shape[1] % key.shape[1] == 0 and query.numel() and key.numel() and not return_debug_mask
    visible = triangle(query, key, key.shape[2] - query.shape[2]) if is_causal else None
    scale = head_dim**-0.5 if scale is None else scale
    out, lse = attend(query, key, value, scale=scale, visible=visible, empty_lse=INF)
    return lies_like(out, query), lse, None, None, query.shape[2], key.shape[2], None, None, None


def check_bias(bias, query, shape):
    """What cutlass asserts: it reads rows by 16 bytes."""
    step = 16 // query.itemsize
    assert bias.dtype is query.dtype and tuple(bias.shape) == shape and bias.stride(3) == 1
    assert all(st % step == 0 for n, st in zip(bias.shape[:3], bias.stride()[:3], strict=True) if n > 1)
    assert bias.data_ptr() % 16 == 0
    end = bias.storage_offset() + sum((n - 1) * st for n, st in zip(bias.shape[:3], bias.stride()[:3], strict=True))
    assert (end + -(-shape[3] // step) * step) * bias.itemsize <= bias.untyped_storage().nbytes(), "reads past the bias"


def check_heads(of_query, of_key, of_value):
    """What the efficient kernel takes: groups since torch 2.14."""
    takes_groups = not availability.is_before("torch", "2.14")
    assert of_key == of_value and (of_query % of_key == 0 if takes_groups else of_query == of_key)


def padded_lse(lse, is_wanted):
    if not is_wanted:
        return lse.new_empty((*lse.shape[:2], 0))
    return torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=INF)


@torch_op("_scaled_dot_product_efficient_attention")
def efficient(query, key, value, attn_bias, compute_log_sumexp, dropout_p, is_causal, scale):
    assert query.dtype in (*HALF, torch.float32) and query.dtype is key.dtype is value.dtype
    check_aligned(query, key, value)
    check_heads(query.shape[1], key.shape[1], value.shape[1])
    assert query.numel() and key.numel()
    assert query.shape[3] * query.itemsize % 16 == value.shape[3] * value.itemsize % 16 == 0
    given = (query, key, value) if attn_bias is None else (query, key, value, attn_bias)
    assert compute_log_sumexp or not any(x.requires_grad for x in given), "the backward needs it"
    if attn_bias is not None:
        check_bias(attn_bias, query, (*query.shape[:3], key.shape[2]))
    visible = triangle(query, key, 0) if is_causal else None
    scale = query.shape[3] ** -0.5 if scale is None else scale
    out, lse = attend(query, key, value, scale=scale, visible=visible, bias=attn_bias, empty_lse=0.0)
    return out.transpose(1, 2).contiguous().transpose(1, 2), padded_lse(lse, compute_log_sumexp), None, None


@torch_op("_scaled_dot_product_cudnn_attention")
def cudnn(query, key, value, attn_bias, compute_log_sumexp, dropout_p, is_causal, return_debug_mask, scale):
    check_half(query, key, value)
    check_aligned(query, key, value)
    assert query.shape[3] % 8 == value.shape[3] % 8 == 0 and query.shape[1] % key.shape[1] == 0 and key.shape[2] > 1
    assert compute_log_sumexp or not any(x.requires_grad for x in (query, key, value)), "the backward needs it"
    if attn_bias is not None:
        assert not attn_bias.requires_grad and attn_bias.dtype is query.dtype, "reads another dtype's bits"
    visible = triangle(query, key, 0) if is_causal else None
    scale = query.shape[3] ** -0.5 if scale is None else scale
    out, lse = attend(query, key, value, scale=scale, visible=visible, bias=attn_bias, empty_lse=1.0)
    lse = lse[..., None] if compute_log_sumexp else lse.new_empty(0)
    return lies_like(out, query), lse, None, None, query.shape[2], key.shape[2], None, None, None


OPS = {"cuda_flash": flash, "cuda_efficient": efficient, "cuda_cudnn": cudnn}


def private(ops):
    """Puts these in the place of torch's own."""

    def patch(monkeypatch):
        others = kernel.private
        monkeypatch.setattr(kernel, "private", lambda name: ops.get(name) or others(name))

    return patch


LSE_WITH_MASK = {
    "lse_grad": {"return_lse": True, "grad": True},
    "lse_mask": {"mask": ("bhqk", torch.bool), "return_lse": True},
    "lse_zero": {"mask": ("b11k", torch.bool), "skv": 1, "scale": 0.0, "return_lse": True},  # one that is really 0
    "lse_mask_and_window": {"mask": ("bhqk", torch.bool), "is_causal": True, "window": (0, 0), "return_lse": True},
}

STUB = Stub(
    file="torch_cuda",
    library="torch",
    version=torch.__version__,
    patch=private(OPS),
    refuses={
        "torch_flash": "top_left_wide top_left_tall window window_left window_right window_self window_causal window_wide"
        " window_tall window_left_past_keys softcap scale_zero scale_negative bool_mask bool_mask_keys float_mask"
        " mask_and_causal mask_grad float32 lse_mask lse_zero lse_mask_and_window",
        "torch_efficient": "softcap",
        "torch_cudnn": "one_key softcap scale_zero scale_negative mask_grad float32 lse_zero",
    },
    cases=LSE_WITH_MASK,
    mutations=(
        ("dropout_p=a.dropout_p, is_causal=a.upper is not None", "dropout_p=a.dropout_p, is_causal=False"),
        ("            is_causal=a.upper is not None,\n            scale=a.scale", "            scale=a.scale"),
        ("is_causal=a.upper is not None, scale=a.scale\n", "is_causal=a.upper is not None\n"),
        ("            scale=a.scale,\n", ""),
        ("lse.masked_fill(lse == -NEVER, NEVER)", "lse"),
        ("lse.masked_fill(sees_nothing(mask, s, kv_len, upper=a.upper), NEVER)", "lse"),
        ("lse.masked_fill(sees_nothing(mask, s, kv_len, upper=a.upper), NEVER)", "lse.masked_fill(lse == 0, NEVER)"),
        ("lse = lse.masked_fill(sees_nothing(mask, q.shape[2], k.shape[2], upper=a.upper), NEVER)", "pass"),
        ("lse[..., :s].detach()", "lse.detach()"),
        ("lse.detach().reshape(q.shape[:3])", "lse.detach()"),
        ("compute_log_sumexp=a.needs_grad or a.lse", "compute_log_sumexp=a.lse"),
        ("compute_log_sumexp=a.needs_grad or a.lse", "compute_log_sumexp=a.needs_grad"),
        ("as_bias(mask, q, (b, h, s, kv_len))", "mask.expand(b, h, s, kv_len)"),
        ("as_bias(mask, q, (b, h, s, kv_len))", "as_bias(mask.exp(), q, (b, h, s, kv_len))"),
        ("mask.to(q.dtype)", "mask.float()"),
        ('corner="bottom_right"', 'corner="top_left"'),
        ('masks=("additive",),\n        lse', 'masks=("bool", "additive"),\n        lse'),
        ("equal_head_dims=True,\n        head_dim_multiple", "head_dim_multiple"),
        ("head_dim_multiple=8", "head_dim_multiple=1"),
        ("head_dim_bytes=16", "head_dim_bytes=1"),
        ("dense_last_dim=True,\n        aligned=True", "dense_last_dim=True"),
        ('gqa="2.14"', "gqa=True"),
        ('Range("kv_len", min=2)', 'Range("kv_len", min=1)'),
        ('dtypes=(*HALF, "float32")', "dtypes=HALF"),
    ),
)
