"""Masks read back from their words: the inverse of repr."""

from __future__ import annotations

import ast

from fastattn.problems.masks.bias import Bias
from fastattn.problems.masks.combined import Combined
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
