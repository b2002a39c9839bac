"""fastattn: attention by the fastest kernel on this machine that is right.

    from fastattn import attention
    out = attention(q, k, v, is_causal=True, layout="bshd")
"""

from fastattn import masks
from fastattn.api import attention
from fastattn.config import options
from fastattn.errors import FastattnError, NoKernelError
from fastattn.explanation import Explanation, Plan, explain, plan
from fastattn.learnt import clear
from fastattn.patching import Patch, patch, sdpa
from fastattn.prewarming import tune
from fastattn.problem import Problem
from fastattn.ranks import sync
from fastattn.verdict import Verdict

__version__ = "0.1.0"
__all__ = [
    "Explanation", "FastattnError", "NoKernelError", "Patch", "Plan", "Problem", "Verdict", "attention", "clear", "explain",
    "masks", "options", "patch", "plan", "sdpa", "sync", "tune",
]  # fmt: skip
