"""attention(): the hot path, and nothing else.

A hit is: the guard of the most recent entry, else the table's guards for these byte counts, then the Call. Everything else is
a miss (resolve.py), which imports what only it needs: `import fastattn` stays cheap inside training code.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from fastattn.dispatch.entries import Entries, no_tensors
from fastattn.environment import settings, torch_private

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastattn.dispatch.resolve import Resolved
    from fastattn.problems.given_options import GivenOptions


def _resolve(q: Any, k: Any, v: Any, mask: Any, layout: str, options: dict[str, Any]) -> Resolved:
    from fastattn.dispatch import resolve

    return resolve.attention(q, k, v, mask, layout, options)


entries = Entries(_resolve)


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any = None,
    layout: str = "bhsd",
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[GivenOptions],
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any = None,
    layout: str = "bhsd",
    *,
    return_lse: Literal[True],
    **options: Unpack[GivenOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Any = None, layout: str = "bhsd",
    *, return_lse: bool, **options: Unpack[GivenOptions],
) -> Any: ...  # fmt: skip
def attention(q: Tensor, k: Tensor, v: Tensor, mask: Any = None, layout: str = "bhsd", **options: Any) -> Any:
    """Scaled dot-product attention, by the fastest kernel on this machine that is right.

    softmax(scale * q k^T + mask) v. The first call for a kind of problem checks every installed kernel's numbers against
    float64, times those that pass and remembers the winner on disk; later calls cost about a microsecond.

    q: [batch, q_heads, q_len, head_dim]; k: [batch, kv_heads, kv_len, head_dim]; v: [batch, kv_heads, kv_len, head_dim_v]
    in layout "bhsd"; float64, float32, float16 or bfloat16, all alike. Any strides. q_heads is a multiple of kv_heads (GQA,
    MQA). Under autocast they are cast as F.scaled_dot_product_attention casts them.
    mask: None; a bool tensor (True attends) or a float tensor (added), 2-D or 4-D, broadcast to [batch, q_heads, q_len,
    kv_len]; a value of `fastattn.masks`, as `masks.Causal() & masks.Document(lengths)`; a causal bias of
    torch.nn.attention.bias; or flex_attention's BlockMask. A row that may attend to nothing gives zeros, and zero gradients.
    layout: of q, k, v and the output: "bhsd", "bshd" or "sbhd"; or "thd", packed sequences [tokens, heads, head_dim].

    is_causal: torch's top-left triangle, together with any mask. scale: None means head_dim ** -0.5.
    window: (left, right), keys that a query sees beside its own; -1 or None is no limit. Around the diagonal of the causal
    corner, the top-left one where nothing is causal.
    softcap: above 0, scores become softcap * tanh(scores / softcap), before the mask (Gemma 2, arXiv 2408.00118).
    dropout_p: share of the weights that are dropped, the others scaled by 1 / (1 - dropout_p); drawn from torch's generator.
    score_mod: score_mod(score, b, h, q_idx, kv_idx) -> score, as flex_attention takes it; only that kernel can.
    return_lse: return (out, lse), the natural log-sum-exp of each row's scores, float32 [batch, q_heads, q_len] in every
    layout, -inf where a row sees nothing. It has a gradient; `fastattn.merge` puts parts of the keys together by it.
    sinks: float [q_heads], a logit of each head that takes part in the softmax and has no value (gpt-oss); with a gradient.
    kernel: an order: that kernel ("torch_flash", or one candidate, "torch_flash+fp32") runs or NoKernelError says why not.
    accuracy: "exact" (what a fused kernel with float32 accumulation achieves), "dtype" (plain matmul in the input's
    dtype), or the largest row error over max_d sum_j p_ij |v_jd| that is accepted. Default: `options(accuracy=)`, "exact".
    cu_seqlens_q, cu_seqlens_kv: for "thd", where each sequence begins and the end of the last, int [sequences + 1]; keys as
    queries where the second is None. is_causal, masks.Causal(...) and window hold within each sequence. max_q_len,
    max_kv_len: the longest sequence, where it is known. lse is then [q_heads, tokens].
    kv_lens: how much of each batch entry's k and v is filled, int [batch]; the rest is neither read nor seen.
    masks.Causal("bottom_right") then means that the queries are the last of the filled keys.
    page_table: int [batch, pages], k and v being pages [pages, kv_heads, page size, head_dim], or in "bshd" [pages,
    page size, kv_heads, head_dim]; the pages of an entry are its cache, filled to kv_lens.
    A jagged NestedTensor is packed sequences as well: [batch, ragged, heads, head_dim] in "bshd", its transpose(1, 2) in
    "bhsd"; so is the output.

    Returns [batch, q_heads, q_len, head_dim_v] in `layout`. Raises RuntimeError, TypeError or IndexError where
    F.scaled_dot_product_attention does; ValueError for a bad layout, accuracy, window or softcap or an ambiguous mask;
    NotImplementedError for an option that is not done; NoKernelError for an order that cannot be carried out.
    """
    try:
        call = entries.first(q, k, v, mask, layout, options)
    except Exception as error:
        call = no_tensors(error)
    if call is None:
        return entries.call(q, k, v, mask, layout, options)
    return call(q, k, v, mask)


def _traced(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any = None,
    layout: str = "bhsd",
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    window: Any = None,
    softcap: float = 0.0,
    score_mod: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_kv: Any = None,
    max_q_len: Any = None,
    max_kv_len: Any = None,
    kv_lens: Any = None,
    page_table: Any = None,
    sinks: Any = None,
    return_lse: bool = False,
    kernel: str | None = None,
    accuracy: str | float | None = None,
) -> Any:
    """What Dynamo inlines instead, so that the hot path need not ask whether it is being traced."""
    from fastattn.dispatch import compiled

    given = {
        "dropout_p": dropout_p,
        "window": window,
        "softcap": softcap,
        "score_mod": score_mod,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_kv": cu_seqlens_kv,
        "max_q_len": max_q_len,
        "max_kv_len": max_kv_len,
        "kv_lens": kv_lens,
        "page_table": page_table,
        "sinks": sinks,
        "return_lse": return_lse,
        "is_causal": is_causal,
        "scale": scale,
        "kernel": kernel,
        "accuracy": accuracy,
    }
    return compiled.attention(q, k, v, mask, layout, given)


torch_private.trace_instead(attention, _traced)
torch_private.run_as_python(attention)
attention.__signature__ = inspect.signature(_traced)  # type: ignore[attr-defined]


def _check_kernel_name(name: str) -> None:
    from fastattn.kernels import registry

    registry.check_name(name)


settings.on_kernel_name(_check_kernel_name)
