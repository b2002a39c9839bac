"""The layouts a caller may use, and the views between them.

b batch, s sequence, h heads, d head_dim, t packed tokens. Inside fastattn everything is a bhsd *view*: no layout costs
a copy, and a stride class remembers how the caller's memory really lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# layout -> where (b, h, s, d) stand in it
TO_BHSD: dict[str, tuple[int, int, int, int]] = {
    "bhsd": (0, 1, 2, 3),
    "bshd": (0, 2, 1, 3),
    "sbhd": (1, 2, 0, 3),
}
FROM_BHSD = {name: tuple(order.index(i) for i in range(4)) for name, order in TO_BHSD.items()}
LAYOUTS = (*TO_BHSD, "thd")
# layout -> where the dimensions of a log-sum-exp, (b, h, s) or (h, t), stand in the output, which has one more at the end
LSE_IN_OUTPUT = {**{name: order[:3] for name, order in FROM_BHSD.items()}, "thd": (1, 0)}


def to_bhsd(x: Tensor, layout: str) -> Tensor:
    """(b, h, s, d) view of a tensor in `layout`."""
    return x if layout == "bhsd" else x.permute(TO_BHSD[layout])


def from_bhsd(x: Tensor, layout: str) -> Tensor:
    """The view in `layout` of a (b, h, s, d) tensor."""
    return x if layout == "bhsd" else x.permute(FROM_BHSD[layout])


# Stride classes of a (b, h, s, d) view: the order of the dimensions in memory, outermost first, and where the gaps are.
#   contiguous   b h s d, no gaps          cache        the same with room after s (a slice of a KV cache)
#   transposed   b s h d, no gaps          cache_bshd   the same with room after s
#   seq_first    s b h d, no gaps          packed       b s h d with room after h (a slice of a packed QKV)
#   expanded     a stride of 0             interleaved  b s h d with room after d (a slice of heads * 3 * head_dim)
#   gapped       any other with a last stride of 1: several gaps, as in a slice of a cache of keys and values, or another order
#   other        a last stride that is not 1
STRIDE_CLASSES = (
    "contiguous", "transposed", "seq_first", "cache", "cache_bshd", "packed", "interleaved", "expanded", "gapped", "other"
)  # fmt: skip
_BHSD, _BSHD, _SBHD = (0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3)


DENSE_CLASS = {"bhsd": "contiguous", "bshd": "transposed", "sbhd": "seq_first"}  # what is dense in a layout
_MEMORY = {  # stride class -> (dimensions from the outermost in, those that have room behind them)
    "contiguous": ("bhsd", ""),
    "transposed": ("bshd", ""),
    "seq_first": ("sbhd", ""),
    "cache": ("bhsd", "s"),
    "cache_bshd": ("bshd", "s"),
    "packed": ("bshd", "h"),
    "interleaved": ("bshd", "d"),
    "gapped": ("bshd", "sh"),
    "other": ("bhds", ""),
}
assert set(_MEMORY) == set(STRIDE_CLASSES) - {"expanded"}


def strides_of_class(size: Sequence[int], cls: str) -> tuple[int, ...]:
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
        step *= n if name not in room else n + n // 4 + 1 if name == "s" else 3 * n
    return tuple(found[name] for name in "bhsd")


def stride_class(shape: Sequence[int], stride: Sequence[int]) -> str:
    """The stride class of a (b, h, s, d) view; dimensions of size 1 have no say, as their stride is never used."""
    if any(n > 1 and st == 0 for n, st in zip(shape, stride, strict=True)):
        return "expanded"
    if shape[3] > 1 and stride[3] != 1:
        return "other"
    if _dense(shape, stride, _BHSD):
        return "contiguous"
    if _dense(shape, stride, _BSHD):
        return "transposed"
    if _dense(shape, stride, _SBHD):
        return "seq_first"
    if _gap_after(shape, stride, _BHSD, 2):
        return "cache"
    if _gap_after(shape, stride, _BSHD, 2):
        return "cache_bshd"
    if _gap_after(shape, stride, _BSHD, 1):
        return "packed"
    if _gap_after(shape, stride, _BSHD, 3):
        return "interleaved"
    return "gapped"


def _dense(shape: Sequence[int], stride: Sequence[int], order: Sequence[int]) -> bool:
    expected = 1
    for dim in reversed(order):
        if shape[dim] > 1 and stride[dim] != expected:
            return False
        expected *= shape[dim]
    return True


def _gap_after(shape: Sequence[int], stride: Sequence[int], order: Sequence[int], gap: int) -> bool:
    """Dense in `order`, but for extra room behind dimension `gap`, seen by the next outer dimension that has a size."""
    expected, inner = 1, -1
    widened = False
    for dim in reversed(order):
        if shape[dim] > 1:
            if stride[dim] != expected:
                if widened or stride[dim] < expected or inner != gap:
                    return False
                widened, expected = True, stride[dim]
            expected *= shape[dim]
        inner = dim
    return widened


def order_in_memory(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """The order of the dimensions, the outermost first, in which torch.empty_like lays out a tensor of these strides.

    Dimensions of size 1 have no say where the others say it all.
    """
    order = sorted((i for i in range(len(shape)) if shape[i] != 1), key=lambda i: -stride[i])
    if not _dense(shape, stride, order):
        order = [i for i in _inferred_order(shape, stride) if shape[i] != 1]
    ones = [i for i in range(len(shape)) if shape[i] == 1]
    return tuple(sorted((*ones, *order)) if order == sorted(order) else (*ones, *order))


def _inferred_order(shape: Sequence[int], stride: Sequence[int]) -> list[int]:
    """ExpandUtils.cpp, infer_dense_strides: an insertion sort that cannot tell a stride of 0 from others."""
    found = list(reversed(range(len(shape))))  # the innermost first
    for end in range(1, len(found)):
        at = end
        for i in reversed(range(end)):
            inner, outer = found[i], found[at]
            if not stride[inner] or not stride[outer]:
                continue
            if stride[inner] < stride[outer]:
                break
            if stride[inner] > stride[outer] or shape[inner] > shape[outer]:
                found[i], found[at], at = outer, inner, i
    return found[::-1]


def dense_strides(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """The strides of a tensor whose dimensions lie in memory in `order`, without gaps."""
    found, step = [0] * len(shape), 1
    for dim in reversed(order):
        found[dim] = step
        step *= max(1, shape[dim])
    return tuple(found)


def empty_in_order(like: Tensor, shape: Sequence[int], order: Sequence[int]) -> Tensor:
    """An uninitialised (b, h, s, d) tensor whose memory lies densely in `order`; no view of another one."""
    return like.new_empty_strided(shape, dense_strides(shape, order))


def as_dense_as(whole: Tensor, part: Tensor) -> Tensor:
    """A part of a tensor that lies as densely as the whole does, in the same order: kernels of dense memory read no gaps."""
    order = sorted(range(whole.dim()), key=lambda i: -whole.stride(i))
    if is_dense(part, order) or not is_dense(whole, order):
        return part
    return empty_in_order(part, part.shape, order).copy_(part)


def is_dense(x: Tensor, order: Sequence[int]) -> bool:
    return _dense(x.shape, x.stride(), order)
