"""What the tiles of a dense mask take, as the tuning tells it and as it is measured, and whether the right one serves.

    python benchmarks/tile_costs.py [--only REGEX] [--dtype bfloat16] [--seconds 1.5] [--smoke] [--results docs/results]

A tuning times tiles and what computes all pairs on a mask that it makes up; each call then decides by its own mask which of
the two serves (docs/how-it-works.md, Tiles). Here the two, ordered by name, and attention() alternate within each round, for
masks of several kinds and shares; times are medians, in parts of the one that computes all pairs.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from machine import add_results, environment, in_one_line, keep, open_console
from report import plain_table
from rich.table import Table
from rounds import interleave

import fastattn
from fastattn import attention
from fastattn.problems.tilings.of_dense import tiling_of_dense
from fastattn.verdicts.verdict import Verdict

SIZES = ((16, 12, 512, 64), (1, 12, 2048, 64), (4, 8, 1024, 128), (32, 4, 512, 32))  # batch, heads, tokens, head_dim
PADDED_TO = (0.25, 0.5, 0.6, 0.75, 0.85)  # the mean length of the batch entries over the longest


@dataclass(frozen=True)
class Result:
    """told, took, served: what tiles are told to take, what they took, and what attention() took, in parts of `plain`."""

    size: str
    mask: str
    share: float
    masked_share: float
    told: float
    took: float
    served: float
    plain_ms: float

    @property
    def regret(self) -> float:
        """What attention() took over the faster of the two."""
        return self.served / min(1.0, self.took)


def made_up(batch: int, n: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Masks of each batch entry, (batch, n, n)."""
    at = torch.arange(n)
    triangle, apart = at[:, None] >= at, at[:, None] - at
    for mean in PADDED_TO if batch > 1 else ():
        lengths = torch.linspace(max(1.0, n * (2 * mean - 1)), min(n, 2 * mean * n), batch).long()
        padded = (at < lengths[:, None])[:, None, :].expand(batch, n, n)
        yield f"padded to {mean:.0%}", padded
        yield f"padded to {mean:.0%}, causal", padded & triangle
    for name, one in (
        ("causal", triangle),
        ("a window of half, causal", triangle & (apart < n // 2)),
        ("a quarter to each side", apart.abs() < n // 4),
        ("half to each side", apart.abs() < n // 2),
        ("a prefix of half", triangle | (at < n // 2)),
        ("3 documents", (at // (n // 3))[:, None] == at // (n // 3)),
    ):
        yield name, one.expand(batch, n, n)


def measure(size: tuple[int, ...], dtype: torch.dtype, seconds: float, only: str) -> Iterator[Result]:
    batch, heads, n, head_dim = size
    q, k, v = (torch.randn(batch, n, heads, head_dim).to(dtype).transpose(1, 2) for _ in range(3))
    for name, of_entries in made_up(batch, n):
        if not re.search(only, name):
            continue
        mask = of_entries[:, None].contiguous()
        verdict = fastattn.explain(q, k, v, mask, tune=True).verdict
        pair = both(verdict)
        if pair is None:
            print(f"{size}, {name}: tiles were not timed", file=sys.stderr)
            continue
        calls: dict[str, Any] = {name: (lambda name=name: attention(q, k, v, mask, kernel=name)) for name in pair}  # noqa: B023
        calls["attention"] = lambda: attention(q, k, v, mask)  # noqa: B023
        found = interleave(calls, rounds=15, seconds=seconds)
        tiles, plain, served = (median(found[name]) for name in calls)
        tiling = tiling_of_dense(mask, batch, n, n)
        worth = verdict.worth_of_tiles(*(verdict.trial(name) for name in pair))
        shape = " x ".join(map(str, size))
        told = worth.cost(tiling)
        yield Result(shape, name, tiling.share, tiling.masked_share, told, tiles / plain, served / plain, 1e3 * plain)


def both(verdict: Verdict) -> tuple[str, str] | None:
    """The fastest in tiles and the fastest that computes all pairs."""
    timed = [trial.candidate for trial in verdict.timed()]
    tiles = [name for name in timed if "tiles" in name.split("+")]
    plain = [name for name in timed if "tiles" not in name.split("+")]
    return (tiles[0], plain[0]) if tiles and plain else None


def table(results: list[Result]) -> Table:
    shown = plain_table("what tiles take, over what computes all pairs")
    for heading in ("", "mask"):
        shown.add_column(heading)
    for heading in ("all pairs", "in tiles", "in masked ones", "told", "took", "attention()", "regret"):
        shown.add_column(heading, justify="right")
    for r in results:
        parts = (r.share, r.masked_share, r.told, r.took, r.served)
        shown.add_row(r.size, r.mask, f"{r.plain_ms:.1f} ms", *(f"{part:.2f}" for part in parts), f"{r.regret:.2f}")
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="masks whose name it finds")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--seconds", type=float, default=1.5, help="of each mask's rounds")
    parser.add_argument("--smoke", action="store_true", help="a small problem, two masks")
    add_results(parser, "tile-costs.txt and tile-costs.json")
    args = parser.parse_args()
    console, facts = open_console(130), environment()
    console.print(in_one_line(facts))
    results = []
    with tempfile.TemporaryDirectory() as directory:
        fastattn.options(cache_dir=directory, tune_budget=1e6)
        for size in ((2, 2, 512, 16),) if args.smoke else SIZES:
            print(f"{size} ...", file=sys.stderr)
            only = "75%|^causal$" if args.smoke else args.only
            results += measure(size, getattr(torch, args.dtype), 0.2 if args.smoke else args.seconds, only)
    console.print(table(results))
    mean = sum(r.regret for r in results) / max(1, len(results))
    console.print(f"regret: {mean:.3f} in the mean, at most {max((r.regret for r in results), default=1.0):.2f}")
    keep(args, facts, "tile-costs", console, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
