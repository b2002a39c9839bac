"""The exact call key: all that one call is, without its values; it lives in memory only.

Mistakes that F.scaled_dot_product_attention also refuses raise the same type of error here, with the shapes in the message.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.environment import torch_state
from fastattn.environment.text import dtype_name, type_name
from fastattn.problems import masks
from fastattn.problems.call_options import CallOptions, check_layout
from fastattn.problems.layouts import TO_BHSD, dense_strides


class TensorSpec(NamedTuple):
    """A tensor without its values; shape and stride are those of the (b, h, s, d) view."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    aligned: bool = True  # to 16 bytes


class CallKey(NamedTuple):
    """All that one call is, without its values."""

    q: TensorSpec
    k: TensorSpec
    v: TensorSpec
    mask: Any  # a TensorSpec, a Mask, a BlockMask or None
    layout: str
    options: CallOptions
    state: torch_state.TorchState
    also: "masks.Mask | None" = None  # the options' own triangle and window, beside a Mask that holds more than those
    is_kept: bool = False  # k and v are views of a KVCache, which keeps them as kernels want them as well


def tensor_spec(x: Tensor, layout: str = "bhsd") -> TensorSpec:
    shape, stride = tuple(x.shape), x.stride()
    if layout != "bhsd":
        order = TO_BHSD[layout]
        shape, stride = tuple(shape[i] for i in order), tuple(stride[i] for i in order)
    return TensorSpec(shape, stride, x.dtype, x.device, x.requires_grad, x.data_ptr() % 16 == 0)


def _as_cache(pages: TensorSpec, table: tuple[int, ...]) -> TensorSpec:
    """The cache that pages make up, as it would be gathered."""
    shape = table[0], pages.shape[1], table[1] * pages.shape[2], pages.shape[3]
    return pages._replace(shape=shape, stride=dense_strides(shape, TO_BHSD["bshd"]))


def as_structured(mask: Any) -> Any:
    """torch.nn.attention.bias's causal biases as our own value, of a KVCache what is hidden; everything else as it is."""
    if is_kept(mask):
        return mask.of
    if type(mask).__name__ == "CausalBias" and hasattr(mask, "variant"):
        return masks.Causal("top_left" if mask.variant.name == "UPPER_LEFT" else "bottom_right")
    return mask


def is_kept(mask: Any) -> bool:
    """Whether it is of a call on a KVCache."""
    return mask is not None and isinstance(mask, masks.Kept)


def tensors_of(q: Any, k: Any, v: Any, mask: Any) -> list[Any]:
    """The inputs that circumstances are read from; torch's causal biases are values to us, a Tensor subclass to torch."""
    return [q, k, v, *([mask] if isinstance(mask, Tensor) and as_structured(mask) is mask else [])]


def call_key(q: Any, k: Any, v: Any, mask: Any, layout: str, options: CallOptions) -> CallKey:
    """The key of this call. Raises what F.scaled_dot_product_attention raises for the same mistake."""
    check_layout(layout)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"attention(): {name} must be a Tensor, got {type_name(x)}")
        if x.dim() != 4:
            raise ValueError(f"attention(): {name} must have 4 dimensions ({layout}), got shape {tuple(x.shape)}")
    structured, of_cache = as_structured(mask), is_kept(mask)
    if structured is not mask and not of_cache:
        _check_bias_lengths(mask, q, k, layout)
    options, structured, also = told(structured, options)
    of_q, of_k, of_v = (tensor_spec(x, layout) for x in (q, k, v))
    table = structured.page_table if structured is not None and isinstance(structured, masks.Mask) else None
    if table is not None:
        of_k, of_v = (_as_cache(x, tuple(table.shape)) for x in (of_k, of_v))
    key = CallKey(
        of_q,
        of_k,
        of_v,
        tensor_spec(structured) if isinstance(structured, Tensor) else structured,
        layout,
        options,
        torch_state.torch_state(q.device.type),
        also,
        of_cache,
    )
    check_call(key)
    return key


def told(mask: Any, options: CallOptions) -> tuple[CallOptions, Any, "masks.Mask | None"]:
    """(options, mask, what the options hide beside it). A triangle with a window becomes the options that say the same.

    Raises ValueError where mask and options have different corners.
    """
    if mask is None or not isinstance(mask, masks.Mask):
        return options, mask, None
    windows = [part for part in mask.parts() if isinstance(part, masks.Window)]
    corners = [part for part in mask.parts() if isinstance(part, masks.Causal)]
    sides = next(((window.left, window.right) for window in windows), options.window)
    sides = None if sides == (-1, -1) else sides
    is_one_band = len(windows) + len(corners) == len(mask.parts()) and len(windows) + bool(options.window) < 2
    if is_one_band and (corners or sides):  # a mask that hides nothing stays one: F.sdpa does not take it
        return options._replace(window=sides), next(iter(corners), None), None
    own = [masks.Causal()] if options.is_causal else []
    own += [masks.Window(*options.window)] if options.window is not None else []
    also = masks.all_of(own) if own else None
    masks.all_of([mask, *own])  # raises where they do not go together
    return options._replace(is_causal=False, window=None), mask, also


def check_call(key: CallKey) -> None:
    """Raise what F.scaled_dot_product_attention raises for the same mistake."""
    _check_tensors(key)
    _check_mask(key)
    mask, (q_len, kv_len) = key.mask, (key.q.shape[2], key.k.shape[2])
    is_cornered = mask is not None and isinstance(mask, masks.Causal) and mask.corner == "bottom_right"
    if key.options.window and key.options.is_causal and is_cornered and q_len != kv_len:
        raise ValueError(
            "attention(): window with is_causal and Causal('bottom_right') could mean either diagonal; give one"
        )


def _check_tensors(key: CallKey) -> None:
    q, k, v = key.q, key.k, key.v
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape} (as b, h, s, d)"
    if not q.device == k.device == v.device:
        raise RuntimeError(f"attention(): q, k and v must be on one device, got {q.device}, {k.device}, {v.device}")
    if not q.dtype.is_floating_point or q.dtype.itemsize == 1:
        kind = NotImplementedError if q.dtype.is_complex or q.dtype.is_floating_point else RuntimeError
        raise kind(f"attention(): q, k and v must be float64, float32, float16 or bfloat16, got {dtype_name(q.dtype)}")
    if not _one_dtype(key, (q.dtype, k.dtype, v.dtype)):
        dtypes = ", ".join(dtype_name(x.dtype) for x in (q, k, v))
        raise RuntimeError(f"attention(): q, k and v must have one dtype, got {dtypes}")
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise RuntimeError(f"attention(): batch sizes differ: {shapes}")
    if k.shape[1] != v.shape[1] or k.shape[2] != v.shape[2]:
        raise RuntimeError(f"attention(): k and v must agree in heads and length: {shapes}")
    if q.shape[3] != k.shape[3]:
        raise RuntimeError(f"attention(): q and k must have the same head_dim: {shapes}")
    if q.shape[1] != k.shape[1] and (k.shape[1] == 0 or q.shape[1] % k.shape[1]):
        raise RuntimeError(f"attention(): q_heads must be a multiple of kv_heads: {shapes}")


def _one_dtype(key: CallKey, dtypes: tuple[torch.dtype, ...]) -> bool:
    return len({after_autocast(dtype, key.state) for dtype in dtypes}) == 1


def after_autocast(dtype: torch.dtype, state: torch_state.TorchState) -> torch.dtype:
    """The dtype F.sdpa computes in: autocast casts every float tensor but float64."""
    if state.autocast is None or not dtype.is_floating_point or dtype is torch.float64:
        return dtype
    return state.autocast


def _check_mask(key: CallKey) -> None:
    mask = key.mask
    if mask is None:
        return
    if isinstance(mask, masks.Mask):
        batch, heads, q_len = key.q.shape[:3]
        mask.check(batch, heads, q_len, key.k.shape[2])
        return
    if is_block_mask(mask):
        _check_block_mask(key)
        return
    if not isinstance(mask, TensorSpec):
        raise TypeError(
            "attention(): mask must be None, a bool or float Tensor, a value from fastattn.masks, one of"
            f" torch.nn.attention.bias's causal biases or a flex BlockMask, got {type_name(mask)}"
        )
    b, hq, sq, _ = key.q.shape
    scores = (b, hq, sq, key.k.shape[2])
    if len(mask.shape) == 3:
        raise ValueError(
            f"attention(): a 3-D mask {mask.shape} is ambiguous; pass mask[:, None] if its first dimension is the"
            " batch, mask[None] if it is the heads"
        )
    if len(mask.shape) not in (2, 4):
        raise RuntimeError(f"attention(): mask must be 2-D or 4-D, got shape {mask.shape}")
    if any(n not in (1, full) for n, full in zip(mask.shape, scores[-len(mask.shape) :], strict=True)):
        is_padding = mask.shape == (b, key.k.shape[2])
        hint = "; a padding mask (b, kv_len) is passed as mask[:, None, None]" if is_padding else ""
        raise RuntimeError(
            f"attention(): mask {mask.shape} does not broadcast to (b, h, q_len, kv_len) = {scores}{hint}"
        )
    dtype, q_dtype = after_autocast(mask.dtype, key.state), after_autocast(key.q.dtype, key.state)
    if dtype not in (torch.bool, torch.float32, q_dtype):
        wanted = "bool or float32" if q_dtype is torch.float32 else f"bool, float32 or {dtype_name(q_dtype)} as q is"
        raise RuntimeError(f"attention(): mask must be {wanted}, got {dtype_name(mask.dtype)}")
    if mask.device != key.q.device:
        raise RuntimeError(f"attention(): mask is on {mask.device}, q on {key.q.device}")


def is_block_mask(mask: Any) -> bool:
    """Whether it is flex_attention's BlockMask; by its name, as importing it takes half a second."""
    return type(mask).__name__ == "BlockMask" and hasattr(mask, "mask_mod")


def _check_block_mask(key: CallKey) -> None:
    lengths = (key.q.shape[2], key.k.shape[2])
    if tuple(key.mask.seq_lengths) != lengths:
        raise RuntimeError(
            f"attention(): the BlockMask is for (q_len, kv_len) {tuple(key.mask.seq_lengths)}, got {lengths}"
        )
    if key.mask.kv_num_blocks.device != key.q.device:
        raise RuntimeError(f"attention(): the BlockMask is on {key.mask.kv_num_blocks.device}, q on {key.q.device}")
    check_block_mask_alone(key.options)


def check_block_mask_alone(options: CallOptions) -> None:
    """Raises ValueError where a BlockMask comes with what it could hold itself."""
    if options.is_causal or options.window:
        raise ValueError(
            "attention(): a BlockMask together with is_causal or window; put them into its mask_mod (and_masks)"
        )


def _check_bias_lengths(bias: Any, q: Tensor, k: Tensor, layout: str) -> None:
    dim = TO_BHSD[layout][2]
    lengths = (q.shape[dim], k.shape[dim])
    if (bias.seq_len_q, bias.seq_len_kv) != lengths:
        raise RuntimeError(
            f"attention(): the causal bias is for q_len {bias.seq_len_q}, kv_len {bias.seq_len_kv}, got {lengths}"
        )
