"""What fastattn raises of its own, and which of CUDA's errors stay.

Everything else is the type F.scaled_dot_product_attention raises.

FastattnError
`-- NoKernelError (also a RuntimeError): no kernel can run this problem, or the one that was ordered by name cannot
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastattn.planning.decision import Decision


class FastattnError(Exception):
    """Base of the exceptions that only fastattn raises."""


class NoKernelError(FastattnError, RuntimeError):
    """No candidate could run; `decisions` holds every candidate with all its reasons."""

    def __init__(self, message: str, decisions: Sequence[Decision] = ()) -> None:
        super().__init__(message)
        self.decisions = tuple(decisions)


STICKY = (  # errors "that leave the process in an inconsistent state" (CUDA runtime API, cudaError_t), by their texts
    "illegal memory access", "illegal instruction", "illegal address", "misaligned address", "invalid program counter",
    "device-side assert", "launch failure", "launch timed out", "hardware stack error", "uncorrectable ECC",
    "fallen off the bus", "address space", "device is lost", "unknown error",
)  # fmt: skip


def is_sticky(error: BaseException) -> bool:
    """Whether it is a CUDA error that every later call of the process meets again; a launch that was never made is none."""
    return "CUDA error" in str(error) and any(text in str(error) for text in STICKY)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, in whichever of torch's ways."""
    import torch

    is_told = any(text in str(error) for text in ("DefaultCPUAllocator", "std::bad_alloc"))
    return is_told or isinstance(error, (torch.OutOfMemoryError, MemoryError))
