"""The contract of a kernel, and all that adapters may use.

A kernel is a row of data about one entry point of one library, with one `load()`. Adapters import this package alone;
`registry` lists their rows, `limits` has what they refuse, `known_faults` where they are known to be wrong, `libraries/`
what is installed.
"""

from typing import TYPE_CHECKING

from fastattn.environment.later import imported_later

if TYPE_CHECKING:
    from torch import Tensor

    from fastattn.environment.device import Device
    from fastattn.environment.log import log
    from fastattn.environment.remembered import remembered
    from fastattn.kernels.block_masks import band_mask, square_mask
    from fastattn.kernels.kernel import Arguments, Backward, Keeper, Kernel, Run, require_keywords, require_private
    from fastattn.kernels.libraries.availability import is_before
    from fastattn.kernels.libraries.operator_files import load_operators
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
    from fastattn.kernels.plain_math import NEVER, all_rows_see, fold, sdpa_math, unfold
    from fastattn.kernels.silicon import check_silicon
    from fastattn.kernels.workspace import scratch
    from fastattn.problems.dense_masks import additive, as_4d, as_bias, drowns_scores, sees_nothing
    from fastattn.problems.tilings.mask_blocks import SIZE, MaskBlocks

__all__ = [
    "BFLOAT16", "FLASH_2_BACKWARD", "GRID", "NEVER", "NOT_EMPTY", "OWN_MASK", "PLANNED", "SIZE",
    "Arguments", "Backward", "Device", "Forbid", "Keeper", "Kernel", "MaskBlocks", "Need", "OneOf", "Range", "RefuseWhen",
    "Run", "Tensor", "additive", "all_rows_see", "as_4d", "as_bias", "band_mask", "check_silicon", "drowns_scores", "fold",
    "is_before", "load_operators", "log", "remembered", "require_keywords", "require_private", "scratch", "sdpa_math",
    "sees_nothing", "square_mask", "unfold",
]  # fmt: skip

# An adapter has no more imported than it names: of most only torch's own is asked in a process.
_OF_KERNEL = ("Arguments", "Backward", "Keeper", "Kernel", "Run", "Tensor", "require_keywords", "require_private")
_OF_LIMITS = ("BFLOAT16", "FLASH_2_BACKWARD", "GRID", "NOT_EMPTY", "OWN_MASK", "PLANNED",
              "Forbid", "Need", "OneOf", "Range", "RefuseWhen")  # fmt: skip
_OF_DENSE_MASKS = ("additive", "as_4d", "as_bias", "drowns_scores", "sees_nothing")
_FILES = {
    **dict.fromkeys(_OF_KERNEL, "kernel"),
    **dict.fromkeys(_OF_LIMITS, "limits"),
    **dict.fromkeys(("NEVER", "all_rows_see", "fold", "sdpa_math", "unfold"), "plain_math"),
    **dict.fromkeys(_OF_DENSE_MASKS, ".problems.dense_masks"),
    **dict.fromkeys(("SIZE", "MaskBlocks"), ".problems.tilings.mask_blocks"),
    **dict.fromkeys(("band_mask", "square_mask"), "block_masks"),
    "scratch": "workspace", "check_silicon": "silicon",
    "is_before": "libraries.availability", "load_operators": "libraries.operator_files",
    "Device": ".environment.device", "log": ".environment.log", "remembered": ".environment.remembered",
}  # fmt: skip
__getattr__ = imported_later(__name__, _FILES)
