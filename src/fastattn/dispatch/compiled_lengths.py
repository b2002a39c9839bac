"""Sizes that are symbols of a dynamic graph, said in plain values: letters for the lengths, strides as products of sizes.

A lookup whose result is a constant of the graph takes them, and answers with the buckets for which a winner is stored
(compiled_buckets.py). Only with those are lengths compared while torch.compile is tracing: Dynamo's guards are ranges then, and
one graph serves a bucket. Where nothing is stored, nothing is compared, and there is one graph as with F.sdpa.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false, has_static_value, statically_known_true

from fastattn.environment import torch_private
from fastattn.environment.graph_constants import as_constant
from fastattn.problems.layouts import TO_BHSD


def is_static(*tensors: Any) -> bool:
    """Whether every size is a plain number, not a symbol of a dynamic graph. A product or sum of symbols is no number."""
    for x in tensors:
        if isinstance(x, Tensor) and not (has_static_value(x.numel()) and has_static_value(sum(x.stride()))):
            return False
    return True


def in_letters(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, layout: str) -> tuple[Any, Any] | None:
    """((shape, stride, dtype, device, requires_grad) of each, the known "b", "q" and "k"); None where that cannot be said.

    A shape has these letters for its batch and lengths; a stride that is a symbol is (i,): the size times the stride of
    dimension i. Shapes and strides are those of the (b, h, s, d) view. Known is a number, or 0 of a symbol.
    """
    if not (q.dim() == k.dim() == v.dim() == 4) or torch.compiler.is_exporting() or not may_compare():
        return None
    order = TO_BHSD[layout]
    batch, q_len, kv_len = sizes(q, k, layout)
    found = [
        _facts(q, order, (batch, 0, q_len, 0), ("b", "", "q", "")),
        _facts(k, order, (batch, 0, kv_len, 0), ("b", "", "k", "")),
        _facts(v, order, (batch, 0, kv_len, 0), ("b", "", "k", "")),
        (),
    ]
    if mask is not None:
        n = mask.dim()
        if n not in (2, 4):
            return None
        found[3] = _facts(mask, range(n), (batch, 0, q_len, kv_len)[4 - n :], ("b", "", "q", "k")[4 - n :])
    if None in found:
        return None
    return tuple(found), tuple([as_constant(n) if has_static_value(n) else 0 for n in (batch, q_len, kv_len)])


def sizes(q: Tensor, k: Tensor, layout: str) -> tuple[Any, Any, Any]:
    """(batch, q_len, kv_len)."""
    b, _, s, _ = TO_BHSD[layout]
    return q.shape[b], q.shape[s], k.shape[s]


def _facts(x: Tensor, order: Any, wanted: Any, letters: Any) -> tuple[Any, ...] | None:
    """One tensor's, None where a size is another symbol, or a stride that says nothing for all lengths."""
    sizes, strides = [x.shape[i] for i in order], [x.stride(i) for i in order]
    shape: list[Any] = []
    for i in range(len(sizes)):
        if letters[i] and guard_or_false(sizes[i] == wanted[i]):  # F.sdpa asks the same
            shape.append(letters[i])
        elif has_static_value(sizes[i]):
            shape.append(as_constant(sizes[i]))
        else:
            return None
    steps: list[Any] = [as_constant(n) if has_static_value(n) else None for n in strides]
    for _ in strides:  # only by what is known already: with sizes of 1 two strides may be each other's
        for i in range(len(strides)):
            if steps[i] is None:
                known = [j for j in range(len(strides)) if steps[j] is not None]
                inner = [j for j in known if statically_known_true(strides[i] == sizes[j] * strides[j])]
                steps[i] = (inner[0],) if inner else None
    if None in steps:
        return None
    return tuple(shape), tuple(steps), x.dtype, x.device, x.requires_grad


def lies_in(box: Any, q: Tensor, k: Tensor, layout: str) -> bool:
    """Whether a call's lengths lie in a Box, by comparisons that become guards; no where a size has no value yet."""
    for n, (low, high) in zip(sizes(q, k, layout), box[:3]):  # noqa: B905  # Dynamo of torch 2.11 knows no strict=
        if has_static_value(n):
            if not low <= as_constant(n) <= high:
                return False
        elif not (guard_or_false(n >= low) and guard_or_false(n <= high)):
            return False
    _, q_len, kv_len = sizes(q, k, layout)
    order = box[3]
    if order == "=":
        return guard_or_false(q_len == kv_len)
    return guard_or_false(q_len < kv_len) if order == "<" else guard_or_false(q_len > kv_len)


def may_compare() -> bool:
    """Whether a length may be compared: not where the caller said that one graph is for a range of his own."""
    return not torch_private.has_strict_ranges()


may_compare._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as compiled.winner


COMPTIME: Any = torch_private.private("comptime")


def note_lengths(q: Tensor, k: Tensor, layout: str) -> None:
    """Note the lengths of the call that is traced for met_lengths(), without a guard. _note() reads what it was given."""
    if COMPTIME is not None:
        COMPTIME(_note)


def _note(context: Any) -> None:
    """Run while note_lengths() is traced. A private interface: if it is another one, no miss is recorded."""
    try:
        layout = context.get_local("layout").as_python_constant()
        found = sizes(context.get_local("q").as_fake(), context.get_local("k").as_fake(), layout)
        _met[:] = [n if isinstance(n, int) else n.node.hint for n in found]
    except Exception:
        _met.clear()


_met: list[int] = []


def met_lengths() -> tuple[int, int, int] | None:
    """(batch, q_len, kv_len) that note_lengths() noted."""
    found = tuple(_met)
    _met.clear()
    return (found[0], found[1], found[2]) if len(found) == 3 else None
