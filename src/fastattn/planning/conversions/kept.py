"""Keys and values that a KVCache keeps in the order of a kernel's own: what is new is written, the kernel reads the rest."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from threading import RLock
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastattn.environment.text import dtype_name
from fastattn.kernels import registry
from fastattn.kernels.kernel import Arguments, Keeper, Kernel, Run
from fastattn.kernels.libraries import availability
from fastattn.planning.conversions.conversion import NO, OPTIONAL, REQUIRED
from fastattn.planning.conversions.head_dim import pads
from fastattn.problems import masks
from fastattn.problems.call_facts import CallFacts
from fastattn.problems.masks.values import each
from fastattn.problems.packing import kv_lens_tensor
from fastattn.problems.problem import Problem

if TYPE_CHECKING:
    from fastattn.problems.masks.kept import KeepsTokens

_turn = RLock()  # threads may attend to one cache, whose memory the first of them brings up to date


def _renew_lock() -> None:
    global _turn
    _turn = RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def is_kept_by_any(k: Tensor, v: Tensor, named: tuple[str, ...]) -> bool:
    """Whether a kernel that is installed reads such keys in an order of its own. k, v: (b, kv_heads, s, d)."""
    dims, dtype = {k.shape[3], v.shape[3]}, dtype_name(k.dtype)
    return any(
        row.load_kept is not None
        and dtype in row.dtypes
        and not (row.head_dims and dims.difference(row.head_dims))
        and not (row.equal_head_dims and len(dims) > 1)
        and not availability.why_absent(row)
        for row in registry.rows_for(k.device.type, named)
    )


def when_kept(kernel: Kernel, p: Problem, facts: CallFacts | None = None) -> str:
    if kernel.load_kept is None or not p.kept or p.needs_grad or p.dropout:
        return NO
    is_only_way = p.mask is not None and not kernel.masks
    why_not = _why_not(kernel, p)
    if why_not is not None:
        return why_not if is_only_way else NO
    return REQUIRED if is_only_way else OPTIONAL


def _why_not(kernel: Kernel, p: Problem) -> str | None:
    """Why it cannot read what is kept."""
    if any(pads(kernel, p)):
        return f"kept keys of head_dim {p.head_dim}, head_dim_v {p.head_dim_v}, which it would pad in all of them"
    if p.cast_from:
        return f"kept keys of {p.cast_from[1]} under autocast, which computes in {p.dtype}"
    if p.window is not None or (p.causal == "top_left" and not p.is_square):
        return "kept keys and a window, or a triangle that does not end at the last of them"
    if p.mask is None:
        return None
    if p.filling is None or p.filling.left >= 0:
        return f"kept keys and a mask ({p.structure or p.mask})"
    filled = masks.parse(p.structure)
    assert isinstance(filled, masks.Filled)
    if p.filling.has_corner and min(each(filled.keys)) < p.q_len:
        return f"{p.q_len} queries on fewer filled keys, of which the first see none ({p.structure})"
    return None


def kept(step: Run, kernel: Kernel, p: Problem, facts: CallFacts) -> Run:
    is_triangle = p.causal is not None or (p.filling is not None and p.filling.has_corner)
    upper = 0 if is_triangle else None

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Any, a: Arguments) -> Any:
        cache: KeepsTokens = a.kept
        lengths, memory = kv_lens_tensor(cache.lengths, q.device), cache.kept_for(kernel)
        return step(q, k, v, None, a._replace(lower=None, upper=upper, kv_lens=lengths, kept=memory))

    return run


class _Copy(NamedTuple):
    """Keys and values as a kernel keeps them; replaced as a whole, so that threads see what belongs together."""

    kept: tuple[Tensor, ...]  # [batch, blocks, ...] each
    written: tuple[int, ...]  # tokens of each entry that are as the cache has them
    touched: tuple[int, ...]  # tokens of each entry that were ever written


class KeptCopies:
    """A cache's keys and values as kernels keep them: a copy for each kernel that asked, brought up to date when it asks."""

    def __init__(self) -> None:
        self._copies: dict[str, _Copy] = {}

    def __bool__(self) -> bool:
        return bool(self._copies)

    def of(self, kernel: Kernel, k: Tensor, v: Tensor, filled: Sequence[int]) -> tuple[Tensor, ...]:
        """What the kernel reads. k, v: the cache (b, kv_heads, room, d); filled: how much of each entry is."""
        copy, now = self._copies.get(kernel.name), tuple(filled)
        if copy is not None and copy.written == copy.touched == now:
            return copy.kept
        with _turn, torch.inference_mode(False), torch.no_grad():  # it outlives the mode that it was made in
            return self._brought_up_to_date(kernel, k, v, now).kept

    def cut(self, lengths: Sequence[int]) -> None:
        """Tokens beyond these lengths are to be written again."""
        with _turn:
            for name, copy in list(self._copies.items()):
                if len(copy.written) != len(lengths):  # a graph took entries out, or in
                    del self._copies[name]
                    continue
                written = tuple(min(n, most) for n, most in zip(copy.written, lengths, strict=True))
                self._copies[name] = copy._replace(written=written)

    def reorder(self, entries: Sequence[int]) -> None:
        """Entry i becomes what entries[i] was."""
        with _turn, torch.inference_mode(False):
            copies, self._copies = self._copies, {}  # without memory for others there are none
            found = {}
            for name, copy in copies.items():
                index = torch.tensor(entries, dtype=torch.int64, device=copy.kept[0].device)
                written, touched = (tuple(n[i] for i in entries) for n in (copy.written, copy.touched))
                found[name] = _Copy(tuple(x.index_select(0, index) for x in copy.kept), written, touched)
            self._copies = found

    def _brought_up_to_date(self, kernel: Kernel, k: Tensor, v: Tensor, filled: tuple[int, ...]) -> _Copy:
        keeper, nothing = availability.load_keeper(kernel), (0,) * len(filled)
        kept, written, touched = self._copies.get(kernel.name) or _Copy((), nothing, nothing)
        kept = _with_room(kept, keeper, k, v, -(-max(touched) // keeper.block))
        # whatever ends the writing, it is known how far it may have come
        touched_now = tuple(map(max, touched, filled))
        self._copies[kernel.name] = _Copy(kept, tuple(map(min, written, filled)), touched_now)
        _zero_new_blocks(kept, keeper.block, touched, touched_now)
        _write(keeper, kept, k, v, written, filled)
        # what was cropped may be NaN: kernels multiply it by zero
        no_keys, no_values = (x.new_zeros(x.shape[3]).expand_as(x) for x in (k, v))
        _write(keeper, kept, no_keys, no_values, filled, touched_now)
        copy = self._copies[kernel.name] = _Copy(kept, filled, filled)
        return copy


def _with_room(kept: tuple[Tensor, ...], keeper: Keeper, k: Tensor, v: Tensor, used: int) -> tuple[Tensor, ...]:
    """Memory for all tokens that the cache has room for; of the old one `used` blocks are copied."""
    blocks = -(-k.shape[2] // keeper.block)
    if kept and kept[0].shape[1] >= blocks:
        return kept
    grown = keeper.empty(k, v, blocks)
    for new, old in zip(grown, kept, strict=False):
        new[:, :used].copy_(old[:, :used])
    return grown


def _zero_new_blocks(kept: tuple[Tensor, ...], block: int, before: tuple[int, ...], now: tuple[int, ...]) -> None:
    """The last block of each entry that nothing was written to: what lies behind its tokens is read."""
    for entry, (old, new) in enumerate(zip(before, now, strict=True)):
        last = (new - 1) // block
        if new and old <= last * block:
            for x in kept:
                x[entry, last].zero_()


def _write(
    keeper: Keeper, kept: tuple[Tensor, ...], k: Tensor, v: Tensor, first: tuple[int, ...], last: tuple[int, ...]
) -> None:
    """Tokens of each entry from `first` on to before `last`; entries with as many in one go."""
    room = kept[0].shape[1] * keeper.block
    of_count: dict[int, list[int]] = {}
    for entry, (begin, end) in enumerate(zip(first, last, strict=True)):
        if begin < end:
            of_count.setdefault(end - begin, []).append(entry)
    for count, entries in of_count.items():
        begin, device = first[entries[0]], k.device
        find = _remembered if len(entries) * count <= FEW else _slots
        b, at, slots = find(tuple(entries), tuple(first[entry] for entry in entries), count, room, device)
        if len(entries) == len(first) == first.count(begin):
            keys, values = (x[:, :, begin : begin + count].transpose(1, 2) for x in (k, v))
        else:
            keys, values = (x.transpose(1, 2)[b, at] for x in (k, v))
        keeper.write(kept, keys.flatten(0, 1), values.flatten(0, 1), slots)


def _slots(
    entries: tuple[int, ...], first: tuple[int, ...], count: int, room: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """(entries [n, 1], positions [n, count], slots [n x count]) of count tokens of each entry, which has so much room."""
    b, begin = (torch.tensor(numbers, dtype=torch.int64, device=device)[:, None] for numbers in (entries, first))
    at = begin + torch.arange(count, dtype=torch.int64, device=device)
    return b, at, (b * room + at).flatten()


FEW = 1024  # tokens whose slots are remembered: the next layer asks for the same ones
_remembered = lru_cache(64)(_slots)


class InDecoding:
    """A cache of tensors that are made up: its last tokens are new in every call, as they are where it decodes."""

    def __init__(self, k: Tensor, v: Tensor, filled: tuple[int, ...], new: int) -> None:
        """k, v: (b, kv_heads, s, d). new: tokens that each call writes again."""
        self._k, self._v, self.lengths, self._new, self._copies = k, v, filled, new, KeptCopies()

    def kept_for(self, kernel: Kernel) -> tuple[Tensor, ...]:
        self._copies.cut([max(0, n - self._new) for n in self.lengths])
        return self._copies.of(kernel, self._k, self._v, self.lengths)
