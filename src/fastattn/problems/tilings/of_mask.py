"""The tiling of a mask with a meaning, from what it says of positions: no tensor of queries by keys is made."""

from __future__ import annotations

from collections.abc import Iterator

from fastattn.environment.remembered import remembered
from fastattn.problems.masks import runs
from fastattn.problems.masks.combined import all_of
from fastattn.problems.masks.mask import Mask
from fastattn.problems.tilings.tile import GAP, Tile, Tiling, rows_of_a_tile, tiling_of

FEWEST = 16  # rows of a tile that ends where the mask changes: what sees little is not worth a call of its own
WASTE = 512  # hidden pairs that are worth a call: fewer rows end there all the same


@remembered(256)  # masks are small and frozen: a model asks for the same one in each layer
def tiling_of_mask(mask: Mask, batch: int, q_len: int, kv_len: int, fewest: int = FEWEST) -> Tiling:
    """The tiling of a mask. fewest: rows of a tile that ends where the mask changes."""
    ends = range(1, batch + 1) if mask.is_per_batch() else [batch]
    alike: list[tuple[slice, list[Tile]]] = []  # neighbouring entries with the same tiles
    for b, end in enumerate(ends):
        entries = slice(b, end)
        tiles = [
            tile
            for residue in range(mask.step())
            for tile in _tiles(mask, b, range(residue, q_len, mask.step()), q_len, kv_len, fewest)
        ]
        if alike and alike[-1][1] == tiles:
            entries = slice(alike.pop()[0].start, end)
        alike.append((entries, tiles))
    placed = (tile._replace(batch=entries) for entries, tiles in alike for tile in tiles)
    return tiling_of(placed, batch, q_len, kv_len)


def _tiles(mask: Mask, b: int, rows: range, q_len: int, kv_len: int, fewest: int) -> Iterator[Tile]:
    """Those of some rows of a batch entry, which may have a step; for which entries they hold is said later."""
    offset = mask.offset(q_len, kv_len)
    for block in _blocks(mask, b, rows, offset, kv_len, fewest):
        at = range(block[0] + offset, block[-1] + offset + 1, rows.step)  # positions
        some, every = mask.runs(b, at, kv_len)
        keys = tuple(
            (first + (at[0] - first) % rows.step, last)  # the first one that lies in step with them
            for first, last in runs.joined(some, GAP)
        )
        keys = tuple(pair for pair in keys if pair[0] < pair[1])
        if keys:
            is_masked = mask.heads() > 0 or not runs.holds(every, keys)
            hiding = _hiding(mask, b, at, keys, kv_len) if is_masked else None
            yield Tile(slice(0), slice(block[0], block[-1] + 1, rows.step), keys, is_masked, hiding)


def _hiding(mask: Mask, b: int, at: range, keys: runs.Runs, kv_len: int) -> Mask:
    """The parts of a mask that hide something in a tile, or add to it."""

    def hides(part: Mask) -> bool:
        return part.heads() > 0 or not runs.holds(part.runs(b, at, kv_len)[1], keys)

    return all_of([part for part in mask.parts() if hides(part)] or [mask])


def _blocks(mask: Mask, b: int, rows: range, offset: int, kv_len: int, fewest: int) -> Iterator[range]:
    """The rows of each tile: no more than usual, and ending where the mask changes."""

    def seen(first: int, last: int) -> runs.Runs:
        """The keys of a tile of these rows."""
        return mask.runs(b, range(rows[first] + offset, rows[last - 1] + offset + 1, rows.step), kv_len)[0]

    def pairs(count: int, keys: runs.Runs) -> int:
        return count * sum(end - begin for begin, end in keys)

    size, count = rows_of_a_tile(len(rows)), len(rows)
    cuts = {*range(size, count, size), count} - {0}
    if rows.step == 1:
        cuts |= {cut - offset for cut in mask.cuts(b, count + offset) if 0 < cut - offset < count}
    first, held = 0, []  # the rows that are held back, too few for a tile, and where they would end
    for cut in sorted(cuts):
        held.append(cut)
        if cut - first < fewest and cut != count:
            continue
        if len(held) > 1 and pairs(cut - first, seen(first, cut)) > WASTE:
            last, known = first, ()
            for end in held:  # whether what comes next sees so much else that it is worth a call
                own = seen(last, end)
                both = runs.union(known, own)
                if pairs(end - first, both) - pairs(last - first, known) - pairs(end - last, own) > WASTE:
                    yield rows[first:last]
                    first, both = last, own
                last, known = end, both
            if cut - first < fewest and cut != count:
                held = [cut]
                continue
        yield rows[first:cut]
        first, held = cut, []
