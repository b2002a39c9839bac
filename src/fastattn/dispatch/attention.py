"""attention(): the hot path, and nothing else.

A hit is: the most recent entry's probe, else the table's probes for these byte counts, then the Call. Entries are
immutable and tables are copied on write, so a hit takes no lock. Everything else is a miss (resolve.py).
"""

from __future__ import annotations

import inspect
import os
from threading import Lock
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastattn.dispatch import compiled
from fastattn.dispatch.guard import Probe, build
from fastattn.environment import settings, torch_private
from fastattn.environment.settings import on_forget

if TYPE_CHECKING:
    from fastattn.dispatch.resolve import Served

LIMIT = 4096  # entries; beyond it the tables start anew
SAME_BYTES = 32  # entries kept for one pair of byte counts
STREAK = 8  # misses in front after which only the table is asked, and equal hits after which the front is used again

_has_torch_function = torch_private.has_torch_function
_only_default_device = torch_private.only_default_device


def _address(q_bytes: int, k_bytes: int) -> int:
    """Where in the table entries with these byte counts stand; equal addresses of other problems only cost a probe."""
    return q_bytes * 31 + k_bytes


class Front:
    """The entries of one front door: attention() and sdpa() each have their own."""

    __slots__ = ("_count", "_hits", "_last", "_lock", "_misses", "first", "generation", "table")

    def __init__(self) -> None:
        self.renew()
        self.generation = 0
        self._empty()
        on_forget(self.clear)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.renew)

    def clear(self) -> None:
        """Forget all entries, and what is being resolved now: it was resolved under what no longer holds."""
        with self._lock:
            self.generation += 1
            self._empty()

    def _empty(self) -> None:
        self.table: dict[int, tuple[Probe, ...]] = {}
        self.first: Probe | None = None
        self._last: Probe | None = None
        self._hits = self._misses = self._count = 0

    def renew(self) -> None:
        """A new lock; after a fork no other thread is left that could hold the old one."""
        self._lock = Lock()

    def lookup(self, q: Tensor, k: Tensor, v: Tensor, m: Any, layout: Any, kw: Any) -> Any:
        """The Call of the entry whose probe matches, or None. Byte counts only narrow the search."""
        if _has_torch_function(q, k, v) and not _only_default_device():
            return None
        table, n = self.table, q.nbytes
        for probe in table.get(n * 31 + k.nbytes, ()):  # _address, inlined
            call = probe(q, k, v, m, layout, kw)
            if call is not None:
                if probe is self._last:
                    self._again(probe)
                else:
                    self._last, self._hits = probe, 0
                    if self.first is not None:
                        self._other()
                return call
        for probe in table.get(-n, ()):  # entries with a free kv_len
            call = probe(q, k, v, m, layout, kw)
            if call is not None:
                self._again(probe) if probe is self._last else self._other()
                self._last = probe
                return call
        return None

    def _again(self, probe: Probe) -> None:
        """The same entry as before: after a streak it is asked first."""
        self._hits += 1
        if self._hits > STREAK:
            self.first = probe
            self._hits = self._misses = 0

    def _other(self) -> None:
        """Another entry than the one asked first: after a streak of many problems only the table is asked."""
        self._hits = 0
        self._misses += 1
        if self._misses > STREAK:
            self.first = None

    def publish(
        self,
        served: Served,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        m: Any,
        layout: Any,
        kw: Any,
        generation: int | None = None,
    ) -> None:
        """Add an entry made by this very call, resolved when the front was of that generation."""
        bucket = None if k is v else served.bucket  # a free length needs k and v guarded apart
        probe = build(q, k, v, m, layout, kw, served.call, served.reads, bucket)
        name = -q.nbytes if bucket is not None else _address(q.nbytes, k.nbytes)
        with self._lock:
            if generation not in (None, self.generation):
                return
            table = {} if self._count >= LIMIT else dict(self.table)
            self._count = 1 if self._count >= LIMIT else self._count + 1
            table[name] = (probe, *table.get(name, ())[: SAME_BYTES - 1])
            self.table = table
            self.first = probe


front = Front()


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Any = None, layout: str = "bhsd", **options: Any) -> Tensor:
    """Scaled dot-product attention, by the fastest kernel on this machine that is right.

    softmax(scale * q k^T + mask) v. The first call for a kind of problem checks every installed kernel's numbers against
    float64, times those that pass and remembers the winner on disk; later calls cost about a microsecond.

    q: [batch, q_heads, q_len, head_dim]; k: [batch, kv_heads, kv_len, head_dim]; v: [batch, kv_heads, kv_len, head_dim_v]
    in layout "bhsd"; float64, float32, float16 or bfloat16, all alike. Any strides. q_heads is a multiple of kv_heads (GQA,
    MQA). Under autocast they are cast as F.scaled_dot_product_attention casts them.
    mask: None; a bool tensor (True attends) or a float tensor (added), 2-D or 4-D, broadcast to [batch, q_heads, q_len,
    kv_len]; `masks.Causal(corner)`; a causal bias of torch.nn.attention.bias; or flex_attention's BlockMask. A row that may
    attend to nothing gives zeros, and zero gradients.
    layout: of q, k, v and the output: "bhsd", "bshd" or "sbhd".

    is_causal: torch's top-left triangle, together with any mask. scale: None means head_dim ** -0.5.
    window: (left, right), keys that a query sees beside its own; -1 or None is no limit. Around the diagonal of the causal
    corner, the top-left one where nothing is causal.
    softcap: above 0, scores become softcap * tanh(scores / softcap), before the mask (Gemma 2, arXiv 2408.00118).
    dropout_p: share of the weights that are dropped, the others scaled by 1 / (1 - dropout_p); drawn from torch's generator.
    score_mod: score_mod(score, b, h, q_idx, kv_idx) -> score, as flex_attention takes it; only that kernel can.
    return_lse: return (out, lse), the natural log-sum-exp of each row's scores, float32 [batch, q_heads, q_len] in every
    layout, -inf where a row sees nothing; no gradient flows through it.
    kernel: an order: that kernel ("torch_flash", or one candidate, "torch_flash+fp32") runs or NoKernelError says why not.
    accuracy: "exact" (what a fused kernel with float32 accumulation achieves), "dtype" (plain matmul in the input's
    dtype), or the largest row error over max_d sum_j p_ij |v_jd| that is accepted. Default: `options(accuracy=)`, "exact".
    cu_seqlens_q, cu_seqlens_kv, max_q_len, max_kv_len, kv_lens and page_table are not implemented yet.

    Returns [batch, q_heads, q_len, head_dim_v] in `layout`. Raises RuntimeError, TypeError or IndexError where
    F.scaled_dot_product_attention does; ValueError for a bad layout, accuracy, window or softcap or an ambiguous mask;
    NotImplementedError for an option that is not done; NoKernelError for an order that cannot be carried out.
    """
    try:
        first = front.first
        call = first and first(q, k, v, mask, layout, options)
        if call is None:
            call = front.lookup(q, k, v, mask, layout, options)
    except Exception:
        call = None
    if call is None:
        return _miss(q, k, v, mask, layout, options)
    return call(q, k, v, mask)


def _miss(q: Any, k: Any, v: Any, mask: Any, layout: str, options: dict[str, Any]) -> Tensor:
    from fastattn.dispatch import resolve

    generation = front.generation
    served = resolve.attention(q, k, v, mask, layout, options)
    out = served.call(q, k, v, mask)
    if served.remember:
        front.publish(served, q, k, v, mask, layout, options, generation)
    return out


def _traced_winner(*facts: Any) -> str:
    from fastattn.dispatch import resolve

    return resolve.traced_winner(*facts)


def _kernel_names() -> tuple[str, ...]:
    from fastattn.kernels import registry

    return registry.names()


# What only a miss needs is imported by the first one: `import fastattn` stays cheap inside training code.
compiled.find = _traced_winner
settings.kernel_names = _kernel_names

# Dynamo inlines this twin instead, so that the hot path need not ask whether it is being traced.
attention._torchdynamo_inline = compiled.attention  # type: ignore[attr-defined]
attention.__signature__ = inspect.signature(compiled.attention)  # type: ignore[attr-defined]
