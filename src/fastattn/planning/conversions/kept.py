"""Keys and values that a KVCache keeps in the order of a kernel's own: what is new is written, the kernel reads the rest."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

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


def is_kept_by_any(device: str, named: tuple[str, ...]) -> bool:
    """Whether a kernel that is installed reads keys in an order of its own."""
    return any(
        row.load_kept is not None and not availability.why_absent(row) for row in registry.rows_for(device, named)
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


class KeptCopies:
    """A cache's keys and values as kernels keep them: one copy for each kernel that asked, brought up to date when it asks."""

    def __init__(self) -> None:
        self._copies: dict[Kernel, _Copy] = {}

    def of(self, kernel: Kernel, k: Tensor, v: Tensor, filled: list[int]) -> tuple[Tensor, ...]:
        """What the kernel reads. k, v: the cache (b, kv_heads, room, d); filled: how much of each entry is."""
        copy = self._copies.get(kernel)
        if copy is None:
            copy = self._copies[kernel] = _Copy(availability.load_keeper(kernel), len(filled))
        copy.write(k, v, filled)
        return copy.kept

    def cut(self, lengths: list[int]) -> None:
        """Tokens beyond these lengths are to be written again."""
        for copy in self._copies.values():
            copy.written = [min(n, most) for n, most in zip(copy.written, lengths, strict=True)]

    def reorder(self, entries: list[int]) -> None:
        """Entry i becomes what entries[i] was."""
        for copy in self._copies.values():
            copy.reorder(entries)


class _Copy:
    def __init__(self, keeper: Keeper, batch: int) -> None:
        self._keeper = keeper
        self.kept: tuple[Tensor, ...] = ()
        self.written = [0] * batch  # tokens of each entry that are as the cache has them
        self._touched = [0] * batch  # tokens of each entry that were ever written

    def write(self, k: Tensor, v: Tensor, filled: list[int]) -> None:
        if self.written == filled == self._touched:
            return
        with torch.inference_mode(False), torch.no_grad():  # it outlives the mode that it was made in
            self._make_room(k, v)
            self._write(k, v, self.written, filled)
            # what was cropped may be NaN: kernels multiply it by zero
            if any(touched > n for touched, n in zip(self._touched, filled, strict=True)):
                self._write(
                    k.new_zeros(k.shape[3]).expand_as(k), v.new_zeros(v.shape[3]).expand_as(v), filled, self._touched
                )
        self.written, self._touched = list(filled), list(filled)

    def reorder(self, entries: list[int]) -> None:
        with torch.inference_mode(False):
            index = torch.tensor(entries, dtype=torch.int64, device=self.kept[0].device)
            self.kept = tuple(x.index_select(0, index) for x in self.kept)
        self.written, self._touched = ([n[i] for i in entries] for n in (self.written, self._touched))

    def _make_room(self, k: Tensor, v: Tensor) -> None:
        blocks = -(-k.shape[2] // self._keeper.block)
        if self.kept and self.kept[0].shape[1] >= blocks:
            return
        grown = self._keeper.empty(k, v, blocks)
        for new, old in zip(grown, self.kept, strict=False):
            new[:, : old.shape[1]].copy_(old)
        self.kept = grown

    def _write(self, k: Tensor, v: Tensor, first: list[int], last: list[int]) -> None:
        """Tokens of each entry from `first` on to before `last`."""
        room, spans = self.kept[0].shape[1] * self._keeper.block, list(zip(first, last, strict=True))
        together = [(0, len(spans))] if len(set(spans)) == 1 else [(b, b + 1) for b in range(len(spans))]
        for low, high in together:
            begin, end = spans[low]
            if begin < end:
                keys, values = (x[low:high, :, begin:end].transpose(1, 2).flatten(0, 1) for x in (k, v))
                self._keeper.write(self.kept, keys, values, _slots(low, high, room, begin, end, k.device))


@lru_cache(64)  # the next layer asks for the same ones
def _slots(low: int, high: int, room: int, begin: int, end: int, device: torch.device) -> Tensor:
    """Where tokens from begin to before end lie, of entries from low to before high that have so much room each."""
    with torch.inference_mode(False):
        at = torch.arange(begin, end, dtype=torch.int64, device=device)
        return (torch.arange(low, high, dtype=torch.int64, device=device)[:, None] * room + at).flatten()


class InDecoding:
    """A cache of tensors that are made up: its last tokens are new in every call, as they are where it decodes."""

    def __init__(self, k: Tensor, v: Tensor, filled: tuple[int, ...], new: int) -> None:
        """k, v: (b, kv_heads, s, d). new: tokens that each call writes again."""
        self._k, self._v, self.lengths, self._new, self._copies = k, v, filled, new, KeptCopies()

    def kept_for(self, kernel: Kernel) -> tuple[Tensor, ...]:
        self._copies.cut([max(0, n - self._new) for n in self.lengths])
        return self._copies.of(kernel, self._k, self._v, list(self.lengths))
