"""Packed sequences and caches, said anew as an ordinary call: tensors of four dimensions and a mask that holds the lengths.

Layout "thd" is a batch of one with a Document mask, a cache that is filled to `kv_lens` is its filled part with a Filled
mask, pages are gathered. Lengths on the CPU are read in each call; on CUDA, and while a graph is traced, nothing is read: the
mask is a bool tensor that is made of them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastattn.problems.call_options import OF_CACHES, OF_SEQUENCES, check_layout
from fastattn.problems.packing.caches import of_cache
from fastattn.problems.packing.jagged import is_jagged, of_jagged
from fastattn.problems.packing.said_anew import SaidAnew, refuse
from fastattn.problems.packing.sequences import of_packed

__all__ = ["SaidAnew", "said_anew"]


def said_anew(q: Any, k: Any, v: Any, mask: Any, layout: Any, options: dict[str, Any]) -> SaidAnew | None:
    """The ordinary call that a packed or cached one comes to; None where it is one already.

    Raises TypeError or ValueError, naming the argument, for lengths that do not fit.
    """
    asked = {name for name in (*OF_SEQUENCES, *OF_CACHES) if options.get(name) is not None}
    if not (asked or layout == "thd" or is_jagged(q)) or not all(isinstance(x, Tensor) for x in (q, k, v)):
        return None  # of what is no tensor an ordinary call says what is wrong
    rest = {name: value for name, value in options.items() if name not in (*OF_SEQUENCES, *OF_CACHES)}
    if is_jagged(q):
        refuse(asked, "does not go with a NestedTensor")
        return of_jagged(q, k, v, mask, layout, rest)
    if layout == "thd":
        refuse(asked & {*OF_CACHES}, "is of a cache, and goes with the layouts bhsd, bshd and sbhd")
        return of_packed(q, k, v, mask, rest, *(options.get(name) for name in OF_SEQUENCES))
    check_layout(layout)
    refuse(asked & {*OF_SEQUENCES}, "goes with layout='thd'")
    return of_cache(q, k, v, mask, layout, rest, options.get("kv_lens"), options.get("page_table"))
