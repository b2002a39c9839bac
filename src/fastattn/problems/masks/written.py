"""Masks read back from their words: the inverse of repr; and those words while torch.compile is tracing."""

from __future__ import annotations

import ast
from typing import Any

from fastattn.environment.graph_constants import as_constant
from fastattn.problems.masks.alibi import ALiBi
from fastattn.problems.masks.band import Causal, Window
from fastattn.problems.masks.combined import Combined, Intersection, leaves
from fastattn.problems.masks.mask import Mask
from fastattn.problems.masks.packed import Filled, Packed
from fastattn.problems.masks.pages import FilledPagesUnread
from fastattn.problems.masks.patterns import Chunked, Dilated, Global, Neighborhood
from fastattn.problems.masks.sequences import Document, Padding, Prefix
from fastattn.problems.masks.unread import FilledUnread, PackedUnread

_WRITTEN = (  # all but Bias and Static: a tensor has no words
    ALiBi, Causal, Chunked, Dilated, Document, Filled, FilledPagesUnread, FilledUnread, Global, Neighborhood, Packed,
    PackedUnread, Padding, Prefix, Window,
)  # fmt: skip
KINDS: dict[str, Any] = {kind.__name__: kind for kind in _WRITTEN}


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
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        raise ValueError(f"a mask is a name with arguments, one of {', '.join(KINDS)}")
    if node.func.id not in KINDS:
        raise ValueError(f"there is no mask {node.func.id!r}, only {', '.join(KINDS)}")
    named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords if keyword.arg}
    return KINDS[node.func.id](*(ast.literal_eval(value) for value in node.args), **named)


def has_words(mask: Mask) -> bool:
    """Whether it can be written down and read back."""
    return all(type(leaf).__name__ in KINDS for leaf in leaves(mask))


def write(mask: Mask) -> str:
    """repr(mask), in steps that Dynamo can trace: it must see each number that the words hold, to guard it."""
    if isinstance(mask, Combined):
        parts = [f"({write(part)})" if isinstance(part, Combined) else write(part) for part in mask.of]
        return (" & " if isinstance(mask, Intersection) else " | ").join(parts)
    name = type(mask).__name__
    return _write(name, as_constant(tuple([getattr(mask, field) for field in _fields(name)])))


def _fields(name: str) -> tuple[str, ...]:
    return tuple(KINDS[name].__dataclass_fields__)


def _write(name: str, values: tuple[Any, ...]) -> str:
    made = object.__new__(KINDS[name])
    for field, value in zip(_fields(name), values, strict=True):
        object.__setattr__(made, field, value)
    return repr(made)


for _constant in (_fields, _write):  # run as plain Python while tracing: torch.compiler.assume_constant_result
    _constant._dynamo_marked_constant = True  # type: ignore[attr-defined]
