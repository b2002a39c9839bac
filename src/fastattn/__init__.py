"""fastattn: attention by the fastest kernel on this machine that is right.

    from fastattn import attention
    out = attention(q, k, v, is_causal=True, layout="bshd")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastattn import masks
from fastattn.api import attention
from fastattn.config import options
from fastattn.errors import FastattnError, NoKernelError
from fastattn.patching import Patch, patch, sdpa

if TYPE_CHECKING:
    from fastattn.explanation import Explanation, Plan, explain, plan
    from fastattn.learnt import clear
    from fastattn.prewarming import tune
    from fastattn.problem import Problem
    from fastattn.ranks import sync
    from fastattn.verdict import Verdict

__version__ = "0.1.0"
__all__ = [
    "Explanation", "FastattnError", "NoKernelError", "Patch", "Plan", "Problem", "Verdict", "attention", "clear", "explain",
    "masks", "options", "patch", "plan", "sdpa", "sync", "tune",
]  # fmt: skip

# Imported when first asked for: a program that only calls attention() pays for what a call needs.
_LATER = {
    "Explanation": "explanation", "Plan": "explanation", "explain": "explanation", "plan": "explanation",
    "clear": "learnt", "tune": "prewarming", "Problem": "problem", "sync": "ranks", "Verdict": "verdict",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'fastattn' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"fastattn.{_LATER[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
