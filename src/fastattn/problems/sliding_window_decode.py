"""One query in a window is a query on a slice of the keys: what decoding with a sliding window comes to."""

from __future__ import annotations

from typing import NamedTuple

from fastattn.problems import bands, masks
from fastattn.problems.call_key import CallKey


class SlidingWindowDecode(NamedTuple):
    """Which keys the one query sees: the corner and the window of the call."""

    corner: str | None
    window: bands.Sides

    @staticmethod
    def of(key: CallKey) -> SlidingWindowDecode | None:
        """That of a call, None where it is no such call."""
        window, mask = key.options.window, key.mask
        if window is None or key.q.shape[2] != 1 or not (mask is None or isinstance(mask, masks.Causal)):
            return None
        if key.options.score_mod is not None:
            return None  # it is told each key's own number
        corner = "top_left" if key.options.is_causal else mask.corner if mask is not None else None
        found = SlidingWindowDecode(corner, window)
        first, last = found.keys(key.k.shape[2])
        return found if first < last else None

    def keys(self, kv_len: int) -> tuple[int, int]:
        """(first, last + 1) visible key."""
        lower, upper = bands.band(self.corner, self.window, 1, kv_len)
        return max(0, lower or 0), kv_len if upper is None else min(kv_len, upper + 1)

    def sliced(self, key: CallKey) -> CallKey:
        """The call on the keys that are left."""
        first, last = self.keys(key.k.shape[2])
        k, v = (
            s._replace(
                shape=(*s.shape[:2], last - first, s.shape[3]),
                aligned=s.aligned and first * s.stride[2] * s.dtype.itemsize % 16 == 0,
            )
            for s in (key.k, key.v)
        )
        options = key.options._replace(window=None, is_causal=False)
        return key._replace(k=k, v=v, mask=None, options=options)
