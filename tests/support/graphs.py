"""A backend of torch.compile that runs graphs as they are, and knows how many there were and their operators."""

from __future__ import annotations

from collections import Counter


class Graphs:
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
