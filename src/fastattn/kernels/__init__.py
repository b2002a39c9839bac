"""The contract of a kernel, and all that adapters may use.

A kernel is a row of data about one entry point of one library, with one `load()`. Adapters import this package alone;
`registry` lists their rows, `limits` has what they refuse, `known_faults` where they are known to be wrong, `libraries/`
what is installed.
"""

from torch import Tensor

from fastattn.environment.device import Device
from fastattn.environment.settings import log
from fastattn.kernels.kernel import Arguments, Backward, Kernel, Run, by_keyword, require
from fastattn.kernels.limits import (
    BFLOAT16,
    FLASH_2_BACKWARD,
    GRID,
    NOT_EMPTY,
    OWN_MASK,
    PLANNED,
    Forbid,
    Need,
    OneOf,
    Range,
    RefuseWhen,
)
from fastattn.kernels.plain_math import NEVER, fold, sdpa_math
from fastattn.kernels.workspace import room
from fastattn.problems.masks import additive, as_4d, as_bias, sees_nothing

__all__ = [
    "BFLOAT16", "FLASH_2_BACKWARD", "GRID", "NEVER", "NOT_EMPTY", "OWN_MASK", "PLANNED", "Arguments", "Backward", "Device",
    "Forbid", "Kernel", "Need", "OneOf", "Range", "RefuseWhen", "Run", "Tensor", "additive", "as_4d", "as_bias", "by_keyword",
    "fold", "log", "require", "room", "sdpa_math", "sees_nothing",
]  # fmt: skip
