"""fastattn: attention by the fastest kernel on this machine that is right.

from fastattn import attention
out = attention(q, k, v, is_causal=True, layout="bshd")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastattn.dispatch.attention import attention
from fastattn.dispatch.patching import Patch, patch, sdpa
from fastattn.environment.errors import FastattnError, NoKernelError
from fastattn.environment.settings import options
from fastattn.problems import masks

if TYPE_CHECKING:
    from fastattn.dispatch.ahead import tune
    from fastattn.dispatch.explain import Explanation, Plan, explain, plan
    from fastattn.dispatch.ranks import sync
    from fastattn.dispatch.session import clear
    from fastattn.problems.problem import Problem
    from fastattn.verdicts.verdict import Verdict

__version__ = "0.1.0"
__all__ = [
    "Explanation", "FastattnError", "NoKernelError", "Patch", "Plan", "Problem", "Verdict", "attention", "clear", "explain",
    "masks", "options", "patch", "plan", "sdpa", "sync", "tune",
]  # fmt: skip

# Imported when first asked for: a program that only calls attention() pays for what a call needs.
_LATER = {
    "Explanation": "dispatch.explain", "Plan": "dispatch.explain", "explain": "dispatch.explain", "plan": "dispatch.explain",
    "clear": "dispatch.session", "tune": "dispatch.ahead", "sync": "dispatch.ranks",
    "Problem": "problems.problem", "Verdict": "verdicts.verdict",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'fastattn' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"fastattn.{_LATER[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
