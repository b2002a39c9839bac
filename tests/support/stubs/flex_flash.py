"""flex_attention's backend FLASH: FlashAttention 4 with the caller's functions, of torch 2.13 and flash-attn-4 4.0.0b36.

What it lists of a BlockMask is all that it looks at. It asks the mask's function in squares that are hidden in part alone.
"""

from __future__ import annotations

import inspect
from math import ceil

import torch
from torch.nn.attention import flex_attention as flex

from fastattn import masks
from stubs import Stub, attend, check_aligned, check_half, module, signed

TILES = (256, 128)  # queries of two tiles at once on sm100, keys of one: a square is made of whole ones


def seen_in(block_mask, q, k):
    """(batch or 1, 1, q_len, kv_len) bool, of the lists and of the function."""
    height, width = block_mask.BLOCK_SIZE
    (q_len, kv_len), counts = (q.shape[2], k.shape[2]), block_mask.kv_num_blocks.shape
    assert height % TILES[0] == 0 and width == TILES[1], "must be a multiple of 256, and match tile_n"
    assert counts[0] in (1, len(q)) and counts[1:] == (1, ceil(q_len / height))
    b, i, j = torch.arange(counts[0])[:, None, None, None], torch.arange(q_len)[:, None], torch.arange(kv_len)
    shape = (counts[0], 1, q_len, kv_len)
    partly = block_mask.mask_mod(b, torch.zeros_like(b), i, j).expand(shape)
    seen = torch.zeros(shape, dtype=torch.bool)
    squares = (block_mask.kv_num_blocks, block_mask.kv_indices, partly), (
        block_mask.full_kv_num_blocks, block_mask.full_kv_indices, torch.ones_like(partly),
    )  # fmt: skip
    for number, at, visible in squares:
        assert number.dtype is at.dtype is torch.int32
        for entry in range(counts[0]):
            for row in range(counts[2]):
                for column in at[entry, 0, row, : number[entry, 0, row]].tolist():
                    rows, keys = slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width)
                    seen[entry, 0, rows, keys] = visible[entry, 0, rows, keys]
    return seen


@signed("torch", "flex_attention", real=inspect.signature(flex.flex_attention), keywords_only=False)
def flex_attention(query, key, value, score_mod, block_mask, scale, enable_gqa, return_lse, kernel_options, return_aux):
    assert kernel_options == {"BACKEND": "FLASH"} and not return_lse
    assert running, "what is not compiled never gets to FLASH"
    check_half(query, key, value)
    check_aligned(query, key, value)
    d, dv, group = query.shape[3], value.shape[3], query.shape[1] // key.shape[1]
    assert d % 8 == dv % 8 == 0 and min(d, dv) >= 16 and (max(d, dv) <= 128 or (d, dv) == (192, 128))
    assert not any(x.requires_grad for x in (query, key, value)) and enable_gqa in (group > 1, True)
    assert scale is None or scale > 0  # a row's maximum is taken before it is scaled
    assert all(x.stride()[:2].count(0) == 0 for x in (query, key, value))
    visible = None if block_mask is None else seen_in(block_mask, query, key)
    scores = (query.double() @ key.double().repeat_interleave(group, 1).mT) * (d**-0.5 if scale is None else scale)
    if score_mod is not None:
        b, h, i, j = (torch.arange(n) for n in scores.shape)
        scores = score_mod(scores, b[:, None, None, None], h[:, None, None], i[:, None], j)
    out, lse = attend(torch.zeros_like(query), key, value, scale=1.0, visible=visible, bias=scores)
    order = sorted(range(4), key=query.stride().__getitem__, reverse=True)  # where two are alike, as they come
    out = out.permute(order).contiguous().permute([order.index(at) for at in range(4)])
    return (out, flex.AuxOutput(lse=lse)) if return_aux is not None and return_aux.lse else out


running = []  # compiled functions that run


def compiled(function, *, fullgraph, dynamic):
    """torch.compile. A symbol cannot be inlined there."""
    assert fullgraph and dynamic is False

    def call(*given, **named):
        running.append(function)
        try:
            return function(*given, **named)
        finally:
            running.pop()

    return call


def _flash_attn_fwd(
    q, k, v, score_mod=None, mask_mod=None, block_sparse_tensors=None, out=None, lse=None, aux_tensors=None
):
    """What the code that is made calls, of the parameters that it names."""


def patch(monkeypatch):
    monkeypatch.setattr(flex, "flex_attention", flex_attention)
    monkeypatch.setattr(torch, "compile", compiled)


def told(mask, b, q_len, kv_len, **more):
    return {"b": b, "sq": q_len, "skv": kv_len, "mask": mask, "seen": mask.dense(b, q_len, kv_len), **more}


DOCUMENTS = masks.Causal() & masks.Document([[290, 110], [400]])
STUB = Stub(
    file="flex",
    library="flash-attn-4",
    version="4.0.0b36",
    modules=lambda: {
        "flash_attn": module("flash_attn"),
        "flash_attn.cute": module("flash_attn.cute", interface=module("interface", _flash_attn_fwd=_flash_attn_fwd)),
    },
    patch=patch,
    kernels=("flex_flash",),
    cases={
        "three_rows_of_squares": {
            "b": 1,
            "hq": 1,
            "sq": 300,
            "skv": 390,
            "window": (140, 9),
            "mask": masks.Causal("bottom_right"),
        },
        "window_of_whole_squares": {"b": 1, "hq": 1, "sq": 520, "skv": 520, "window": (300, 0), "is_causal": True},
        "documents": told(DOCUMENTS, 2, 400, 400, hq=2, hkv=1),
        "documents_of_all": told(masks.Document([130, 270]), 2, 400, 400, hq=1, return_lse=True),
        "softcap_lse": {"softcap": 2.0, "return_lse": True, "is_causal": True},
        "head_dim_192_128": {"d": 192, "dv": 128},
        "head_dim_136": {"d": 136},
        "head_dim_v_136": {"dv": 136},
    },
    refuses={
        "flex_flash": "scale_zero scale_negative bool_mask bool_mask_keys float_mask mask_and_causal mask_grad grad grad_causal"
        " grad_bottom_right grad_head_dim float32 head_dim_136 head_dim_v_136",
    },
    mutations=(
        ('{"BACKEND": backend}', '{"BACKEND": "AUTO"}'),
        ("2 * SIZE if is_flash", "SIZE if is_flash"),
        ("<= DECODE and not is_flash", "<= DECODE"),
        ("is_small and not is_flash", "is_small"),
        ("a.lower, a.upper, q.shape[2], k.shape[2]", "a.lower, a.upper, k.shape[2], q.shape[2]"),
        ('"scale": a.scale', '"scale": None'),
        ("(a.softcap) if a.softcap", "(2 * a.softcap) if a.softcap"),
        ("torch.tanh(score / softcap)", "torch.tanh(score)"),
        ("(found[0], found[1].lse.detach()) if a.lse else found", "found"),
        ('dtypes=("float16", "bfloat16")', 'dtypes=("float16", "bfloat16", "float32")'),
        ("head_dim_multiple=8", "head_dim_multiple=1"),
        ("aligned=True", "aligned=False"),
        ("dense_last_dim=True", "dense_last_dim=False"),
        ("no_broadcast=True", "no_broadcast=False"),
        ("grad=False", "grad=True"),
        ('OneOf("scale", ("positive",))', 'OneOf("scale", ("positive", "negative"))'),
        ("> 128 and", "> 192 and"),
    ),
)
