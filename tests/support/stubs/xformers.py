"""xFormers 0.0.35: bshd, or (b, s, groups, heads, d) without a backward; operators and classes of biases as theirs.

flash says a log-sum-exp of +inf where nothing is visible, flash3 and split-K -inf, cutlass 0, padded to a multiple of 32.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from stubs import (
    INF,
    Stub,
    attend,
    band,
    check_aligned,
    check_half,
    flash_attn_2,
    for_each_sequence,
    module,
    signature,
    signatures,
    signed,
)  # fmt: skip
from stubs.torch_cuda import HALF, LSE_WITH_MASK, check_bias


class LowerTriangularMask:
    pass


class LowerTriangularFromBottomRightMask:
    pass


class Fields:
    """A dataclass of attn_bias.py, with its own parameters and those of the classes that it is made from."""

    def __init__(self, **given):
        for kind in reversed(type(self).__mro__):
            if kind.__name__ in signatures("xformers")["functions"]:
                known = signature("xformers", kind.__name__)
                bound = known.bind(**{name: given.pop(name) for name in known.parameters if name in given})
                bound.apply_defaults()
                self.__dict__.update(bound.arguments)
        assert not given, given
        assert all(n >= 0 for n in self.__dict__.values() if isinstance(n, int))


class LowerTriangularFromBottomRightLocalAttentionMask(Fields):
    def __init__(self, **given):
        super().__init__(**given)
        assert self._window_size > 0, "Expected `window_size > 0`"


class LocalAttentionFromBottomRightMask(Fields):
    pass


class _SeqLenInfo(Fields):
    __signature__ = signature("xformers", "_SeqLenInfo")


class BlockDiagonalMask(Fields):
    def lengths(self):
        """Of queries and keys of each sequence, as its own checks read them."""
        of_q, of_kv = (info.seqstart_py for info in (self.q_seqinfo, self.k_seqinfo))
        return [(q[1] - q[0], kv[1] - kv[0]) for q, kv in zip(pairwise(of_q), pairwise(of_kv), strict=False)]


class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    def __init__(self, **given):
        super().__init__(**given)
        assert all(q <= kv for q, kv in self.lengths()), "Expected `num_keys >= num_queries`"


class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalFromBottomRightMask):
    def __init__(self, **given):
        super().__init__(**given)
        assert self._window_size > 0, "Expected `window_size > 0`"


BIASES = (
    LowerTriangularMask, LowerTriangularFromBottomRightMask, LowerTriangularFromBottomRightLocalAttentionMask,
    LocalAttentionFromBottomRightMask,
)  # fmt: skip
PACKED = (
    BlockDiagonalMask, BlockDiagonalCausalFromBottomRightMask, BlockDiagonalCausalLocalAttentionFromBottomRightMask,
)  # fmt: skip
TYPES = {
    "flash": (type(None), *BIASES, *PACKED),
    "flash3": (type(None), *BIASES, *PACKED),
    "cutlass": (type(None), torch.Tensor, *BIASES[:3], *PACKED),
    "triton_splitk": (type(None), torch.Tensor),
    "cutlass_blackwell": (type(None), *BIASES),
    "mslk_flash3": (type(None), *BIASES, *PACKED),
}


class Operator:
    def __init__(self, kind, name):
        self.kind, self.name = kind, name

    def is_available(self):
        return True


OPERATORS = {kind: module(kind, FwOp=Operator(kind, "FwOp")) for kind in TYPES}
for kind in ("flash", "flash3", "cutlass", "mslk_flash3"):
    OPERATORS[kind].BwOp = Operator(kind, "BwOp")


def check(kind, q, k, v, bias, p):
    """validate_inputs and the operator's not_supported_reasons."""
    assert q.dim() == k.dim() == v.dim() and q.dim() in (4, 5) and p == 0.0
    assert k.shape[2:-1] == v.shape[2:-1] == q.shape[2:-1], (
        "We don't support broadcasting, please use `expand` yourself"
    )
    assert type(bias) in TYPES[kind], f"attn_bias type is {type(bias)}"
    assert q.dim() == 4 or kind != "cutlass", "one stream a group"
    head_dim, head_dim_v = q.shape[-1], v.shape[-1]
    if kind == "cutlass":
        assert q.dtype in (*HALF, torch.float32) and q.dtype is k.dtype is v.dtype
    else:
        check_half(q, k, v)
        assert head_dim == head_dim_v <= (512 if kind == "triton_splitk" else 256)
    assert kind != "flash3" or head_dim >= 32
    assert kind != "mslk_flash3" or head_dim in (64, 128, 192, 256)
    if kind == "cutlass_blackwell":
        assert head_dim in (64, 128) and q.shape[1] <= k.shape[1], "Embed dim not supported, or Mq > Mk"
        steps = [x.stride()[:2] for x in (k, v)]
        assert steps[0] == steps[1], "blackwell_fmha_fwd_template.cuh: stride_V = stride_K"
    assert kind != "triton_splitk" or head_dim in (16, 32, 64, 128, 256, 512)
    step = 16 // q.itemsize
    for x in (q, v):
        assert x.shape[-1] % step == 0 and x.stride(-2) % step == 0 and x.stride(-1) <= 1
    check_aligned(*(x[:, :, :, 0] if x.dim() == 5 and x.stride(3) == 0 else x for x in (q, k, v)))
    if isinstance(bias, torch.Tensor):
        assert bias.shape == (q.shape[0], *q.shape[2:-1], q.shape[1], k.shape[1]) and bias.dtype is q.dtype
        if kind == "cutlass":
            assert all(st % (16 // q.itemsize) == 0 for st in bias.stride()[:3]), "attn_bias.stride(-2)"
            check_bias(bias, q, tuple(bias.shape))
    if isinstance(bias, BlockDiagonalMask):
        assert q.shape[0] == k.shape[0] == v.shape[0] == 1, "Expected batch_size=1 when using block-diagonal bias"
        assert bias.q_seqinfo.seqstart.device == bias.k_seqinfo.seqstart.device == q.device
    if isinstance(bias, LowerTriangularMask) and kind != "cutlass":
        assert q.shape[1] == k.shape[1], "Only support LowerTriangularMask if equal number of keys and queries"


def visible_of(kind, bias, q_len, kv_len):
    """What each class of biases hides, as each operator takes it."""
    if bias is None or isinstance(bias, torch.Tensor):
        return None
    at = 0 if isinstance(bias, LowerTriangularMask) else kv_len - q_len
    left, right = None, 0
    if isinstance(bias, LowerTriangularFromBottomRightLocalAttentionMask):
        left = bias._window_size - 1
    if isinstance(bias, LocalAttentionFromBottomRightMask):
        left, right = bias.window_left, bias.window_right
    if kind == "cutlass":
        assert left is None or q_len <= kv_len, "rows whose tile has no key are not written"
        return None if at < 0 else band(q_len, kv_len, left, right, at)
    if kind == "flash":  # flash_api.cpp: a window as long as the keys is none
        left, right = (None if n is not None and n >= kv_len else n for n in (left, right))
    return band(q_len, kv_len, left, right, at)


def compute_packed(kind, q, k, v, bias, scale):
    """With a block-diagonal bias; cutlass' log-sum-exp is padded to the longest sequence."""
    heads, of_q, of_kv = q.shape[2:-1], bias.q_seqinfo, bias.k_seqinfo
    if q.dim() == 5:
        assert k.stride(3) == v.stride(3) == 0, "one view for each group"
        q, k, v = q.flatten(2, 3), k[:, :, :, 0], v[:, :, :, 0]
    is_causal = type(bias) is not BlockDiagonalMask
    left = bias._window_size - 1 if isinstance(bias, PACKED[2]) else -1
    cu_q = of_q.seqstart
    if of_q.max_seqlen == 1 and q.shape[2] > k.shape[2] and left < 0:  # as flash_attn_2.py has it
        assert q.shape[1] == len(cu_q) - 1, "q is reshaped to one token a sequence"
        cu_q = torch.arange(len(cu_q), dtype=torch.int32)

    def one(q, k, v):
        if kind != "cutlass":
            out, lse = flash_attn_2.forward(q, k, v, scale, is_causal, (left, -1), 0.0, of_kv.max_seqlen)
            return out, lse if kind == "flash" else lse.masked_fill(lse == INF, -INF)
        assert q.shape[1] == k.shape[1] and left < 0, "what it does with a sequence without keys nobody says"
        visible = band(q.shape[1], k.shape[1], None, 0, 0) if is_causal else None
        out, lse = attend(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale, visible=visible, empty_lse=0.0)
        return out.transpose(1, 2), lse

    out, lse = for_each_sequence(q[0], k[0], v[0], cu_q, of_kv.seqstart, of_q.max_seqlen, of_kv.max_seqlen, one)
    out = out[None].unflatten(2, heads)
    if kind == "cutlass":
        longest = -(-of_q.max_seqlen // 32) * 32
        return out, lse.new_full((len(cu_q) - 1, *heads, longest), float("nan"))
    return out, lse.unflatten(0, heads)[None]


def compute(kind, q, k, v, bias, p, scale):
    check(kind, q, k, v, bias, p)
    if isinstance(bias, BlockDiagonalMask):
        return compute_packed(kind, q, k, v, bias, q.shape[-1] ** -0.5 if scale is None else scale)
    heads, q_len = q.shape[2:-1], q.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    visible = visible_of(kind, bias, q_len, k.shape[1])
    flat = (x.flatten(2, -2).transpose(1, 2) for x in (q, k, v))
    tensor = bias.flatten(1, -3) if isinstance(bias, torch.Tensor) else None
    empty = {"flash": INF, "cutlass": 0.0}.get(kind, -INF)
    out, lse = attend(*flat, scale=scale, visible=visible, bias=tensor, empty_lse=empty)
    out = out.transpose(1, 2).contiguous().unflatten(2, heads)
    lse = lse if kind == "cutlass_blackwell" else lse.unflatten(1, heads)
    if kind == "cutlass":
        lse = torch.nn.functional.pad(lse, (0, -q_len % 32), value=INF)
    return out, lse


@signed("xformers", "memory_efficient_attention")
def memory_efficient_attention(query, key, value, attn_bias, p, scale, op, output_dtype):
    forward, backward = op
    assert forward.kind == backward.kind and (forward.name, backward.name) == ("FwOp", "BwOp") and output_dtype is None
    if not any(x.requires_grad for x in (query, key, value)):
        with torch.no_grad():
            return compute(forward.kind, query, key, value, attn_bias, p, scale)[0]
    assert query.dim() == 4, "supports_mqa"
    if forward.kind == "cutlass":
        local = isinstance(attn_bias, LowerTriangularFromBottomRightLocalAttentionMask)
        assert not local, "NotImplementedError: Unsupported attn_bias type"
    assert forward.kind != "flash3" or query.shape[-1] >= 64
    return compute(forward.kind, query, key, value, attn_bias, p, scale)[0]


@signed("xformers", "memory_efficient_attention_forward")
def memory_efficient_attention_forward(query, key, value, attn_bias, p, scale, op, output_dtype):
    assert op.name == "FwOp" and output_dtype is None
    with torch.no_grad():
        return compute(op.kind, query, key, value, attn_bias, p, scale)[0]


@signed("xformers", "memory_efficient_attention_forward_requires_grad")
def memory_efficient_attention_forward_requires_grad(query, key, value, attn_bias, p, scale, op, output_dtype):
    assert op.name == "FwOp" and output_dtype is None
    with torch.no_grad():
        return compute(op.kind, query, key, value, attn_bias, p, scale)


def operators(name):
    """The module that has them, of either library."""
    return module(
        name,
        memory_efficient_attention=memory_efficient_attention,
        memory_efficient_attention_forward=memory_efficient_attention_forward,
        memory_efficient_attention_forward_requires_grad=memory_efficient_attention_forward_requires_grad,
        attn_bias=module(f"{name}.attn_bias", **{bias.__name__: bias for bias in (*BIASES, *PACKED, _SeqLenInfo)}),
        **OPERATORS,
    )


def modules():
    fmha = operators("xformers.ops.fmha")
    ops = module("xformers.ops", fmha=fmha)
    return {
        "xformers": module("xformers", ops=ops),
        "xformers.ops": ops,
        "xformers.ops.fmha": fmha,
        "triton": module("triton"),
    }


FLASH = (
    "top_left_wide top_left_tall softcap scale_zero scale_negative bool_mask bool_mask_keys float_mask mask_and_causal"
    " mask_grad float32 lse_grad lse_mask lse_zero lse_mask_and_window gqa_mask window_top_left_wide"
)

# packed sequences: a window must be one that a triangle ends
NOT_PACKED = (
    "packed_top_left packed_window packed_window_left packed_window_right packed_grad packed_float32 packed_scale_negative"
    " packed_softcap unread_top_left"
)

STUB = Stub(
    file="xformers",
    library="xformers",
    version="0.0.35",
    modules=modules,
    sizes={"d": 64},
    cases={
        **LSE_WITH_MASK,
        "grad_window": {"window": (3, 0), "is_causal": True, "grad": True},
        "grad_one_head": {"grad": True},
        "gqa_mask": {"hq": 8, "hkv": 2, "mask": ("bhqk", torch.bool), "skv": 33},
        "gqa_lse": {"hq": 8, "hkv": 2, "return_lse": True},
        "window_top_left_wide": {"sq": 5, "skv": 19, "window": (3, 0), "is_causal": True},
    },
    refuses={
        "xformers_flash": f"{FLASH} grad {NOT_PACKED}",
        "xformers_flash3": f"{FLASH} grad head_dim_20 head_dim_v head_dim_v_small grad_head_dim {NOT_PACKED}"
        " packed_head_dim_20 packed_head_dim_v",
        "xformers_cutlass": "bottom_right_tall window window_left window_right window_tall window_left_past_keys softcap"
        " lse_empty_rows grad_bottom_right lse_grad grad_window window_top_left_wide packed_softcap",
        "xformers_splitk": "softcap scale_zero scale_negative mask_grad grad grad_causal grad_bottom_right"
        " grad_head_dim float32 lse_grad lse_zero grad_window grad_one_head",
    },
    mutations=(
        ("biases.LowerTriangularFromBottomRightMask()", "biases.LowerTriangularMask()"),
        ("biases.LowerTriangularMask()", "biases.LowerTriangularFromBottomRightMask()"),
        ("_window_size=left + 1", "_window_size=max(left, 1)"),
        ("_window_size=left + 1", "_window_size=left + 2"),
        ("window_left=left, window_right=right", "window_left=left + 1, window_right=right"),
        ("window_left=left, window_right=right", "window_left=left, window_right=right + 1"),
        ("far = q_len + kv_len", "far = 0"),
        ("far = q_len + kv_len", "far = -1"),
        ("p=a.dropout_p, scale=a.scale", "p=a.dropout_p"),
        ("as_bias(mask, q, (b, h, q_len, kv_len))", "mask"),
        ("as_bias(mask, q, (b, h, q_len, kv_len))", "mask.expand(b, h, q_len, kv_len).contiguous()"),
        ("bias.unflatten(1, split)", "bias"),
        ("split = (kv_heads, heads // kv_heads)", "split = (heads // kv_heads, kv_heads)"),
        ("lse.flatten(1, -2)[..., :q_len]", "lse.flatten(1, -2)"),
        ("lse.flatten(1, -2)[..., :q_len]", "lse[..., :q_len]"),
        ("lse.masked_fill(lse == INF, -INF)", "lse"),
        ("lse.masked_fill(sees_nothing(mask, q_len, kv_len), -INF)", "lse"),
        ("lse.masked_fill(sees_nothing(mask, q_len, kv_len), -INF)", "lse.masked_fill(lse == 0, -INF)"),
        ("out if heads == kv_heads else out.flatten(2, 3)", "out"),
        ("partial(with_graph, op=(op.FwOp, op.BwOp))", "partial(forward, op=op.FwOp)"),
        ("op=(op.FwOp, op.BwOp)", "op=op.FwOp"),
        ('partial(load, "flash")', 'partial(load, "cutlass")'),
        ('partial(load, "triton_splitk")', 'partial(load, "flash")'),
        ('layout="bshd"', 'layout="bhsd"'),
        ('corner="bottom_right"', 'corner="top_left"'),
        ("corner=None", 'corner="top_left"'),
        ('masks=("additive",)', 'masks=("bool", "additive")'),
        ("gqa=False", "gqa=True"),
        ("aligned=True", "aligned=False"),
        ("equal_head_dims=True", "equal_head_dims=False"),
        ("head_dim_multiple=8", "head_dim_multiple=1"),
        ("head_dim_bytes=16", "head_dim_bytes=1"),
        ("SPLITK_DIMS = (16,", "SPLITK_DIMS = (16, 20,"),
        ('Range("head_dim", min=32, max=256)', 'Range("head_dim", min=1, max=256)'),
        ("bool(p.needs_grad and p.group > 1)", "False"),
        ("bool(p.needs_grad and p.lse)", "False"),
        ('p.causal == "bottom_right" and p.q_len > p.kv_len', "False"),
        ("bool(p.mask is None and p.window and p.causal is None and p.window[1] != 0)", "False"),
        ('bool(p.mask is None and p.window and p.causal != "bottom_right" and p.q_len != p.kv_len)', "False"),
        ("bool(p.mask is None and p.window and p.needs_grad)", "False"),
        ("max(2, a.packed.max_q)", "a.packed.max_q"),
        ("(a.packed.cu_kv, a.packed.max_kv)", "(a.packed.cu_q, a.packed.max_kv)"),
        ("(a.packed.cu_kv, a.packed.max_kv)", "(a.packed.cu_kv, a.packed.max_q)"),
        ("**given, _window_size=left + 1", "**given, _window_size=left + 2"),
        ('("q_seqinfo", "k_seqinfo")', '("k_seqinfo", "q_seqinfo")'),
        ("seqstart_py=[]", "seqstart_py=cu.tolist()"),
        ("BlockDiagonalCausalFromBottomRightMask(**given)", "BlockDiagonalMask(**given)"),
        ("bool(p.packing.window and p.packing.upper != 0)", "False"),
        ("lambda p, _: not p.packing.are_same", "lambda p, _: False"),
        ("lambda p, _: bool(p.packing.window))", "lambda p, _: False)"),
        ("lambda p, _: p.lse)", "lambda p, _: False)"),
        ('partial(load_packed, "cutlass")', 'partial(load_packed, "flash")'),
    ),
)
