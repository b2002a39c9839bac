"""What kernels for packed sequences and caches are told: of a Problem what kind, of a call where they begin and end."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from fastattn.environment.remembered import remembered
from fastattn.problems import bands, masks
from fastattn.problems.masks.packed import both_cut
from fastattn.problems.masks.unread import Sequences, sequences_of_lengths
from fastattn.problems.masks.values import each

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Packing(NamedTuple):
    """How sequences are packed. In each, a query at its corner's diagonal sees keys from `lower` to `upper` beside its own.

    corner: "" where nothing but the sequences' ends hides keys. are_same: each sequence has as many queries as keys, so that
    both corners coincide.
    """

    corner: str
    lower: int | None
    upper: int | None
    are_same: bool

    @property
    def window(self) -> bands.Sides | None:
        """(left, right) where it takes more than a triangle to say what is hidden in a sequence, -1 is no limit."""
        if self.lower is None and self.upper in (None, 0):
            return None
        return (-1 if self.lower is None else -self.lower), (-1 if self.upper is None else self.upper)


class Filling(NamedTuple):
    """A cache that is filled to some length, and nothing else. has_corner: the queries are the last of what is filled.

    left: keys that such a query sees before its own, -1 is no limit. page: tokens in a page, 0 where the cache is in none.
    """

    has_corner: bool
    left: int
    page: int


@lru_cache(256)
def filling_of(structure: str) -> Filling | None:
    """The filling that a Problem's structure comes to; None where its mask says something else."""
    mask = masks.parse(structure)
    page = mask.page if isinstance(mask, masks.FilledPagesUnread) else 0
    return Filling(mask.queries > 0, mask.left, page) if isinstance(mask, masks.Filled) else None


def kv_lens_of(mask: masks.Mask, batch: int, kv_len: int, device: torch.device) -> Tensor:
    """How much of each batch entry a mask that filling_of knows calls filled: int32 [batch]."""
    assert isinstance(mask, masks.Filled), f"{mask!r} is no cache"
    if isinstance(mask, masks.FilledUnread) and mask.lengths is not None:
        return mask.lengths[:batch]  # a check looks at the first entry alone
    return kv_lens_tensor(filled_to(mask, batch, kv_len), device)


def filled_to(mask: masks.Filled, batch: int, kv_len: int) -> tuple[int, ...]:
    """How much of each batch entry a mask with known lengths calls filled, of caches of kv_len."""
    keys = each(mask.keys)
    return tuple(min(keys[b % len(keys)], kv_len) for b in range(batch))


@remembered(64)  # the next layer asks for the same ones
def kv_lens_tensor(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Lengths as kernels take them: int32 [batch]."""
    import torch

    with torch.inference_mode(False):
        return torch.tensor(lengths, dtype=torch.int32, device="cpu").to(device, non_blocking=True)


def in_pages(k: Tensor, v: Tensor, mask: masks.Mask) -> tuple[Tensor, Tensor, masks.FilledPagesUnread]:
    """(k, v, mask) of a call on a cache in pages, (pages, h, page, d) with their table; a cache (b, h, s, d) is cut into such.

    What is cut lies in memory the other way round, behind a page of other numbers, so that a table which is not followed shows.
    """
    assert isinstance(mask, masks.FilledPagesUnread), f"{mask!r} is no cache in pages"
    if mask.table is not None:
        return k, v, mask
    import torch
    from torch.nn.functional import pad

    (batch, kv_len), page = (k.shape[0], k.shape[2]), mask.page
    each_has = -(-kv_len // page)
    table = torch.arange(1, 1 + batch * each_has, dtype=torch.int32, device=k.device).flip(0).view(batch, each_has)

    def cut(x: Tensor) -> Tensor:
        whole = pad(x.transpose(1, 2), (0, 0, 0, 0, 0, each_has * page - kv_len))
        pages = whole.unflatten(1, (each_has, page)).flatten(0, 1).flip(0)
        return torch.cat([pages[:1].neg(), pages]).transpose(1, 2)

    lengths = kv_lens_of(mask, batch, kv_len, k.device)
    return cut(k), cut(v), masks.FilledPagesUnread(mask.keys, mask.queries, mask.left, lengths, page, table)


@lru_cache(256)
def packing_of(structure: str, q_len: int, kv_len: int) -> Packing | None:
    """The packing that a Problem's structure comes to; None where its mask says something else as well."""
    found = _parts(masks.parse(structure))
    if found is None:
        return None
    base, corner, window = found
    if isinstance(base, masks.Document):
        if q_len != kv_len:
            return None  # queries and keys are not the same tokens
        are_same = True
    else:
        assert isinstance(base, masks.Packed)
        corner, window, are_same = base.corner, base.window, isinstance(base, masks.PackedUnread) and base.are_same
    lower, upper = bands.band(corner or None, window, 0, 0)
    return Packing(corner or ("top_left" if (lower, upper) != (None, None) else ""), lower, upper, are_same)


def sequences_of(mask: masks.Mask, q_len: int, kv_len: int, device: torch.device) -> Sequences | None:
    """The sequences of a mask that packing_of knows. Lengths that are not read stay where they are.

    None where it has a triangle at the lower right of sequences "all alike" that the tokens do not fill: its diagonal is then
    not that of the last one's own lengths.
    """
    found = _parts(mask)
    assert found is not None, f"{mask!r} is not packed"
    base = found[0]
    if isinstance(base, masks.PackedUnread):
        return base.of_lengths(q_len, kv_len, device).sequences  # type: ignore[attr-defined]
    if isinstance(base, masks.Document):
        length = base.lengths
        queries = both_cut(length, q_len, length, q_len)[0] if isinstance(length, int) else length
        return sequences_of_lengths(queries, queries, device)  # type: ignore[arg-type]
    whole = base.of_lengths(q_len, kv_len, device)
    assert isinstance(base, masks.Packed) and isinstance(whole, masks.Packed)
    is_uneven = {*each(whole.queries), base.queries} != {base.queries} or {*each(whole.keys), base.keys} != {base.keys}
    if isinstance(base.queries, int) and base.corner == "bottom_right" and is_uneven:
        return None
    return sequences_of_lengths(whole.queries, whole.keys, device)  # type: ignore[arg-type]


def _parts(mask: masks.Mask) -> tuple[masks.Mask, str, bands.Sides | None] | None:
    """(what says where sequences end, the corner and the window beside it); None where there is anything else."""
    parts = mask.parts()
    bases = [part for part in parts if isinstance(part, (masks.Document, masks.Packed)) and not part.is_per_batch()]
    corners = [part for part in parts if isinstance(part, masks.Causal)]
    windows = [part for part in parts if isinstance(part, masks.Window)]
    is_all = len(bases) + len(corners) + len(windows) == len(parts)
    if not is_all or len(bases) != 1 or len(corners) > 1 or len(windows) > 1:
        return None
    if isinstance(bases[0], masks.Packed) and len(parts) > 1:
        return None  # its positions are those of the whole, not of each sequence
    corner = corners[0].corner if corners else ""
    return bases[0], corner, (windows[0].left, windows[0].right) if windows else None
