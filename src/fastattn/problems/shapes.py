"""Shapes without tensors, and the Problems they mean.

A Shape becomes a Problem the way a call does, through a call key and torch's switches as they are now: what is tuned ahead is
therefore exactly what attention() looks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastattn.environment import torch_state
from fastattn.environment.settings import current_settings
from fastattn.environment.text import dtype_name
from fastattn.problems import bands, masks
from fastattn.problems.call_key import CallKey, TensorSpec, told
from fastattn.problems.call_options import check_layout, parse_options
from fastattn.problems.classify import classify
from fastattn.problems.layouts import DENSE_CLASS, strides_of_class
from fastattn.problems.problem import Problem

SAME = "same"  # a mask of q's dtype


@dataclass(frozen=True, slots=True)
class Shape:
    """A call without dtype and gradient. mask: a Mask, or (dtype, "bool" or SAME; pattern), as "b11k": letters where it is not
    broadcast.

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
    mask: tuple[str, str] | masks.Mask | None = None
    mask_grad: bool = False  # where gradients are wanted at all
    strides: tuple[str, ...] | None = None
    layout: str = "bhsd"
    accuracy: str | float | None = None  # None: the Settings'
    window: bands.Sides | None = None
    softcap: float = 0.0
    dropout: bool = False
    lse: bool = False
    cast_from: tuple[str, ...] = ()  # under autocast: dtypes of q, k, v and a mask before it casts them


def shape(
    batch: int,
    heads: int | tuple[int, int],
    lengths: int | tuple[int, int],
    head_dim: int,
    strides: str | None = "transposed",
    *,
    causal: bool = False,
    mask: tuple[str, str] | masks.Mask | None = None,
    mask_grad: bool = False,
) -> Shape:
    """A Shape in the words of a model: heads or (q_heads, kv_heads), length or (q_len, kv_len)."""
    q_heads, kv_heads = heads if isinstance(heads, tuple) else (heads, heads)
    q_len, kv_len = lengths if isinstance(lengths, tuple) else (lengths, lengths)
    return Shape(
        batch, q_heads, kv_heads, q_len, kv_len, head_dim, head_dim,
        "top_left" if causal else None, mask, mask_grad, (strides,) if strides else None,
    )  # fmt: skip


def problem_of_shape(shape: Shape, dtype: torch.dtype, *, grad: bool = False, on: str = "cpu") -> Problem:
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
    q, k, v = (
        TensorSpec(size, strides_of_class(size, cls), dtype, where, grad)
        for size, cls in zip(sizes, _classes(s), strict=True)
    )
    mask: Any = _mask(s, dtype, where, grad) if isinstance(s.mask, tuple) else s.mask
    is_causal = s.causal is not None and masks.Causal(s.causal).corner == "top_left"
    if s.causal is not None and not is_causal:
        if isinstance(s.mask, tuple):
            raise ValueError("causal bottom_right cannot be combined with a mask: attention() takes one or the other")
        mask = masks.Causal(s.causal) if mask is None else mask & masks.Causal(s.causal)
    options = parse_options({
        "is_causal": is_causal, "accuracy": s.accuracy, "window": s.window, "softcap": s.softcap,
        "dropout_p": 0.5 if s.dropout else 0.0, "return_lse": s.lse,
    })  # fmt: skip
    state = torch_state.torch_state(where.type)._replace(grad=grad, autocast=None)
    options, mask, also = told(mask, options)
    if isinstance(mask, masks.Mask) and not mask.is_per_batch():  # what stands for others has entries for any batch
        mask.check(s.batch, s.q_heads, s.q_len, s.kv_len)
    found, _ = classify(CallKey(q, k, v, mask, s.layout, options, state, also), current_settings().accuracy)
    unknown = set(s.cast_from) - {"float32", "float16", "bfloat16", "float64", "bool"}
    if unknown:
        raise ValueError(f"cast_from must be dtypes such as float32, got {', '.join(sorted(unknown))}")
    return found.replace(cast_from=s.cast_from)


def _classes(s: Shape) -> Sequence[str]:
    given = s.strides or (DENSE_CLASS[s.layout],)
    if len(given) not in (1, 3):
        raise ValueError(f"strides must be one class, or three for q, k and v, got {len(given)}")
    return given if len(given) == 3 else given * 3


def _mask(s: Shape, dtype: torch.dtype, where: torch.device, grad: bool) -> TensorSpec:
    assert isinstance(s.mask, tuple)
    kind, pattern = s.mask
    if len(pattern) != 4 or any(got not in (name, "1") for got, name in zip(pattern, "bhqk", strict=True)):
        raise ValueError(
            f"a mask's pattern is 'bhqk' with 1 where it is broadcast, as in 'b11k' or '11qk', got {pattern!r}"
        )
    known = ("bool", SAME, "float32", "float16", "bfloat16", "float64")
    if kind not in known:
        raise ValueError(f"a mask's dtype is one of {', '.join(known)}, got {kind!r}")
    mask_dtype = dtype if kind == SAME else getattr(torch, kind)
    if mask_dtype not in (torch.bool, torch.float32, dtype):
        raise ValueError(
            f"a mask beside {dtype_name(dtype)} inputs is bool, float32 or {dtype_name(dtype)}, got {kind}"
        )
    full = {"b": s.batch, "h": s.q_heads, "q": s.q_len, "k": s.kv_len}
    size = tuple(full.get(letter, 1) for letter in pattern)
    is_wanted = grad and s.mask_grad and mask_dtype is not torch.bool
    return TensorSpec(size, strides_of_class(size, "contiguous"), mask_dtype, where, is_wanted)
