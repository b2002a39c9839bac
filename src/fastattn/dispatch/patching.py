"""patch(): fastattn.sdpa in the place of F.scaled_dot_product_attention, and out of it again."""

from __future__ import annotations

from typing import NoReturn

import torch.nn.functional as F

from fastattn.dispatch.sdpa import sdpa
from fastattn.environment.log import log


class Patch:
    """The handle of patch(): `undo()` it, or let a `with` block undo it at its end.

    It patches when it is made, not at `with`. It undoes itself only if it is still the one in place; otherwise somebody
    patched over it, and what they put there stays.
    """

    def __init__(self) -> None:
        self._before = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = sdpa
        self._done = False

    def undo(self) -> bool:
        """Put back what was there before; whether that was done."""
        if self._done or self._before is sdpa:  # undone, or it was in place already
            return False
        if F.scaled_dot_product_attention is not sdpa:
            log.warning("F.scaled_dot_product_attention was patched again since; it is left as it is")
            return False
        F.scaled_dot_product_attention = self._before
        self._done = True
        return True

    def __repr__(self) -> str:
        if self._done:
            state = "undone"
        elif F.scaled_dot_product_attention is not sdpa:
            state = "patched over"
        else:
            state = "nothing to undo, fastattn was in place already" if self._before is sdpa else "in place"
        return f"<fastattn.patch: {state}>"

    def __copy__(self) -> Patch:
        return self

    def __deepcopy__(self, memo: object) -> Patch:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a fastattn.Patch belongs to its process; call fastattn.patch() in the other process")

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exc: object) -> None:
        self.undo()


def patch() -> Patch:
    """Put `fastattn.sdpa` in the place of torch.nn.functional.scaled_dot_product_attention, for the whole process.

    It takes effect when it is called; `with` only undoes it at the end of the block. Code that imported the function by
    name before keeps the old one. Patching twice is harmless: the second handle has nothing to undo.
    """
    return Patch()
