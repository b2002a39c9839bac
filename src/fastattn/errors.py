"""What fastattn raises of its own. Everything else is the type F.scaled_dot_product_attention raises.

FastattnError
`-- NoKernelError (also a RuntimeError): a kernel that was ordered by name cannot run this problem
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastattn.kernel import Decision


class FastattnError(Exception):
    """Base of the exceptions that only fastattn raises."""


class NoKernelError(FastattnError, RuntimeError):
    """No candidate could run; `decisions` holds every candidate with all its reasons."""

    def __init__(self, message: str, decisions: Sequence[Decision] = ()) -> None:
        super().__init__(message)
        self.decisions = tuple(decisions)
