"""Caches in pages whose table and lengths nobody reads, as they lie on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fastattn.problems.masks.mask import Mask
from fastattn.problems.masks.unread import FilledUnread, half_filled
from fastattn.problems.masks.values import whole_numbers

if TYPE_CHECKING:
    from torch import Tensor


def followed(table: Tensor, lengths: Tensor, page: int) -> Tensor:
    """A page table (batch, pages) as far as it is filled; behind that it may say anything, and this says a page that is filled.

    lengths: int, of each entry or of all.
    """
    import torch

    if not table.numel():
        return table
    firsts = torch.arange(0, table.shape[1] * page, page, dtype=lengths.dtype, device=table.device)
    is_filled = firsts < lengths.expand(table.shape[0])[:, None]
    first = table[:, :1].where(is_filled[:, :1], 0)
    first = first.where(is_filled[:, :1], first.amax())
    return table.where(is_filled, first)


def in_one_piece(x: Tensor, table: Tensor) -> Tensor:
    """The caches (batch, tokens, heads, dim) that pages (pages, page, heads, dim) make up, copied once."""
    (batch, each_has), (_, page, heads, dim) = table.shape, x.shape
    return x.index_select(0, table.flatten()).view(batch, each_has * page, heads, dim)


@dataclass(frozen=True, slots=True, repr=False, init=False, eq=False)
class FilledPagesUnread(FilledUnread):
    """A cache in pages: as FilledUnread, of keys that lie in the pages that a table names. page_table makes it there.

    page: tokens in a page. table: int32 [batch, pages], the pages of each entry; k and v of the call are then all pages there
    are, in the place of [batch, kv_len]. Without it they are caches, and the mask stands for those in pages. room: tokens that
    the table has room for. Raises TypeError or ValueError for anything else.
    """

    page: int = 1
    table: Any = None  # a Tensor
    room: int = field(default=0, repr=False)

    def __init__(
        self, keys: Any, queries: Any = 0, left: Any = -1, lengths: Any = None, page: Any = 1, table: Any = None, room: int = 0
    ) -> None:  # fmt: skip
        FilledUnread.__init__(self, keys, queries, left, lengths)
        object.__setattr__(self, "page", whole_numbers("page", page, 1, 1)[0])
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "room", room if table is None else table.shape[1] * self.page)

    def __eq__(self, other: object) -> bool:
        """Tables and lengths equal themselves alone."""
        if not isinstance(other, FilledPagesUnread) or self.table is not other.table:
            return False
        return FilledUnread.__eq__(self, other) and (self.page, self.room) == (other.page, other.room)

    def __hash__(self) -> int:
        return hash((FilledUnread.__hash__(self), self.page, self.room, id(self.table)))

    @property
    def page_table(self) -> Tensor | None:
        return self.table

    def gathered(self, x: Tensor) -> Tensor:
        """The cache (batch, heads, room, dim) that pages (pages, heads, page, dim) make up; a cache is one already."""
        if self.table is None:
            return x
        return in_one_piece(x.transpose(1, 2), followed(self.table, self.lengths, self.page)).transpose(1, 2)

    def like(self, kv_len: int) -> Mask:
        """kv_len: what the table has room for; of the pages of a call, which a guard asks about, it says nothing."""
        return _half_filled_in_pages(self.room or kv_len, self.queries, self.left, self.page)

    def check(self, batch: int, heads: int, q_len: int, kv_len: int) -> None:
        FilledUnread.check(self, batch, heads, q_len, kv_len)
        if self.table is not None and self.table.shape[0] != batch:
            raise ValueError(f"a page table of {self.table.shape[0]} entries, got batch {batch}")


@lru_cache(64)  # a hit asks for it
def _half_filled_in_pages(room: int, queries: int, left: int, page: int) -> FilledPagesUnread:
    return FilledPagesUnread(half_filled(room, queries, left).keys, queries, left, page=page, room=room)
