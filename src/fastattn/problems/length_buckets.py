"""Lengths that churn are served in buckets, so that a growing KV cache or ragged batches do not tune for ever.

Edges: 1, 2, 4, 8, 16, then 2^(k/2) rounded to multiples of 16. A bucket is verified and timed at one canonical length,
its upper edge less 1 (hence off the tile grid), never at whatever length came first: runs agree whatever the order.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import count

DECODE_Q_LEN = 16  # up to this many queries kv_len is always in a bucket: it is a decode, and grows by a token a call
EXACT_LENGTHS = 16  # up to this each length is a bucket of its own, or shares one that ends at a power of two
CHURN = 4  # a family that has shown more than this many different lengths is churning


@lru_cache(1024)
def bucket_bounds(length: int) -> tuple[int, int]:
    """(lowest, highest) length of the bucket that holds `length`."""
    if length <= 0:
        return 0, 0
    below = 0
    for k in count():
        edge = 2**k if k <= 4 else round(2 ** (k / 2 + 2) / 16) * 16  # k = 5, 6, ... -> 2^4.5, 2^5, ...
        if edge <= below:
            continue
        if length <= edge:
            return below + 1, edge
        below = edge
    raise AssertionError("unreachable: the edges grow without bound")


def canonical_length(length: int) -> int:
    """The length at which the bucket of `length` is verified and timed."""
    edge = bucket_bounds(length)[1]
    return edge if edge <= EXACT_LENGTHS else edge - 1


def canonical_batch(batch: int) -> int:
    """The power of two that stands for `batch`."""
    return 1 << max(0, batch - 1).bit_length()
