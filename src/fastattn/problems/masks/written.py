"""Masks read back from their words: the inverse of repr; and those words while torch.compile is tracing."""

from __future__ import annotations

import ast
from typing import Any

from fastattn.environment.graph_constants import as_constant
from fastattn.problems.masks.bias import Bias
from fastattn.problems.masks.combined import Combined, Intersection
from fastattn.problems.masks.mask import KINDS, Mask


def parse(text: str) -> Mask:
    """The mask that is written so: the inverse of repr. Raises ValueError on anything else."""
    try:
        return _of_node(ast.parse(text, mode="eval").body)
    except (SyntaxError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{text!r} is no mask: write one as in 'Causal() & Document(512)' ({error})") from None


def _of_node(node: ast.expr) -> Mask:
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitAnd, ast.BitOr)):
        left, right = _of_node(node.left), _of_node(node.right)
        return left & right if isinstance(node.op, ast.BitAnd) else left | right
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)) or node.func.id.startswith("_"):
        raise ValueError(f"a mask is a name with arguments, one of {', '.join(known_kinds())}")
    if node.func.id not in known_kinds():
        raise ValueError(f"there is no mask {node.func.id!r}, only {', '.join(known_kinds())}")
    named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords if keyword.arg}
    return KINDS[node.func.id](*(ast.literal_eval(value) for value in node.args), **named)


def known_kinds() -> list[str]:
    """Names of the masks that can be written down."""
    unwritten = (Combined, Bias)  # a tensor has no words
    return sorted(name for name, kind in KINDS.items() if not (name.startswith("_") or issubclass(kind, unwritten)))


def write(mask: Mask) -> str:
    """repr(mask), in steps that Dynamo can trace: it must see each number that the words hold, to guard it."""
    if isinstance(mask, Combined):
        parts = [f"({write(part)})" if isinstance(part, Combined) else write(part) for part in mask.of]
        return (" & " if isinstance(mask, Intersection) else " | ").join(parts)
    name = type(mask).__name__
    return _write(name, as_constant(tuple([getattr(mask, field) for field in _fields(name)])))


def _fields(name: str) -> tuple[str, ...]:
    return tuple(KINDS[name].__dataclass_fields__)  # type: ignore[attr-defined]


def _write(name: str, values: tuple[Any, ...]) -> str:
    made = object.__new__(KINDS[name])
    for field, value in zip(_fields(name), values, strict=True):
        object.__setattr__(made, field, value)
    return repr(made)


for _constant in (_fields, _write):  # run as plain Python while tracing: torch.compiler.assume_constant_result
    _constant._dynamo_marked_constant = True  # type: ignore[attr-defined]
