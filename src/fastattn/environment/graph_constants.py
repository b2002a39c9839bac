"""Numbers that torch.compile takes for symbols, as the constants that they are in the graph that is being traced.

Dynamo guards what is asked here: for another number there is another graph.
"""

from __future__ import annotations

from typing import Any


def as_constant(x: Any) -> Any:
    """A number, a tuple of them, or anything else as it is."""
    from torch.fx.experimental.symbolic_shapes import guard_scalar  # imported already by whoever traces

    if isinstance(x, tuple):
        return tuple([as_constant(part) for part in x])  # pyright: ignore[reportUnknownVariableType]
    if isinstance(x, (int, float)) and not isinstance(x, bool):
        return guard_scalar(x)
    return x
