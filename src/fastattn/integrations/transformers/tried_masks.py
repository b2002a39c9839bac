"""Whether transformers' mask functions still do what their names say: each kind is tried on a small example.

They are read by name and by what they close over. A version in which a name means something else must not make a wrong mask.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from threading import local
from typing import Any

import torch

from fastattn.integrations.transformers import library

BATCH, TOKENS = 2, 12
_IDS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2], [0] * 6 + [1] * 6], dtype=torch.int64, device="cpu")
_POSITIONS = torch.tensor([[*range(3), *range(4), *range(5)], [*range(6), *range(6)]], dtype=torch.int64, device="cpu")
_BLOCKS = torch.tensor([[-1, 0, 0, 0, -1, -1, 1, 1, -1, -1, -1, -1]] * 2, dtype=torch.int64, device="cpu")
_LEFT = torch.tensor([0, 3], dtype=torch.int64, device="cpu")


def _examples(theirs: Any) -> dict[str, Callable[[], Any]]:
    """An example of each kind; `or` with a triangle where a mask alone leaves a token without itself."""
    causal = theirs.causal_mask_function
    return {
        "causal_mask_function": lambda: causal,
        "bidirectional_mask_function": lambda: theirs.bidirectional_mask_function,
        "and_masks.and_mask": lambda: theirs.and_masks(causal, causal),
        "or_masks.or_mask": lambda: theirs.or_masks(causal, causal),
        "sliding_window_overlay.inner_mask": lambda: theirs.sliding_window_overlay(4),
        "sliding_window_bidirectional_overlay.inner_mask": lambda: theirs.sliding_window_bidirectional_overlay(3),
        "chunked_overlay.inner_mask": lambda: theirs.chunked_overlay(5, _LEFT),
        "_legacy_chunked_overlay.inner_mask": lambda: theirs._legacy_chunked_overlay(5),
        "blockwise_overlay.inner_mask": lambda: theirs.or_masks(causal, theirs.blockwise_overlay(_BLOCKS)),
        "padding_mask_function.inner_mask": lambda: theirs.padding_mask_function(_IDS == 0),
        "packed_sequence_mask_function.inner_mask": lambda: theirs.packed_sequence_mask_function(_IDS),
        "remap_positions_for_packed_sequence.inner_mask": lambda: theirs.and_masks(
            theirs.remap_positions_for_packed_sequence(causal, _POSITIONS), theirs.packed_sequence_mask_function(_IDS)
        ),
    }


_this = local()  # thread: whether it tries one now


def means_what_we_think(name: str) -> bool:
    """Whether a kind of theirs hides what ours does, tried once a process. In an example all kinds are taken for granted."""
    return getattr(_this, "tries", False) or _try(name)


@cache
def _try(name: str) -> bool:
    from fastattn.integrations.transformers.read_masks import Lengths, read

    b, i = (torch.arange(size, dtype=torch.int64, device="cpu") for size in (BATCH, TOKENS))
    h = torch.zeros(1, dtype=torch.int64, device="cpu")
    _this.tries = True
    try:
        function = _examples(library.masks)[name]()
        mask = read(function, Lengths(BATCH, TOKENS, TOKENS, 0, 0))
        at = (b[:, None, None, None], h[None, :, None, None], i[None, None, :, None], i[None, None, None])
        want = function(*at).expand(BATCH, 1, TOKENS, TOKENS)
        got = torch.ones_like(want, dtype=torch.bool) if mask is None else mask.dense(BATCH, TOKENS, TOKENS)
        agrees = torch.equal(want, got.expand_as(want))
    except Exception as error:
        library.say(f"the mask function {name} cannot be tried ({error}); it is made dense")
        return False
    finally:
        _this.tries = False
    if not agrees:
        library.say(f"the mask function {name} is not what fastattn takes it for; it is made dense")
    return agrees
