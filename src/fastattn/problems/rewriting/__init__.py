"""Packed sequences, caches, sinks and biases, rewritten as an ordinary call: four dimensions, and a mask with the lengths.

Layout "thd" is a batch of one with a Document mask, a cache that is filled to `kv_lens` is its filled part with a Filled
mask, pages are gathered. Lengths on the CPU are read in each call. Those on CUDA are not: the mask holds them where they lie
(masks/unread.py). While a graph is traced that no operator of ours may stand in, it is a bool tensor that is made of them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastattn.problems.call_options import OF_CACHES, OF_SEQUENCES, REWRITTEN, check_layout, parse_options
from fastattn.problems.masks import Mask
from fastattn.problems.rewriting.bias import of_bias
from fastattn.problems.rewriting.caches import of_cache
from fastattn.problems.rewriting.jagged import is_jagged, of_jagged
from fastattn.problems.rewriting.rewritten import Rewritten, refuse
from fastattn.problems.rewriting.sequences import of_packed
from fastattn.problems.rewriting.sinks import of_sinks

__all__ = ["Rewritten", "rewrite"]


def rewrite(q: Any, k: Any, v: Any, mask: Any, layout: Any, options: dict[str, Any]) -> Rewritten | None:
    """The call that one with lengths, sinks or a Bias comes to, nearer to an ordinary one; None where it is one already.

    Raises TypeError or ValueError, naming the argument, for lengths that do not fit.
    """
    asked = {name for name in REWRITTEN if options.get(name) is not None}
    is_biased = isinstance(mask, Mask) and bool(mask.added())
    is_wanted = asked or layout == "thd" or is_jagged(q) or is_biased
    if not is_wanted or not all(isinstance(x, Tensor) for x in (q, k, v)):
        return None  # of what is no tensor an ordinary call says what is wrong
    if layout != "thd":
        check_layout(layout)
    parse_options(options)  # raises for what is wrong with the others
    if "sinks" in asked:
        return of_sinks(q, k, v, mask, layout, options)
    if is_biased:
        return of_bias(q, k, v, mask, layout, options)
    rest = {name: value for name, value in options.items() if name not in REWRITTEN}
    if any(is_jagged(x) for x in (q, k, v)):
        refuse(asked, "does not go with a NestedTensor")
        return of_jagged(q, k, v, mask, layout, rest)
    if layout == "thd":
        refuse(asked & {*OF_CACHES}, "is of a cache, and goes with the layouts bhsd, bshd and sbhd")
        of_q, of_kv, most_q, most_kv = (options.get(name) for name in OF_SEQUENCES)
        return of_packed(q, k, v, mask, rest, of_q, of_kv, most_q, most_kv)
    refuse(asked & {*OF_SEQUENCES}, "goes with layout='thd'")
    return of_cache(q, k, v, mask, layout, rest, options.get("kv_lens"), options.get("page_table"))
