"""Jagged NestedTensors: packed sequences that know their lengths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.problems.rewriting.rewritten import Rewritten
from fastattn.problems.rewriting.sequences import of_packed


def is_jagged(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_nested and x.layout is torch.jagged


def of_jagged(q: Any, k: Any, v: Any, mask: Any, layout: str, options: dict[str, Any]) -> Rewritten:
    """A jagged NestedTensor, [batch, ragged, heads, head_dim] in layout "bshd", its transpose(1, 2) in "bhsd"."""
    if layout not in ("bhsd", "bshd") or not (is_jagged(k) and is_jagged(v)):
        raise ValueError(f"attention(): q, k and v are all jagged, in layout 'bhsd' or 'bshd'; got layout {layout!r}")
    if options.get("return_lse"):
        raise ValueError("attention(): return_lse of a NestedTensor: pass its values and offsets as layout='thd'")
    q, k, v = (x.transpose(1, 2) if layout == "bhsd" else x for x in (q, k, v))
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4 or x._ragged_idx != 1 or x.lengths() is not None:
            raise ValueError(
                f"attention(): {name} must be [batch, ragged, heads, head_dim] without holes in layout 'bshd', or its"
                f" transpose(1, 2) in 'bhsd'; got shape {tuple(x.shape)}"
            )
    offsets = q.offsets()
    if v.offsets() is not k.offsets() and not torch.equal(v.offsets(), k.offsets()):
        raise ValueError("attention(): k and v are NestedTensors of other lengths, they must be of the same")
    packed = of_packed(
        q.values(), k.values(), v.values(), mask,
        options,
        offsets, offsets if k.offsets() is offsets else k.offsets(), None, None, True,
    )  # fmt: skip

    def back(found: Any) -> Tensor:
        out = torch.nested.nested_tensor_from_jagged(found[0], offsets)
        return out.transpose(1, 2) if layout == "bhsd" else out

    return packed._replace(back=back)
