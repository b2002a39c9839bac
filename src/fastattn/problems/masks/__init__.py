"""Masks with a meaning: values that say which keys a query sees, and combine with & and |.

    masks.Causal() & masks.Window(256, 0)          # the last 256 keys and its own
    masks.Causal() & masks.Document(lengths)       # packed sequences
    masks.Window(128, 128) | masks.Global(16)      # a window, and tokens that see all and are seen by all

They are small and frozen, and but for Bias hold no tensor: what a tensor says is read once, when the value is made. No
kernel needs them as a dense mask, so what they hide is neither computed nor stored.
"""

from fastattn.problems.masks.alibi import ALiBi
from fastattn.problems.masks.bias import Bias
from fastattn.problems.masks.combined import all_of, leaves
from fastattn.problems.masks.kinds import Causal, Chunked, Dilated, Global, Neighborhood, Window
from fastattn.problems.masks.mask import Mask
from fastattn.problems.masks.packed import Filled, Packed
from fastattn.problems.masks.sequences import Document, Padding, Prefix
from fastattn.problems.masks.unread import FilledUnread, PackedUnread
from fastattn.problems.masks.written import parse, write

__all__ = [
    "ALiBi", "Bias", "Causal", "Chunked", "Dilated", "Document", "Filled", "FilledUnread", "Global", "Mask", "Neighborhood",
    "Packed", "PackedUnread", "Padding", "Prefix", "Window", "all_of", "leaves", "parse", "write",
]  # fmt: skip
