"""Attention sinks: a logit of each head that takes part in the softmax and has no value (gpt-oss, arXiv 2309.17453).

With them the output is out * sigmoid(lse - sink), of attention without them: exact for every kernel that returns the
log-sum-exp, forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.environment.text import type_name
from fastattn.problems.call_options import check_type
from fastattn.problems.layouts import LSE_IN_OUTPUT
from fastattn.problems.rewriting.rewritten import Rewritten


def of_sinks(q: Any, k: Any, v: Any, mask: Any, layout: str, options: dict[str, Any]) -> Rewritten:
    """The same call without sinks, that returns the log-sum-exp. Raises TypeError or ValueError for what are no sinks."""
    check_type("return_lse", options.get("return_lse", False), bool, "bool")
    if q.is_nested:
        raise ValueError(
            "attention(): sinks do not go with a NestedTensor: pass its values and offsets as layout='thd'"
        )
    sinks, places = options["sinks"], LSE_IN_OUTPUT[layout]
    heads = q.shape[places.index(1 if len(places) == 3 else 0)] if q.dim() > len(places) else -1
    if not isinstance(sinks, Tensor) or not sinks.is_floating_point():
        raise TypeError(
            f"attention(): sinks must be a float Tensor, one logit for each query head, got {type_name(sinks)}"
        )
    if heads >= 0 and tuple(sinks.shape) != (heads,):
        raise ValueError(
            f"attention(): sinks must be one logit for each of {heads} query heads, got {tuple(sinks.shape)}"
        )
    if sinks.device != q.device:
        raise RuntimeError(f"attention(): sinks are on {sinks.device}, q on {q.device}")
    wants_lse = options.get("return_lse", False)

    def back(found: Any) -> Any:
        out, lse = found
        logits = sinks.to(lse.dtype)[:, None]  # beside (b, h, s) or (h, t)
        share = torch.sigmoid(lse - logits).masked_fill(lse == float("-inf"), 0.0).permute(places)[..., None]
        out = (out * share).to(out.dtype)
        return (out, torch.logaddexp(lse, logits)) if wants_lse else out

    rest = {name: value for name, value in options.items() if name != "sinks"}
    return Rewritten(q, k, v, mask, layout, {**rest, "return_lse": True}, back)
