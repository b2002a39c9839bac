"""When tiles are worth it: what the tiles of a mask cost, by what those of another one did."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from fastattn.problems.tilings.tile import Tiling

MOST_IN_TILES = 0.9  # of all pairs: with more of them there is nothing to gain, whatever the times say


class Worth(NamedTuple):
    """Costs are in parts of what another candidate takes, which computes all pairs.

    mean, unmasked, masked: what all pairs would cost in tiles like those that were timed, in tiles without a mask, and in
    tiles that have one. most, most_share: tiles are worth it where they cost no more, and hold no larger share of all pairs.
    """

    mean: float
    unmasked: float
    masked: float
    most: float = 1.0
    most_share: float = MOST_IN_TILES

    def cost(self, tiling: Tiling) -> float:
        """What the tiles cost together."""
        return self._cost(tiling.share, tiling.masked_share)

    def has(self, tiling: Tiling) -> bool:
        """Whether these tiles are worth it."""
        return self.allows(tiling.share, tiling.masked_share)

    def allows(self, share: float, masked_share: float) -> bool:
        """Whether tiles with such shares of all pairs are worth it; where they are not, larger ones are not either."""
        return share <= self.most_share and self._cost(share, masked_share) <= self.most

    def _cost(self, share: float, masked_share: float) -> float:
        """The less of two estimates: in proportion to the share, and by what tiles with and without a mask cost."""
        return min(share * self.mean, (share - masked_share) * self.unmasked + masked_share * self.masked)


def worth_of(share: float, masked_share: float, cost: float) -> Worth:
    """By tiles that cost so much, with a share of all pairs, and of these so many in masked tiles.

    A pair in a tile without a mask is taken to cost no more than one of all does; what the tiles cost beyond that is put down
    to the masks: padding leaves few tiles without any, a triangle or a window many, and each of those costs more.
    """
    mean = cost / share
    if not masked_share:
        return Worth(mean, mean, mean)
    unmasked = min(1.0, mean)
    return Worth(mean, unmasked, (cost - (share - masked_share) * unmasked) / masked_share)
