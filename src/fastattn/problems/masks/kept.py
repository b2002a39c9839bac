"""Kept: a call on a KVCache, which keeps its keys and values in the order of a kernel's own as well."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from typing import Protocol

    from torch import Tensor

    from fastattn.problems.masks.mask import Mask

    class KeepsTokens(Protocol):
        """Whose keys and values they are."""

        @property
        def lengths(self) -> tuple[int, ...]:
            """How much of each batch entry is filled."""
            ...

        def kept_for(self, kernel: Any) -> tuple[Tensor, ...]:
            """Its keys and values as the kernel's Keeper has them, all that are filled."""
            ...


class Kept(NamedTuple):
    """In the place of a call's mask: what the call hides, and the cache that k and v are views of."""

    of: Mask | None
    cache: KeepsTokens | None

    def like(self, kv_len: int) -> Kept:
        """The one that stands for all that share a verdict with it: of any cache."""
        return _ANY if self.of is None else _like(self.of, kv_len)


_ANY = Kept(None, None)


@lru_cache(64)  # a hit asks for it
def _like(mask: Mask, kv_len: int) -> Kept:
    return Kept(mask.like(kv_len), None)
