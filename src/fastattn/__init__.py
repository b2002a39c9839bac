"""fastattn: attention by the fastest kernel on this machine that is right.

from fastattn import attention
out = attention(q, k, v, is_causal=True, layout="bshd")
"""

from typing import TYPE_CHECKING

from fastattn.dispatch.attention import attention
from fastattn.environment.later import imported_later
from fastattn.environment.version import __version__ as __version__

if TYPE_CHECKING:
    from fastattn.dispatch.ahead import tune
    from fastattn.dispatch.by_layer import Report, report
    from fastattn.dispatch.explain import Explanation, explain
    from fastattn.dispatch.kv_cache import KVCache
    from fastattn.dispatch.patching import Patch, patch, unpatch
    from fastattn.dispatch.patching_models import ModelPatch
    from fastattn.dispatch.plan import Plan, plan
    from fastattn.dispatch.ranks import sync
    from fastattn.dispatch.sdpa import sdpa
    from fastattn.dispatch.session import clear
    from fastattn.dispatch.stats import Stats, stats
    from fastattn.environment.errors import FastattnError, NoKernelError
    from fastattn.environment.option_scope import options
    from fastattn.kernels.merging import merge
    from fastattn.problems import masks
    from fastattn.problems.problem import Problem
    from fastattn.verdicts.verdict import Verdict

__all__ = [
    "Explanation", "FastattnError", "KVCache", "ModelPatch", "NoKernelError", "Patch", "Plan", "Problem", "Report", "Stats",
    "Verdict", "attention", "clear", "explain", "masks", "merge", "options", "patch", "plan", "report", "sdpa",
    "stats", "sync", "tune", "unpatch",
]  # fmt: skip

# Imported when first asked for: a program that only calls attention() pays for what a hit needs.
_FILES = {
    "Explanation": "dispatch.explain", "explain": "dispatch.explain", "Plan": "dispatch.plan", "plan": "dispatch.plan",
    "ModelPatch": "dispatch.patching_models",
    "Patch": "dispatch.patching", "patch": "dispatch.patching", "unpatch": "dispatch.patching",
    "Report": "dispatch.by_layer", "report": "dispatch.by_layer", "KVCache": "dispatch.kv_cache",
    "merge": "kernels.merging", "sdpa": "dispatch.sdpa", "sync": "dispatch.ranks",
    "Stats": "dispatch.stats", "stats": "dispatch.stats", "clear": "dispatch.session", "tune": "dispatch.ahead",
    "FastattnError": "environment.errors", "NoKernelError": "environment.errors", "options": "environment.option_scope",
    "Problem": "problems.problem", "Verdict": "verdicts.verdict",
}  # fmt: skip
__getattr__ = imported_later(__name__, _FILES, {"masks": "problems.masks"})


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
