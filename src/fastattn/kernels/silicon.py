"""The GPUs that are here, for libraries that compile once, for one of them."""

from __future__ import annotations

import os


def check_silicon() -> set[tuple[int, int]]:
    """The capabilities of the GPUs that are here. Raises ImportError where FlashAttention 4 would take one for another."""
    import torch

    here = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    if len(here) > 1 and not os.environ.get("FLASH_ATTENTION_ARCH"):
        raise ImportError("it compiles for the first GPU that it meets, and these differ: set FLASH_ATTENTION_ARCH")
    return here
