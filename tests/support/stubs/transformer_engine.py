"""Transformer Engine 2.20 on sm90 (2.18 where `is_2_18`): three backends and what get_attention_backend says of them.

cuDNN reads dense memory by the layout's name; a hidden score is -10000 in the unfused one; masks are True where they hide;
FlashAttention draws the bottom-right corner alone, and its version 4 has None for no limit.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from fastattn.problems.masks import Causal
from stubs import Stub, attend, band, check_aligned, check_half, for_each_sequence, module, signed

FILE = "transformer_engine"
flash_major = [2]  # the FlashAttention that is installed


@signed(FILE, "AttentionParams")
def AttentionParams(**fields):
    p = SimpleNamespace(**fields)
    assert p.qkv_layout == ("thd_thd_thd" if "padding" in p.attn_mask_type else "bshd_bshd_bshd")
    assert is_2_18(p) or (p.num_tokens_q > 0) is (p.qkv_layout == "thd_thd_thd")
    left, right = p.window_size
    if "causal" in p.attn_mask_type:
        assert left >= -1 and right == 0
    else:
        assert (left, right) == (-1, -1) or min(left, right) >= 0
    return p


def bias_type(p):
    """What the shape of a bias is called; up to 2.19 TE was told by that name."""
    if is_2_18(p):
        return p.core_attention_bias_shape
    b, h, sq, _ = p.core_attention_bias_shape
    assert b in (1, p.batch_size) and h in (1, p.num_heads), "core_attention_bias tensor must be in one of"
    return f"{'b' if b == p.batch_size else '1'}{'h' if h == p.num_heads else '1'}{'1s' if sq == 1 < p.max_seqlen_q else 'ss'}"


def is_2_18(p):
    return not hasattr(p, "softmax_scale")


@signed(FILE, "get_attention_backend")
def get_attention_backend(attention_params):
    p = attention_params
    half = p.qkv_dtype in (torch.float16, torch.bfloat16)
    windowed = p.window_size[0] != -1 or p.window_size[1] not in (-1, 0)
    square, wide = p.max_seqlen_q == p.max_seqlen_kv, p.max_seqlen_q <= p.max_seqlen_kv
    dims = p.head_dim_qk % 8 == p.head_dim_v % 8 == 0
    plain = p.core_attention_bias_type == "no_bias" and p.core_attention_bias_shape is None
    flash = half and dims and plain and p.attn_mask_type != "arbitrary" and max(p.head_dim_qk, p.head_dim_v) <= 256
    flash = (
        flash
        and (square or p.attn_mask_type not in ("causal", "padding_causal"))
        and (square or p.bottom_right_diagonal or not windowed)
    )
    fused = half and dims and p.attn_mask_type != "arbitrary" and not (windowed and (not wide or not plain))
    fused = fused and (wide or p.attn_mask_type != "causal_bottom_right")
    fused = fused and (plain or bias_type(p) in ("bhss", "1hss", "b1ss", "11ss"))
    fused = fused and not (p.deterministic and p.is_training and p.core_attention_bias_requires_grad)
    assert is_2_18(p) or p.softmax_scale != 1.0, "what it is when nobody says it"
    version = SimpleNamespace(major=flash_major[0]) if flash else None
    return flash and not fused, version, fused, 1 if fused else None, not (flash or fused), [flash, fused, True]


@signed(FILE, "get_full_cu_seqlens")
def get_full_cu_seqlens(batch_size, max_seqlen, device):
    return torch.arange(batch_size + 1, dtype=torch.int32, device=device) * max_seqlen


def method(name):
    def decorate(function):
        call = signed(FILE, name)(function)

        def run(self, **named):
            return call(self=self, **named)

        run.__signature__ = call.__signature__
        return run

    return decorate


def heads_first(*tensors):
    return (x.transpose(1, 2) for x in tensors)


def joined(out):
    """(b, h, s, d) as (b, s, h * d)."""
    return out.transpose(1, 2).flatten(2).contiguous()


class Backend(torch.nn.Module):
    def make(self, softmax_scale, attention_dropout):
        torch.nn.Module.__init__(self)
        assert attention_dropout == 0.0
        self.softmax_scale = softmax_scale

    def check(self, q, qkv_layout):
        assert qkv_layout == ("bshd_bshd_bshd" if q.dim() == 4 else "thd_thd_thd")
        assert self.training == (q.requires_grad and torch.is_grad_enabled())

    def packed(self, q, k, v, cu_q, cu_kv, max_q, max_kv, qkv_layout, **named):
        """Each sequence by itself, with lengths that nobody need ask the GPU for."""
        self.check(q, qkv_layout)
        assert type(max_q) is type(max_kv) is int, "cu_seqlens are read from the GPU where it is not told"
        heads = q.shape[1]

        def one(*tensors):
            (rows, keys), device = (x.shape[1] for x in tensors[:2]), q.device
            cu = {"cu_seqlens_q": torch.tensor([0, rows], device=device), "cu_seqlens_kv": torch.tensor([0, keys])}
            named["attn_mask_type"] = kind
            out = self.forward(
                query_layer=tensors[0], key_layer=tensors[1], value_layer=tensors[2], qkv_layout="bshd_bshd_bshd", **named,
                **cu,
            )  # fmt: skip
            return out.unflatten(-1, (heads, -1)), q.new_zeros(1, heads, rows)

        kind = {
            "padding": "no_mask", "padding_causal": "causal", "padding_causal_bottom_right": "causal_bottom_right",
        }[named["attn_mask_type"]]  # fmt: skip
        return for_each_sequence(q, k, v, cu_q, cu_kv, max_q, max_kv, one)[0].flatten(-2)


class FlashAttention(Backend):
    @method("FlashAttention.__init__")
    def __init__(self, softmax_scale, attention_dropout, deterministic, **_):
        self.make(softmax_scale, attention_dropout)

    @method("FlashAttention.forward")
    def forward(
        self, query_layer, key_layer, value_layer, qkv_layout, attn_mask_type, window_size, flash_attention_backend,
        cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, **_
    ):  # fmt: skip
        q, k, v = query_layer, key_layer, value_layer
        if q.dim() == 3:
            assert "padding" in attn_mask_type
            assert max_seqlen_q > 1 or q.shape[1] == k.shape[1], "FlashAttention 2 takes token i for sequence i then"
            named = {"attn_mask_type": attn_mask_type, "window_size": window_size}
            return self.packed(
                q, k, v, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, qkv_layout=qkv_layout,
                flash_attention_backend=flash_attention_backend, **named,
            )  # fmt: skip
        self.check(q, qkv_layout)
        check_half(q, k, v)
        check_aligned(q, k, v)
        assert (
            q.shape[3] == v.shape[3] <= 256 and q.shape[3] % 8 == 0 and flash_attention_backend.major == flash_major[0]
        )
        left, right = window_size
        if flash_attention_backend.major == 4:
            left, right = (None, None) if (left, right) == (-1, -1) else (left, right)
        else:
            left, right = (None if n < 0 or n >= k.shape[1] + q.shape[1] else n for n in (left, right))
        right = 0 if "causal" in attn_mask_type else right
        visible = band(q.shape[1], k.shape[1], left, right, k.shape[1] - q.shape[1])
        return joined(attend(*heads_first(q, k, v), scale=self.softmax_scale, visible=visible)[0])


class FusedAttention(Backend):
    @method("FusedAttention.__init__")
    def __init__(self, softmax_scale, attention_dropout, deterministic, **_):
        self.make(softmax_scale, attention_dropout)

    @method("FusedAttention.forward")
    def forward(
        self, query_layer, key_layer, value_layer, qkv_layout, cu_seqlens_q, cu_seqlens_kv, attn_mask_type, window_size,
        bottom_right_diagonal, fused_attention_backend, core_attention_bias_type, core_attention_bias, max_seqlen_q,
        max_seqlen_kv, **_
    ):  # fmt: skip
        if query_layer.dim() == 3:
            assert cu_seqlens_q.equal(cu_seqlens_kv), "what it does with a sequence without keys nobody says"
            assert core_attention_bias is None and core_attention_bias_type == "no_bias"
            q, k, v = (by_layout(x[None])[0] for x in (query_layer, key_layer, value_layer))
            return self.packed(
                q, k, v, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv, qkv_layout=qkv_layout,
                attn_mask_type=attn_mask_type, window_size=window_size, bottom_right_diagonal=bottom_right_diagonal,
                fused_attention_backend=fused_attention_backend,
            )  # fmt: skip
        q, k, v = (by_layout(x) for x in (query_layer, key_layer, value_layer))
        self.check(query_layer, qkv_layout)
        check_half(q, k, v)
        check_aligned(query_layer, key_layer, value_layer)
        (b, q_len, heads, _), kv_len = q.shape, k.shape[1]
        assert q.shape[3] % 8 == v.shape[3] % 8 == 0 and fused_attention_backend == 1
        assert cu_seqlens_q.tolist() == [i * q_len for i in range(b + 1)]
        assert cu_seqlens_kv.tolist() == [i * kv_len for i in range(b + 1)]
        left, right = (None if n < 0 else n for n in window_size)
        right = 0 if "causal" in attn_mask_type else right
        corner = attn_mask_type == "causal_bottom_right" or (attn_mask_type == "no_mask" and bottom_right_diagonal)
        bias = core_attention_bias
        assert (bias is None) == (core_attention_bias_type == "no_bias")
        if bias is not None:
            assert core_attention_bias_type == "post_scale_bias" and bias.dtype is q.dtype and bias.is_contiguous()
            assert bias.shape[0] in (1, b) and bias.shape[1] in (1, heads) and bias.shape[2:] == (q_len, kv_len)
            assert bias.isfinite().all(), "what a row of -inf gives is cuDNN's affair"
        visible = band(q_len, kv_len, left, right, kv_len - q_len if corner else 0)
        return joined(attend(*heads_first(q, k, v), scale=self.softmax_scale, visible=visible, bias=bias)[0])


def by_layout(x):
    """What lies there by the layout's name, whatever the strides say."""
    b, s, h, d = x.shape
    return x.as_strided((b, s, h, d), (s * h * d, h * d, d, 1), x.storage_offset())


class UnfusedDotProductAttention(Backend):
    @method("UnfusedDotProductAttention.__init__")
    def __init__(self, softmax_scale, attention_dropout, **_):
        self.make(softmax_scale, attention_dropout)

    @method("UnfusedDotProductAttention._forward")
    def _forward(
        self, _alibi_cache, query_layer, key_layer, value_layer, qkv_layout, attn_mask_type, attention_mask, window_size,
        bottom_right_diagonal, core_attention_bias_type, core_attention_bias, **_
    ):  # fmt: skip
        self.check(query_layer, qkv_layout)
        q, k, v = heads_first(query_layer, key_layer, value_layer)
        assert all(x.stride(-1) == 1 for x in (q, k, v)), "get_qkv_layout asserts it"
        assert window_size == (-1, -1) and attn_mask_type in ("no_mask", "arbitrary")
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = (q.double() @ k.double().mT * self.softmax_scale).to(query_layer.dtype).double()  # backends.py
        if core_attention_bias_type == "post_scale_bias":
            scores = scores + core_attention_bias.double()
        else:
            assert core_attention_bias is None
        if attn_mask_type == "arbitrary":
            assert attention_mask.dtype is torch.bool
            scores = scores.masked_fill(attention_mask, -10000.0)
        return joined((scores.softmax(-1) @ v.double()).to(q.dtype))

    @method("UnfusedDotProductAttention.forward")
    def forward(self, args, kwargs, **_):
        return self._forward(*args, **kwargs)


ROOT = "transformer_engine.pytorch.attention.dot_product_attention"


def modules():
    backends = module(
        f"{ROOT}.backends", FlashAttention=FlashAttention, FusedAttention=FusedAttention,
        UnfusedDotProductAttention=UnfusedDotProductAttention,
    )  # fmt: skip
    utils = module(
        f"{ROOT}.utils", AttentionParams=AttentionParams, get_attention_backend=get_attention_backend,
        get_full_cu_seqlens=get_full_cu_seqlens,
    )  # fmt: skip
    parents = [".".join(ROOT.split(".")[:n]) for n in range(1, 4)]
    return {
        **{name: module(name, __path__=[]) for name in parents},
        ROOT: module(ROOT, backends=backends, utils=utils, __path__=[]),
        backends.__name__: backends, utils.__name__: utils,
    }  # fmt: skip


NO_SCALES = " scale_zero scale_negative"
NO_EXTRAS = " softcap lse lse_empty_rows lse_scale"
PACKED = " packed_empty packed_nothing packed_softcap packed_scale packed_scale_negative packed_float32 unread_behind"
STUB = Stub(
    file=FILE,
    library="transformer-engine",
    version="2.20.2",
    modules=modules,
    cases={
        "window_past_first_key": {"sq": 5, "skv": 19, "window": (16, 2), "mask": Causal("bottom_right")},
        "misaligned_bshd": {"memory": "misaligned", "layout": "bshd"},
    },
    refuses={
        "te_fused": "bottom_right_tall grad_bottom_right window_tall window_left_past_keys bool_mask_keys float32"
        + NO_SCALES + NO_EXTRAS + PACKED,
        "te_flash": "top_left_wide top_left_tall bool_mask bool_mask_keys float_mask mask_and_causal mask_grad float32"
        + " packed_top_left unread_top_left" + NO_SCALES + NO_EXTRAS + PACKED,
        "te_unfused": NO_EXTRAS,
    },
    mutations=(
        ("return mask.logical_not(), None", "return mask, None"),
        ('"causal_bottom_right" if bottom_right else "causal"', '"causal"'),
        ('"causal_bottom_right" if bottom_right else "causal"', '"causal_bottom_right"'),
        ("right == 0 or not", "not"),
        ("(-1 if left is None else left, 0)", "(-1, 0)"),
        ("(far if left is None else left, far", "(-1 if left is None else left, far"),
        ("left, right = None if a.lower is None else -a.lower, a.upper", "pass"),
        ("softmax_scale\": scale", "softmax_scale\": 0.25"),
        (".masked_fill(hidden, HIDDEN)", ""),
        ("out if hidden is None else", "out if True else"),
        ("letters if says_letters else tuple(bias.shape)", "letters"),
        ('{"softmax_scale": scale} if asks_scale else {}', "{}"),
        ("unflatten(-1, (heads, -1))", "unflatten(-1, (-1, heads)).transpose(2, 3)"),
        ('bias_type = "post_scale_bias"', 'bias_type = "pre_scale_bias"'),
        ("else tuple(bias.shape)", "else (9, *bias.shape[1:])"),
        (".train(training)", ".train(False)"),
        ("max_seqlen=kv_len", "max_seqlen=q_len"),
        ("dense=True", "dense=False"),
        ("dense_last_dim=True, aligned=True", "dense_last_dim=True"),
        ("dense=True, aligned=True", "dense=True"),
        ("equal_head_dims=True", "equal_head_dims=False"),
        ("head_dim_multiple=8", "head_dim_multiple=1"),
        ('layout="bshd"', 'layout="sbhd"'),
        ('kind = "arbitrary" if', 'kind = "no_mask" if'),
        ("cu_seqlens_kv=sequences.cu_kv", "cu_seqlens_kv=sequences.cu_q"),
        ("max_seqlen_kv=max_kv", "max_seqlen_kv=None"),
        ("max(2, a.packed.max_q)", "a.packed.max_q"),
        ('"padding_causal" if are_same', '"padding_causal" if True'),
        ("packed_needs=(OWN_LENGTHS,)", "packed_needs=()"),
        ("(len(q), len(k)) if layout == PACKED_LAYOUT else (0, 0)", "(0, 0)"),
        ("(far if left is None else left, far if right is None else right), True", "(-1, -1), True"),
    ),
)  # fmt: skip
