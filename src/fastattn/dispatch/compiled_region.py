"""A candidate as it runs in a compiled model, which `fastattn tune --compiled` judges and times.

Its Call is compiled by Inductor, or it is the operator fastattn::attend where it would be that in a model's graph. Each is a
graph of its own: what Inductor makes of the casts, copies and products in it counts; what it would fuse with a model's layers
does not.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from fastattn.dispatch import fallback
from fastattn.planning.binding import Call
from fastattn.planning.decision import Accepted
from fastattn.problems import masks
from fastattn.problems.call_options import CallOptions
from fastattn.problems.problem import Problem


class Region:
    """region(candidate, problem, scale, its Call) -> the Call of compiled code, for the tuning of one problem."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def __call__(self, candidate: Accepted, p: Problem, scale: float | None, call: Call) -> Call:
        if not is_operator(candidate, p):
            return compiled(_with_code(call))
        if p != self._problem or p.page_size:  # a page table has no words
            return call  # the operator runs it; of a smaller problem it may be no candidate that can be ordered
        return _with_forward(call) if p.needs_grad else compiled(_operator(candidate.name, p, scale))


def is_operator(candidate: Accepted, p: Problem) -> bool:
    """Whether a candidate is fastattn::attend in a graph: as compiled.attention() decides."""
    is_mask_made = candidate.kernel.name == "default" and p.window is not None and p.q_len > 1
    return bool(p.structure) or is_mask_made or not fallback.stands_in_graph(candidate.kernel, candidate.name, p)


def _with_forward(call: Call) -> Call:
    """What the operator costs in training: a forward without a graph, and all of it again.

    It cannot be ordered by name: that forward is of a problem without gradients, of which this may be no candidate.
    """

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Any:
        with torch.no_grad():
            call(q, k, v, mask)
        return call(q, k, v, mask)

    return run


def _with_code(call: Call) -> Any:
    def run(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Any:  # the default's Call is torch's own function
        return call(q, k, v, mask)

    return run


def compiled(function: Any) -> Call:
    """The function by Inductor, in one graph of static sizes."""
    # With a code object of its own: else Dynamo counts all candidates as graphs of one function, and gives up after eight.
    own = FunctionType(function.__code__.replace(), function.__globals__, closure=function.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False)


def _operator(name: str, p: Problem, scale: float | None) -> Any:
    """The operator with an order of this candidate."""
    from fastattn.dispatch import graph_op

    lower_right = masks.Causal("bottom_right") if p.causal == "bottom_right" else None
    told = p.told_mask if p.structure else lower_right
    options = CallOptions(
        is_causal=p.causal == "top_left", scale=scale, kernel=name, accuracy=p.accuracy,
        window=p.window, softcap=p.softcap, return_lse=p.lse,
    )  # fmt: skip
    is_cast, device, dtype, layout, attend = bool(p.cast_from), p.device, p.torch_dtype, p.layout, graph_op.attend

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Any:
        with torch.autocast(device, dtype=dtype, enabled=is_cast):
            return attend(q, k, v, mask if told is None else told, layout, options, {})

    return call
