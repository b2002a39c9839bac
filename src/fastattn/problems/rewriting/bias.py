"""A Bias beside other masks: one dense float mask, in which attention() finds what they hide."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from fastattn.problems import masks
from fastattn.problems.call_key import told
from fastattn.problems.call_options import parse_options
from fastattn.problems.layouts import TO_BHSD
from fastattn.problems.rewriting.rewritten import Rewritten, as_it_is


def of_bias(q: Tensor, k: Tensor, v: Tensor, mask: masks.Mask, layout: str, options: dict[str, Any]) -> Rewritten:
    """The same call with a tensor as its mask. Raises ValueError where a bias does not fit."""
    if q.dim() != 4 or k.dim() != 4 or layout == "thd":
        raise ValueError("attention(): masks.Bias goes with q, k and v of four dimensions, bhsd, bshd or sbhd")
    b, h, s, _ = TO_BHSD[layout]
    sizes = q.shape[b], q.shape[h], q.shape[s], k.shape[s]
    mask.check(*sizes)
    _, _, also = told(mask, parse_options(options))  # raises where mask and options do not go together
    mask = mask if also is None else mask & also  # around the diagonal of the mask's own corner
    options = {name: value for name, value in options.items() if name not in ("is_causal", "window")}
    others, (bias, *rest) = [part for part in mask.parts() if not part.added()], mask.added()
    if not rest and set(others) <= {masks.Causal()}:
        more = {"is_causal": True} if others else {}
        return Rewritten(q, k, v, bias, layout, {**options, **more}, as_it_is)
    dense = mask.dense(sizes[0], *sizes[2:], q.device)
    return Rewritten(q, k, v, dense.to(_dtype(mask)), layout, options, as_it_is)


def _dtype(mask: masks.Mask) -> torch.dtype:
    """Of all that is added: what grows with the distance is not rounded to half precision."""
    return reduce(torch.promote_types, [x.dtype for x in mask.added()] + [torch.float32] * (mask.heads() > 0))
