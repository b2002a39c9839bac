"""Masks with a meaning: values that say which keys a query sees, and combine with & and |.

    masks.Causal() & masks.Window(256, 0)          # the last 256 keys and its own
    masks.Causal() & masks.Document(lengths)       # packed sequences
    masks.Window(128, 128) | masks.Global(16)      # a window, and tokens that see all and are seen by all

They are small and frozen, and but for Bias hold no tensor: what a tensor says is read once, when the value is made. No
kernel needs them as a dense mask, so what they hide is neither computed nor stored.
"""

from typing import TYPE_CHECKING

from fastattn.environment.later import imported_later

if TYPE_CHECKING:
    from fastattn.problems.masks.alibi import ALiBi
    from fastattn.problems.masks.band import Causal, Window
    from fastattn.problems.masks.bias import Bias
    from fastattn.problems.masks.combined import all_of, leaves
    from fastattn.problems.masks.kept import Kept
    from fastattn.problems.masks.mask import Mask
    from fastattn.problems.masks.packed import Filled, Packed
    from fastattn.problems.masks.pages import FilledPagesUnread
    from fastattn.problems.masks.patterns import Chunked, Dilated, Global, Neighborhood
    from fastattn.problems.masks.sequences import Document, Padding, Prefix
    from fastattn.problems.masks.static import Static
    from fastattn.problems.masks.unread import FilledUnread, PackedUnread
    from fastattn.problems.masks.written import has_words, parse, write

__all__ = [
    "ALiBi", "Bias", "Causal", "Chunked", "Dilated", "Document", "Filled", "FilledPagesUnread", "FilledUnread", "Global",
    "Kept", "Mask", "Neighborhood", "Packed", "PackedUnread", "Padding", "Prefix", "Static", "Window", "all_of", "has_words",
    "leaves", "parse", "write",
]  # fmt: skip

# A call without a mask needs none of these, and asks for the class of none: they cost a process's first call a quarter of
# its time.
_FILES = {
    "Mask": "mask", "Causal": "band", "Window": "band", "ALiBi": "alibi", "Bias": "bias", "Filled": "packed",
    "Packed": "packed", "all_of": "combined", "leaves": "combined",
    "Chunked": "patterns", "Dilated": "patterns", "Global": "patterns", "Neighborhood": "patterns",
    "Document": "sequences", "Padding": "sequences", "Prefix": "sequences", "Static": "static",
    "Kept": "kept", "FilledPagesUnread": "pages", "FilledUnread": "unread", "PackedUnread": "unread",
    "has_words": "written", "parse": "written", "write": "written",
}  # fmt: skip
__getattr__ = imported_later(__name__, _FILES)


def __dir__() -> list[str]:
    return sorted({*__all__, *globals()})
