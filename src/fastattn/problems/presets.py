"""Problems without tensors: what a real call would ask, from a shape; and the shapes of real models, as data.

A Shape becomes a Problem the way a call does, through a call key of Specs and torch's switches as they are now, so that what
is tuned ahead is exactly what attention() will look for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from fastattn.environment import device
from fastattn.environment.settings import current_settings
from fastattn.problems import masks
from fastattn.problems.call_key import CallKey, Spec, check_layout, parse
from fastattn.problems.layouts import STRIDE_CLASSES, TO_BHSD
from fastattn.problems.problem import Problem

SAME = "same"  # a mask of q's dtype


@dataclass(frozen=True, slots=True)
class Shape:
    """A call without dtype and gradient. mask: (dtype, "bool" or SAME; pattern), as "b11k": letters where it is not broadcast.

    strides: the class of q, k and v (fastattn.problems.layouts), one for all or one each; None: dense in `layout`.
    """

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    head_dim_v: int
    causal: str | None = None
    mask: tuple[str, str] | None = None
    mask_grad: bool = False  # where gradients are wanted at all
    strides: tuple[str, ...] | None = None
    layout: str = "bhsd"
    accuracy: str | float | None = None  # None: the Config's
    window: masks.Window | None = None
    softcap: float = 0.0
    dropout: bool = False
    lse: bool = False
    cast_from: tuple[str, ...] = ()  # under autocast: dtypes of q, k, v and a mask before it casts them


def of(
    batch: int,
    heads: int | tuple[int, int],
    lengths: int | tuple[int, int],
    head_dim: int,
    strides: str | None = "transposed",
    *,
    causal: bool = False,
    mask: tuple[str, str] | None = None,
    mask_grad: bool = False,
) -> Shape:
    """A Shape in the words of a model: heads or (q_heads, kv_heads), length or (q_len, kv_len)."""
    q_heads, kv_heads = heads if isinstance(heads, tuple) else (heads, heads)
    q_len, kv_len = lengths if isinstance(lengths, tuple) else (lengths, lengths)
    return Shape(
        batch, q_heads, kv_heads, q_len, kv_len, head_dim, head_dim,
        "top_left" if causal else None, mask, mask_grad, (strides,) if strides else None,
    )  # fmt: skip


# What transformers, timm and diffusers pass to F.sdpa. A linear layer's output split into heads is "transposed", a slice of one
# packed QKV product is "packed", a KV cache grown by torch.cat is contiguous (and decoding has one query, whose strides
# have no say).
PRESETS: dict[str, tuple[Shape, ...]] = {
    "vit-b16": (of(8, 12, 197, 64),),
    "vit-b16-896px": (of(1, 12, 3137, 64),),
    "clip-text": (of(8, 8, 77, 64, causal=True),),
    "bert-base": (of(8, 12, 128, 64),),
    "minilm-padded": (of(16, 12, 60, 32, mask=("bool", "b1qk")),),
    "t5-small": (of(2, 8, 512, 64, mask=(SAME, "bhqk"), mask_grad=True),),
    "whisper-small-encoder": (of(1, 12, 1500, 64),),
    "whisper-small-cross": (of(1, 12, (5, 1500), 64),),
    "swin-t": (of(64, 3, 49, 32, "packed", mask=(SAME, "1hqk"), mask_grad=True),),
    "sdxl-self": (of(2, 10, 4096, 64), of(2, 20, 1024, 64)),
    "sdxl-cross": (of(2, 10, (4096, 77), 64), of(2, 20, (1024, 77), 64)),
    "llama-3-8b-prefill": (
        replace(of(1, (32, 8), 512, 128, causal=True), strides=("transposed", "contiguous", "contiguous")),
    ),
    "llama-3-8b-decode": (of(1, (32, 8), (1, 1024), 128, None), of(8, (32, 8), (1, 1024), 128, None)),
}


def problem(shape: Shape, dtype: torch.dtype, *, grad: bool = False, on: str = "cpu") -> Problem:
    """The Problem that attention() asks for such a call now, in this process: device, threads and precision are torch's.

    Raises ValueError for a layout, corner, stride class, mask pattern, window or softcap that does not exist, or heads that
    do not divide.
    """
    check_layout(shape.layout)
    s, where = shape, torch.device(on)
    if s.q_heads % s.kv_heads:
        raise ValueError(f"q_heads {s.q_heads} is not a multiple of kv_heads {s.kv_heads}")
    sizes = (
        (s.batch, s.q_heads, s.q_len, s.head_dim),
        (s.batch, s.kv_heads, s.kv_len, s.head_dim),
        (s.batch, s.kv_heads, s.kv_len, s.head_dim_v),
    )
    q, k, v = (Spec(size, strides(size, cls), dtype, where, grad) for size, cls in zip(sizes, _classes(s), strict=True))
    mask = _mask(s, dtype, where, grad) if s.mask else None
    is_causal = s.causal is not None and masks.Causal(s.causal).corner == "top_left"
    if s.causal is not None and not is_causal:
        if mask is not None:
            raise ValueError("causal bottom_right cannot be combined with a mask: attention() takes one or the other")
        mask = masks.Causal(s.causal)
    options = parse({
        "is_causal": is_causal, "accuracy": s.accuracy, "window": s.window, "softcap": s.softcap,
        "dropout_p": 0.5 if s.dropout else 0.0, "return_lse": s.lse,
    })  # fmt: skip
    state = device.state(where.type)._replace(grad=grad, autocast=None)
    found = Problem.from_key(CallKey(q, k, v, mask, s.layout, options, state), current_settings().accuracy)
    unknown = set(s.cast_from) - {"float32", "float16", "bfloat16", "float64", "bool"}
    if unknown:
        raise ValueError(f"cast_from must be dtypes such as float32, got {', '.join(sorted(unknown))}")
    found = found.replace(cast_from=s.cast_from)
    return found.replace(cut=None)  # a query in a window is tuned on the keys it sees, which is what this is


_DENSE = {"bhsd": "contiguous", "bshd": "transposed", "sbhd": "seq_first"}
_MEMORY = {  # stride class -> (dimensions from the outermost in, the one that has room behind it)
    "contiguous": ("bhsd", ""),
    "transposed": ("bshd", ""),
    "seq_first": ("sbhd", ""),
    "cache": ("bhsd", "s"),
    "cache_bshd": ("bshd", "s"),
    "packed": ("bshd", "h"),
    "interleaved": ("bshd", "d"),
    "other": ("bhds", ""),
}
assert set(_MEMORY) == set(STRIDE_CLASSES) - {"expanded"}
assert set(_DENSE) == set(TO_BHSD)


def _classes(s: Shape) -> Sequence[str]:
    given = s.strides or (_DENSE[s.layout],)
    if len(given) not in (1, 3):
        raise ValueError(f"strides must be one class, or three for q, k and v, got {len(given)}")
    return given if len(given) == 3 else given * 3


def strides(size: Sequence[int], cls: str) -> tuple[int, ...]:
    """The strides of a (b, h, s, d) view that lies in memory as `cls` says. Raises ValueError for another word."""
    if cls == "expanded":
        return (prod(size[2:]), 0, size[3], 1)  # one head, repeated
    if cls not in _MEMORY:
        raise ValueError(f"strides must be one of {', '.join(STRIDE_CLASSES)}, got {cls!r}")
    order, room = _MEMORY[cls]
    found, step = {}, 1
    for name in reversed(order):
        found[name] = step
        n = size["bhsd".index(name)]
        step *= n if name != room else n + n // 4 + 1 if name == "s" else 3 * n
    return tuple(found[name] for name in "bhsd")


def _mask(s: Shape, dtype: torch.dtype, where: torch.device, grad: bool) -> Spec:
    kind, pattern = s.mask or ("", "")
    if len(pattern) != 4 or any(got not in (name, "1") for got, name in zip(pattern, "bhqk", strict=True)):
        raise ValueError(
            f"a mask's pattern is 'bhqk' with 1 where it is broadcast, as in 'b11k' or '11qk', got {pattern!r}"
        )
    known = ("bool", SAME, "float32", "float16", "bfloat16", "float64")
    if kind not in known:
        raise ValueError(f"a mask's dtype is one of {', '.join(known)}, got {kind!r}")
    mask_dtype = dtype if kind == SAME else getattr(torch, kind)
    if mask_dtype not in (torch.bool, torch.float32, dtype):
        raise ValueError(f"a mask beside {str(dtype)[6:]} inputs is bool, float32 or {str(dtype)[6:]}, got {kind}")
    full = {"b": s.batch, "h": s.q_heads, "q": s.q_len, "k": s.kv_len}
    size = tuple(full.get(letter, 1) for letter in pattern)
    is_wanted = grad and s.mask_grad and mask_dtype is not torch.bool
    return Spec(size, strides(size, "contiguous"), mask_dtype, where, is_wanted)
