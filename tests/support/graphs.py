"""What tests of compiled code share: a backend that runs graphs as they are and counts them, calls, and stored winners."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import fastattn
from fastattn import attention
from fastattn.dispatch import tune_now
from fastattn.dispatch.session import session
from fastattn.environment.device import Device
from fastattn.environment.settings import current_settings
from fastattn.verdicts.verdict import Trial, Verdict


class Graphs:
    """A backend of torch.compile; how many graphs there were, and their operators."""

    def __init__(self):
        self.count, self.operators = 0, Counter()

    def __call__(self, graph, _):
        return self.of(graph).forward

    def of(self, graph):
        """The graph, counted."""
        self.count += 1
        self.operators.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    def calls(self, name):
        """How many calls of operators with this in their names."""
        return sum(n for operator, n in self.operators.items() if name in operator)

    def has(self, name):
        return self.calls(name) > 0


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(tune_now, "tune_and_keep", lambda *_, **__: pytest.fail("tuned"))
    with fastattn.options.scope(mode="cached"):
        yield
    torch._dynamo.reset()


def compiled(call, **options):
    graphs = Graphs()
    return torch.compile(call, backend=graphs, fullgraph=True, **options), graphs


def store(winner, *given, lengths="exact", **options):
    """Put a verdict for this call, or its bucket, into the store: this candidate won."""
    problem = fastattn.explain(*given, **options).problem.bucketed(lengths)
    verdict = Verdict(problem, winner, (Trial("default", time_us=9.0), Trial(winner, time_us=1.0)))
    session.store(current_settings()).put(verdict, Device.of(given[0].device))
    fastattn.clear()
    return problem


def qkv(q_len=24, kv_len=None, *, batch=2, heads=4, kv_heads=2, dim=16, grad=False, layout="bhsd"):
    sizes = ((batch, heads, q_len, dim), *[(batch, kv_heads, kv_len or q_len, dim)] * 2)
    order = {"bhsd": (0, 1, 2, 3), "bshd": (0, 2, 1, 3), "sbhd": (2, 0, 1, 3)}[layout]
    return [torch.randn(size).permute(order).contiguous().requires_grad_(grad) for size in sizes]


def exact(q, k, v, *given, **options):
    """attention() in float64, eagerly."""
    found = attention(*(x.detach().double() for x in (q, k, v)), *given, **options)
    return tuple(x.float() for x in found) if isinstance(found, tuple) else found.float()
