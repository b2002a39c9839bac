"""What transformers' mask functions mean, as values of fastattn.masks.

Theirs are closures over a batch entry, a head, a query and a key: `causal_mask_function`, what `sliding_window_overlay(512)`
returned, and `and_masks` and `or_masks` of such. They are known by name, and their settings are what they close over. What a
name does is compared with what we take it for before it is first relied on (tried_masks.py); all else is a dense mask.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.integrations.transformers import library, tried_masks
from fastattn.problems import masks
from fastattn.problems.masks import Mask


class Unknown(Exception):
    """This mask function is not known; the words say which."""


class Lengths(NamedTuple):
    """Of one mask: query i is token i + q_start, key j is token j + kv_start. reads: tensors' values may be read.

    positions: of each token within its own sequence, [batch, tokens], where several are packed.
    """

    batch: int
    q_len: int
    kv_len: int
    q_start: int
    kv_start: int
    reads: bool = True
    is_padded: bool = True
    positions: Tensor | None = None


def read(function: Callable[..., Any], n: Lengths) -> Mask | None:
    """The mask that a function of theirs means, None where it hides nothing. Raises Unknown."""
    name = _name(function)
    if name not in KINDS or not tried_masks.means_what_we_think(name):
        raise Unknown(f"the mask function {name or function!r} is not one that fastattn knows")
    return KINDS[name](_settings(function), n)


def corner(n: Lengths) -> str:
    """Where position 0 lies if the keys end with the last query's own, as they are made to."""
    return "top_left" if n.q_start == n.kv_start else "bottom_right"


def _name(function: Any) -> str:
    """Its name within their module of masks, "" for a function that is not from there."""
    is_theirs = getattr(function, "__module__", None) == library.MASKS
    return function.__qualname__.replace(".<locals>", "") if is_theirs else ""


def _settings(function: Any) -> dict[str, Any]:
    """What a closure closes over."""
    names, cells = function.__code__.co_freevars, function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def _causal(s: dict[str, Any], n: Lengths) -> Mask:
    return masks.Causal(corner(n))


def _all(s: dict[str, Any], n: Lengths) -> None:
    return None


def _and(s: dict[str, Any], n: Lengths) -> Mask | None:
    found = [mask for part in s["mask_functions"] if (mask := read(part, n)) is not None]
    return masks.all_of(found) if found else None


def _or(s: dict[str, Any], n: Lengths) -> Mask | None:
    found = [read(part, n) for part in s["mask_functions"]]
    return None if any(mask is None for mask in found) else reduce(or_, found)  # type: ignore[arg-type]


def _window(s: dict[str, Any], n: Lengths) -> Mask:
    if type(s["sliding_window"]) is not int or s["sliding_window"] < 1:
        raise Unknown(f"a sliding window of {s['sliding_window']!r} tokens")
    return masks.Window(s["sliding_window"] - 1, -1)


def _window_both(s: dict[str, Any], n: Lengths) -> Mask:
    if type(s["sliding_window"]) is not int or s["sliding_window"] < 0:
        raise Unknown(f"a sliding window of {s['sliding_window']!r} tokens")
    return masks.Window(s["sliding_window"], s["sliding_window"])


def _chunks(s: dict[str, Any], n: Lengths) -> Mask | None:
    size, padding = s["chunk_size"], s.get("left_padding")
    if n.positions is not None:
        return _documents(_to_read(n.positions, n) // size)
    if padding is not None and n.is_padded:  # without an attention mask it is zeros, which need no look
        padding = _to_read(padding, n)
        padding = padding if bool(padding.any()) else None
    else:
        padding = None
    if padding is not None:
        at = torch.arange(n.kv_len, dtype=torch.int64, device=padding.device) + n.kv_start
        return _documents((at - padding[:, None]) // size)
    if n.kv_start // size == (n.kv_start + n.kv_len - 1) // size:
        return None  # one chunk holds all
    if n.kv_start % size == 0:
        return masks.Chunked(size)
    return _documents((torch.arange(n.kv_len, dtype=torch.int64, device="cpu")[None] + n.kv_start) // size)


def _blocks(s: dict[str, Any], n: Lengths) -> Mask | None:
    """Tokens of one block, numbered from 0 on, see each other; those of none, -1, see themselves by the triangle alone."""
    ids = _to_read(s["block_sequence_ids"], n)[:, n.kv_start : n.kv_start + n.kv_len]
    if ids.shape[1] != n.kv_len:
        raise Unknown("block_sequence_ids that are shorter than the keys")
    for row in ids:
        runs = row.unique_consecutive()
        if len(runs[runs >= 0]) != len(runs[runs >= 0].unique()):
            raise Unknown("a block whose tokens are not neighbours")
    if bool((ids < 0).all()):
        raise Unknown("blocks that hold no token")
    alone = -1 - torch.arange(n.kv_len, dtype=ids.dtype, device=ids.device)
    return _documents(torch.where(ids >= 0, ids, alone))


def _padding(s: dict[str, Any], n: Lengths) -> Mask | None:
    return padding(s["padding_mask"][:, n.kv_start : n.kv_start + n.kv_len], n)


def _packed(s: dict[str, Any], n: Lengths) -> Mask | None:
    ids = _to_read(s["packed_sequence_mask"], n)
    if not ids.shape[1] == n.q_len == n.kv_len:
        raise Unknown("packed sequences of another length than the keys")
    return _documents(ids)


def _within_sequences(s: dict[str, Any], n: Lengths) -> Mask | None:
    """A mask of positions within each packed sequence; what only depends on distances is the same for all tokens."""
    found = read(s["mask_function"], n._replace(positions=s["position_ids"]))
    parts = found.parts() if found is not None else ()
    if not all(part.shifts() or isinstance(part, masks.Document) for part in parts):
        raise Unknown("a mask of positions within packed sequences")
    return found


KINDS: dict[str, Callable[[dict[str, Any], Lengths], Mask | None]] = {
    "causal_mask_function": _causal,
    "bidirectional_mask_function": _all,
    "and_masks.and_mask": _and,
    "or_masks.or_mask": _or,
    "sliding_window_overlay.inner_mask": _window,
    "sliding_window_bidirectional_overlay.inner_mask": _window_both,
    "chunked_overlay.inner_mask": _chunks,
    "_legacy_chunked_overlay.inner_mask": _chunks,
    "blockwise_overlay.inner_mask": _blocks,
    "padding_mask_function.inner_mask": _padding,
    "packed_sequence_mask_function.inner_mask": _packed,
    "remap_positions_for_packed_sequence.inner_mask": _within_sequences,
}


def _to_read(x: Tensor, n: Lengths) -> Tensor:
    """A tensor whose values may be read."""
    if not n.reads or x.device.type != "cpu":
        raise Unknown("what a tensor on a device says is not read")
    return x


def padding(seen: Tensor, n: Lengths) -> masks.Padding | None:
    """Which keys are no padding, of a bool [batch, kv_len]; None where none is."""
    seen = _to_read(seen, n)
    lengths, kv_len = seen.sum(-1), seen.shape[1]
    if bool((lengths == kv_len).all()):
        return None
    at = torch.arange(kv_len, dtype=torch.int64, device=seen.device)
    each = lengths.tolist()
    given = each[0] if len(set(each)) == 1 else each
    if torch.equal(seen, at < lengths[:, None]):
        return masks.Padding(given)
    if torch.equal(seen, at >= kv_len - lengths[:, None]):
        return masks.Padding(given, "left")
    return masks.Padding(seen)


def _documents(ids: Tensor) -> Mask | None:
    """Document of [batch, tokens]; None where each entry is one."""
    lengths = [row.unique_consecutive(return_counts=True)[1].tolist() for row in ids]
    if all(len(row) == 1 for row in lengths):
        return None
    return masks.Document(lengths[0] if all(row == lengths[0] for row in lengths) else lengths)
