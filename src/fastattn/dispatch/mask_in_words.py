"""What a mask of a call comes to, for explain(): how much of the scores it leaves, and whether tiles are worth it there."""

from __future__ import annotations

from textwrap import shorten
from typing import Any

from torch import Tensor

from fastattn.dispatch import fallback
from fastattn.dispatch.by_share import by_share
from fastattn.dispatch.service import Asked
from fastattn.planning.conversions.tiles import is_large, may_be_tiled
from fastattn.problems.masks import Mask
from fastattn.problems.tilings.of_dense import tiling_of_dense
from fastattn.problems.tilings.of_mask import tiling_of_mask
from fastattn.problems.tilings.tile import Tiling
from fastattn.verdicts.verdict import Verdict

LONGEST = 160  # characters of a mask that are printed


def mask_in_words(asked: Asked, mask: Any, served: str, verdict: Verdict | None) -> str:
    """A told mask itself, as its problem names one like it; and what tiles could make of it, if it may be read unasked."""
    is_another = isinstance(mask, Mask) and asked.problem.structure not in ("", str(mask))
    own = shorten(str(mask), LONGEST, placeholder=" ...") if is_another else ""
    return "; ".join(filter(None, (own, _of_tiles(asked, mask, served, verdict))))


def _of_tiles(asked: Asked, mask: Any, served: str, verdict: Verdict | None) -> str:
    p = asked.problem
    sizes = (p.batch, p.q_len, p.kv_len)
    if not is_large(p) or p.is_unread:
        return ""
    if p.structure and isinstance(mask, Mask):
        tiling = tiling_of_mask(mask if asked.facts.also is None else mask & asked.facts.also, *sizes)
    elif p.mask is None and p.told_mask is not None:
        return _in_words(tiling_of_mask(p.told_mask, *sizes), p.kv_len)
    elif isinstance(mask, Tensor) and may_be_tiled(p):
        tiling = tiling_of_dense(mask, *sizes)
    else:
        return ""
    if tiling is None:
        return "heads have masks of their own: tiles are not looked for"
    return _in_words(tiling, p.kv_len) + _worth(asked, tiling, served, verdict)


def _in_words(tiling: Tiling, kv_len: int) -> str:
    masked = sum(tile.is_masked for tile in tiling.tiles)
    keys = round(tiling.share * kv_len)
    return (
        f"{tiling.share:.0%} of the scores lie in {len(tiling.tiles):,} tiles, {masked:,} of them masked:"
        f" {keys:,} of {kv_len:,} keys a query in the mean"
    )


def _worth(asked: Asked, tiling: Tiling, served: str, verdict: Verdict | None) -> str:
    """What tiles would take, and what serves this call where it is not what its problem is served by."""
    candidate = next((c for c in fallback.in_order(asked, verdict, certain=False) if c.name == served), None)
    pair = by_share(candidate, asked, verdict, certain=False) if candidate is not None else None
    if pair is None:
        return ""
    serves, cost = pair.in_tiles if pair.worth.has(tiling) else pair.plain, pair.worth.cost(tiling)
    if tiling.share > pair.worth.most_share:
        text = f"; tiles serve up to {pair.worth.most_share:.0%}"
    else:
        unsure = f" ({pair.worth.most:.0%} would be sure to gain)" if pair.worth.most < cost <= 1 else ""
        text = f"; in tiles about {cost:.0%} of the time of {pair.plain.name}{unsure}"
    return text if serves == candidate else f"{text}, so {serves.name} serves this one"
