"""What belongs to one call and not to its kind: it decides how this call is served, and no Verdict depends on it."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from fastattn.problems import masks
from fastattn.problems.layouts import order_in_memory, strides_of_class
from fastattn.problems.problem import Problem

if TYPE_CHECKING:
    from fastattn.problems.sliding_window_decode import SlidingWindowDecode

INT32 = 2**31 - 1


Each = tuple[bool, bool, bool]  # of q, k and v
ALL: Each = (True, True, True)


class CallFacts(NamedTuple):
    """The facts of one call; the defaults are those of an ordinary one."""

    extent: int = 0  # largest element offset into one of its tensors
    aligned: Each = ALL  # it starts at a multiple of 16 bytes
    aligned_rows: Each = ALL  # it steps from row to row by such multiples
    switched_off: tuple[str, ...] = ()  # torch's SDPA backends that the user has switched off
    autocast: bool = False  # made under autocast, whether or not it casts anything
    asks_grad: bool = False  # an input requires grad, whatever grad mode says
    mask_asks_grad: bool = False  # the mask does
    q_order: tuple[int, ...] = (0, 1, 2, 3)  # of q's dimensions in memory, the outermost first
    dense_last_dims: bool = True  # q, k and v step by 1 in their last dimension
    dense_mask: bool = True  # so does the mask
    sixteenths: bool = False  # dropout is by sixteenths, as cuDNN has it
    also: "masks.Mask | None" = None  # what the options hide beside a Mask
    by_math: bool = False  # F.sdpa takes its math: it is given other dimensions than four, or broadcasts
    decode: "SlidingWindowDecode | None" = (
        None  # one query in a window: the Problem's k and v are the keys that it sees
    )


def ordinary_facts(p: Problem) -> CallFacts:
    """The facts of a call that is nothing but its Problem: what a tuning goes by."""
    sizes = (
        (p.batch, p.q_heads, p.q_len, p.head_dim),
        (p.batch, p.kv_heads, p.kv_len, p.head_dim),
        (p.batch, p.kv_heads, p.kv_len, p.head_dim_v),
    )
    strides = [strides_of_class(size, cls) for size, cls in zip(sizes, p.strides, strict=True)]
    return CallFacts(
        extent=max(extent(size, stride) for size, stride in zip(sizes, strides, strict=True)),
        aligned_rows=each(
            has_aligned_rows(size, stride, p.torch_dtype.itemsize) for size, stride in zip(sizes, strides, strict=True)
        ),
        autocast=bool(p.cast_from),
        q_order=order_in_memory(sizes[0], strides[0]),
        dense_last_dims=all(stride[3] == 1 for stride in strides),
    )


def each(found: Iterable[bool]) -> Each:
    """Three answers, of q, k and v."""
    q, k, v = found
    return q, k, v


def has_aligned_rows(shape: tuple[int, ...], stride: tuple[int, ...], itemsize: int) -> bool:
    """Whether a (b, h, s, d) view steps from row to row by multiples of 16 bytes."""
    return all(n == 1 or step * itemsize % 16 == 0 for n, step in zip(shape[:3], stride[:3], strict=True))


def extent(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """The largest element offset into a tensor."""
    return sum((n - 1) * step for n, step in zip(shape, stride, strict=True) if n)
