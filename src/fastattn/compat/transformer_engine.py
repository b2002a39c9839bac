"""DotProductAttention of transformer_engine.pytorch: its arguments, masks and corners, without its FP8 and context parallelism.

What is not there raises NotImplementedError with the option's name.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from fastattn.dispatch.attention import attention
from fastattn.problems import masks

FORMATS = ("sbhd", "bshd", "thd")
MASK_TYPES = (
    "no_mask", "padding", "causal", "causal_bottom_right", "padding_causal", "padding_causal_bottom_right", "arbitrary",
)  # fmt: skip
_ALSO = {"padding,causal": "padding_causal", "causal,padding": "padding_causal"}
# Arguments that only these values of are served.
_ALONE: dict[str, tuple[Any, ...]] = {
    "attention_type": ("self", "cross"), "sequence_parallel": (False,), "tp_size": (1,), "softmax_type": ("vanilla",),
    "return_max_logit": (None, False), "checkpoint_core_attention": (False,), "fast_zero_fill": (True, False),
    "pad_between_seqs": (None, False), "fp8_output": (None, False), "bf16_backward": (None, False), "num_splits": (None, 1),
    "qkv_interleave_dim": (-3,), "output_final_state": (False,), "use_qk_l2norm_in_kernel": (False,),
}  # fmt: skip
_NO_MATTER = ("layer_number", "name", "get_rng_state_tracker")  # they change no number here
_OF_INIT = ("attention_type", "sequence_parallel", "tp_size", "tp_group", "cp_group", "cp_global_ranks", "cp_stream",
            "cp_comm_type", "softmax_type", "return_max_logit", *_NO_MATTER)  # fmt: skip
_OF_FORWARD = (
    "cu_seqlens_q_padded", "cu_seqlens_kv_padded", "checkpoint_core_attention", "alibi_slopes", "fast_zero_fill",
    "inference_params", "pad_between_seqs", "fp8_output", "bf16_backward", "num_splits", "score_mod", "score_mod_bprop",
    "score_mod_tensors", "score_mod_bprop_tensors", "qkv_layer", "kv_layer", "qkv_interleave_dim", "g", "beta",
    "initial_state", "output_final_state", "use_qk_l2norm_in_kernel",
)  # fmt: skip


class DotProductAttention(torch.nn.Module):
    """Attention of q, k and v [s, b, heads, head_dim] (or "bshd", "thd"), output [s, b, heads * head_dim_v].

    kv_channels: head_dim, or (that of q and k, that of v). attention_dropout drops in training alone. What is about context or
    tensor parallelism, FP8, sinks and packed inputs raises NotImplementedError.
    """

    def __init__(
        self, num_attention_heads: int, kv_channels: int | tuple[int, int], num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0, qkv_format: str = "sbhd", attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None, *, bottom_right_diagonal: bool | None = None,
        softmax_scale: float | None = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        _check_options("DotProductAttention", options, _OF_INIT)
        self.heads = (num_attention_heads, num_gqa_groups or num_attention_heads)
        self.attention_dropout, self.softmax_scale = attention_dropout, softmax_scale
        self.qkv_format, self.attn_mask_type, self.window_size = qkv_format, _mask_type(attn_mask_type), window_size
        self.bottom_right_diagonal, self.kv_channels = bottom_right_diagonal, kv_channels

    def forward(
        self, query_layer: Tensor, key_layer: Tensor, value_layer: Tensor,
        attention_mask: Tensor | tuple[Tensor, Tensor] | None = None, qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None, cu_seqlens_kv: Tensor | None = None,
        *, max_seqlen_q: int | None = None, max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None, window_size: tuple[int, int] | None = None,
        bottom_right_diagonal: bool | None = None, core_attention_bias_type: str = "no_bias",
        core_attention_bias: Tensor | None = None, **options: Any,
    ) -> Tensor:  # fmt: skip
        """Attention. attention_mask: True hides; it broadcasts to the scores for "arbitrary".

        For "padding" it is [batch, 1, 1, length], or two such, of queries and of keys.

        With "padding" the lengths may be given by cu_seqlens_q and cu_seqlens_kv instead; rows of padding are zeros. A window
        lies at the lower right, but with "causal" and "padding_causal". What stands behind cu_seqlens_kv is given by name.
        Raises ValueError for a format, a mask type or shapes that do not fit, NotImplementedError for what is not served.
        """
        _check_options("DotProductAttention.forward", options, _OF_FORWARD)
        form = qkv_format or self.qkv_format
        if form not in FORMATS:
            raise ValueError(f"DotProductAttention: qkv_format must be one of {', '.join(FORMATS)}, got {form!r}")
        heads = query_layer.shape[-2], key_layer.shape[-2]
        if heads != self.heads:
            raise ValueError(f"DotProductAttention: made for (query heads, groups) {self.heads}, got {heads}")
        kind = self.attn_mask_type if attn_mask_type is None else _mask_type(attn_mask_type)
        at_end = self.bottom_right_diagonal if bottom_right_diagonal is None else bottom_right_diagonal
        usual = kind not in ("causal", "padding_causal")
        if at_end is not None and at_end != usual:
            raise NotImplementedError(f"DotProductAttention: bottom_right_diagonal={at_end} with {kind!r}")
        window = _window(self.window_size if window_size is None else window_size, kind)
        q, k, v = query_layer, key_layer, value_layer
        bias = _bias(core_attention_bias_type, core_attention_bias)
        given: dict[str, Any] = {
            "scale": self.softmax_scale,
            "dropout_p": self.attention_dropout if self.training else 0.0,
        }
        if form == "thd":
            if bias is not None or attention_mask is not None or "padding" not in kind or cu_seqlens_q is None:
                raise ValueError(
                    "DotProductAttention: thd goes with cu_seqlens_q and a mask type of padding, and no attention_mask or bias"
                )
            if window is not None and "causal" not in kind:
                raise NotImplementedError("DotProductAttention: window_size with thd needs a causal mask type")
            lengths = {"max_q_len": max_seqlen_q, "max_kv_len": max_seqlen_kv, "window": window}
            ends = cu_seqlens_q, cu_seqlens_q if cu_seqlens_kv is None else cu_seqlens_kv
            out = attention(
                q, k, v, _corner(kind), "thd", cu_seqlens_q=ends[0], cu_seqlens_kv=ends[1], **lengths, **given
            )
            return out.flatten(-2)
        seen: Any = _corner(kind)
        if kind == "arbitrary" or "padding" in kind or window is not None or bias is not None:
            at = form.index("s"), form.index("b")
            sizes = q.shape[at[1]], q.shape[at[0]], k.shape[at[0]]
            hidden = (
                _padding(attention_mask, (cu_seqlens_q, cu_seqlens_kv), sizes, q.device) if "padding" in kind else None
            )
            seen = _seen(kind, window, hidden, attention_mask, sizes, q.device)
        if bias is not None:
            seen = bias.to(q.dtype) if seen is None else bias.to(q.dtype).masked_fill(~seen, float("-inf"))
        return attention(q, k, v, seen, form, **given).flatten(-2)


def _mask_type(given: str) -> str:
    found = _ALSO.get(given, given)
    if found not in MASK_TYPES:
        raise ValueError(f"DotProductAttention: attn_mask_type must be one of {', '.join(MASK_TYPES)}, got {given!r}")
    return found


def _corner(kind: str) -> masks.Causal | None:
    if "causal" not in kind:
        return None
    return masks.Causal("bottom_right" if kind.endswith("bottom_right") else "top_left")


def _window(given: tuple[int, int] | None, kind: str) -> tuple[int, int] | None:
    """(left, right) of keys beside a query's own, -1 for no limit; None where neither has one but the triangle's own."""
    left, right = (-1, -1) if given is None else given
    if (left, right) == (-1, -1) or ("causal" in kind and left == -1 and right == 0):
        return None
    if kind == "arbitrary" or (left, right) == (-1, 0):
        raise ValueError(f"DotProductAttention: window_size {(left, right)} does not go with attn_mask_type {kind!r}")
    return left, right


def _bias(kind: str, bias: Tensor | None) -> Tensor | None:
    if kind not in ("no_bias", "post_scale_bias"):
        raise NotImplementedError(f"DotProductAttention: core_attention_bias_type={kind!r}")
    if (bias is None) != (kind == "no_bias"):
        raise ValueError(f"DotProductAttention: core_attention_bias does not go with core_attention_bias_type={kind!r}")
    return bias


def _padding(
    mask: Any, ends: tuple[Tensor | None, Tensor | None], sizes: tuple[int, int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Which queries [batch, q_len] and keys [batch, kv_len] are padding."""
    batch, q_len, kv_len = sizes
    if mask is not None:
        of_q, of_k = mask if isinstance(mask, (tuple, list)) else (mask, mask)
        return of_q.reshape(batch, q_len), of_k.reshape(batch, kv_len)
    if ends[0] is None:
        raise ValueError("DotProductAttention: padding needs an attention_mask or cu_seqlens_q")
    lengths = [(e if e is not None else ends[0]).diff().to(device) for e in ends]
    places = (torch.arange(n, dtype=torch.int64, device=device) for n in (q_len, kv_len))
    of_q, of_k = (place >= n[:, None] for place, n in zip(places, lengths, strict=True))
    return of_q, of_k


def _seen(
    kind: str, window: tuple[int, int] | None, hidden: tuple[Tensor, Tensor] | None, mask: Any, sizes: tuple[int, int, int],
    device: torch.device,
) -> Tensor | None:  # fmt: skip
    """What a query sees: a bool tensor that broadcasts to (batch, heads, q_len, kv_len), None where it sees all."""
    if kind == "arbitrary":
        if not isinstance(mask, Tensor):
            raise ValueError("DotProductAttention: attn_mask_type 'arbitrary' needs an attention_mask")
        return ~mask
    _, q_len, kv_len = sizes
    row, key = (torch.arange(n, dtype=torch.int64, device=device) for n in (q_len, kv_len))
    row = row[None, None, :, None]
    if kind not in (
        "causal",
        "padding_causal",
    ):  # the diagonal ends at the last query and the last key that are no padding
        if hidden is None:
            row = row + kv_len - q_len
        else:
            row = row + ((~hidden[1]).sum(1) - (~hidden[0]).sum(1))[:, None, None, None]
    parts = [key <= row] if "causal" in kind else []
    if window is not None:
        parts += [key >= row - window[0]] if window[0] >= 0 else []
        parts += [key <= row + window[1]] if window[1] >= 0 else []
    parts += [~hidden[0][:, None, :, None], ~hidden[1][:, None, None, :]] if hidden is not None else []
    return reduce(torch.Tensor.logical_and, parts) if parts else None


def _check_options(function: str, options: dict[str, Any], known: tuple[str, ...]) -> None:
    """Raises TypeError for an unknown name, NotImplementedError for a value that is not served."""
    for name, value in options.items():
        if name not in known:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
        served = _ALONE.get(name, (None,))
        if name not in _NO_MATTER and (isinstance(value, Tensor) or value not in served):
            raise NotImplementedError(f"{function}: {name}={value!r}")
