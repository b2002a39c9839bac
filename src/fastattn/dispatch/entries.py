"""The table of published Calls: a hit finds the one whose guard matches, a miss makes and publishes one.

Entries are immutable and tables are copied on write, so that a hit takes no lock.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from threading import Lock
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastattn.dispatch.guard import Guard, LeadsTo, build_guard, hits_of
from fastattn.environment import settings, torch_private
from fastattn.environment.blame import raise_callers
from fastattn.environment.log import log

if TYPE_CHECKING:
    from fastattn.dispatch.resolve import Resolved

LIMIT = 4096  # entries; beyond it the tables start anew
SAME_BYTES = 32  # entries kept for one pair of byte counts
STREAK = 8  # equal hits after which one entry is asked first, and other hits after which only the table is asked

_has_torch_function = torch_private.has_torch_function
_only_default_device = torch_private.only_default_device
_all: weakref.WeakSet[Entries] = weakref.WeakSet()


class Entries:
    """The entries of one front door: attention(), sdpa() and the operator of compiled code each have their own.

    `first` is what a call asks first: the guard of the entry that is hit again and again, which saves the 0.2 us of a lookup;
    where many problems take turns, the lookup itself, as a guard that does not match costs up to 0.3 us.
    """

    def __init__(self, resolve: Callable[..., Resolved]) -> None:
        """resolve(q, k, v, mask, layout, options): what a miss comes to."""
        self.resolve = resolve
        self._lock = Lock()
        self._dropped_hits: dict[LeadsTo, int] = {}
        self._ask_table: Guard = self.lookup
        self.generation = 0
        self._empty()
        _all.add(self)

    def _empty(self) -> None:
        self.table: dict[int, tuple[Guard, ...]] = {}
        self.first: Guard = self._ask_table
        self._last: Guard | None = None
        self._same = self._others = self._count = 0

    def call(self, q: Any, k: Any, v: Any, mask: Any, layout: Any, options: Any) -> Any:
        """Serve a call that `first` did not: by the table, or as a miss, whose Call is published."""
        try:
            call = self.lookup(q, k, v, mask, layout, options)
        except Exception as error:
            call = no_tensors(error)
        if call is not None:
            return call(q, k, v, mask)
        generation = self.generation
        resolved = self.resolve(q, k, v, mask, layout, options)
        out = resolved.call(q, k, v, mask)
        if resolved.remember:
            try:
                self.publish(resolved, q, k, v, mask, layout, options, generation)
            except Exception as error:  # the answer is there: whatever is wrong with the guard, the next call is a miss
                raise_callers(error)
                log.debug("no guard for this call: %s: %s", type(error).__name__, error)
        return out

    def lookup(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, layout: Any, options: Any) -> Any:
        """The Call of the entry whose guard matches, or None. Byte counts only narrow the search."""
        if _has_torch_function(q, k, v) and not _only_default_device():
            return None
        table, q_bytes = self.table, q.nbytes
        for guard in table.get(q_bytes * 31 + k.nbytes, ()):  # _address, inlined
            call = guard(q, k, v, mask, layout, options)
            if call is not None:
                self._note(guard)
                return call
        for guard in table.get(-q_bytes, ()):  # entries with a free kv_len, or free sizes
            call = guard(q, k, v, mask, layout, options)
            if call is not None:
                self._note(guard)
                return call
        return None

    def _note(self, guard: Guard) -> None:
        """Ask the entry that is hit in a row first, and none where others take turns."""
        if guard is self._last:
            self._same += 1
            if self._same > STREAK:
                self._ask_first(guard)
            return
        self._last, self._same = guard, 0
        if self.first is not self._ask_table:
            self._others += 1
            if self._others > STREAK:
                self.first, self._others = self._ask_table, 0

    def _ask_first(self, guard: Guard) -> None:
        """Put an entry in front, unless another thread has dropped it since it was found."""
        with self._lock:
            if any(guard is entry for guards in self.table.values() for entry in guards):
                self.first, self._same, self._others = guard, 0, 0

    def publish(
        self,
        resolved: Resolved,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Any,
        layout: Any,
        options: Any,
        generation: int | None = None,
    ) -> None:
        """Add an entry made by this very call, unless the entries were dropped since `generation`."""
        kv_lens = None if k is v else resolved.kv_lens  # a free length needs k and v guarded apart
        guard = build_guard(q, k, v, mask, layout, options, resolved, kv_lens)
        address = -q.nbytes if kv_lens is not None or resolved.any_sizes else _address(q.nbytes, k.nbytes)
        with self._lock:
            if generation not in (None, self.generation):
                return
            if self._count >= LIMIT:
                self._keep_hits(self.table)
                self._empty()
            table = dict(self.table)
            here = table.get(address, ())
            self._keep_hits({0: here[SAME_BYTES - 1 :]})
            table[address] = (guard, *here[: SAME_BYTES - 1])
            self.table = table
            self._count += 1
            self.first = guard

    def drop(self) -> None:
        """Forget all entries, and what is being resolved now: it was resolved under what no longer holds."""
        with self._lock:
            self.generation += 1
            self._keep_hits(self.table)
            self._empty()

    def _keep_hits(self, table: dict[int, tuple[Guard, ...]]) -> None:
        for name, hits in _hits_in(table):
            self._dropped_hits[name] = self._dropped_hits.get(name, 0) + hits

    def hits(self) -> dict[LeadsTo, int]:
        """How often entries that lead to each candidate were hit."""
        found = dict(self._dropped_hits)
        for name, hits in _hits_in(self.table):
            found[name] = found.get(name, 0) + hits
        return found

    def renew_lock(self) -> None:
        """After a fork no other thread is left that could hold the old one."""
        self._lock = Lock()


def no_tensors(error: Exception) -> None:
    """What a guard finds in inputs that are no tensors: nothing. Raises what only passed through the guard."""
    raise_callers(error)


def _address(q_bytes: int, k_bytes: int) -> int:
    """Where in the table entries with these byte counts stand; equal addresses of other problems only cost a guard."""
    return q_bytes * 31 + k_bytes


def _hits_in(table: dict[int, tuple[Guard, ...]]) -> list[tuple[LeadsTo, int]]:
    return [found for guards in table.values() for guard in guards for found in hits_of(guard)]


def drop_all() -> None:
    """Drop every published Call, of all front doors; verdicts stay."""
    for entries in list(_all):
        entries.drop()


def all_hits() -> dict[LeadsTo, int]:
    """How often entries that lead to each candidate were hit, by all front doors together."""
    found: dict[LeadsTo, int] = {}
    for entries in list(_all):
        for name, hits in entries.hits().items():
            found[name] = found.get(name, 0) + hits
    return found


def _renew_locks() -> None:
    for entries in list(_all):
        entries.renew_lock()


settings.on_change(drop_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)
