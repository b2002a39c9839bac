"""Rows of overhead.py: what something costs beyond something else, and the table of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from report import plain_table
from rich.table import Table
from rounds import interleave
from tiny import Problem, in_turn


@dataclass(frozen=True)
class Row:
    """One comparison. base and hit are medians in `unit`, over is what hit costs beyond base; spread is base against itself.

    share: over and spread are per cent of base.
    """

    name: str
    unit: str
    base: float
    hit: float
    over: float
    spread: float
    aim: float | None = None
    absurd: float | None = None  # beyond this even a smoke run fails
    note: str = ""
    share: bool = False

    @property
    def is_met(self) -> bool:
        return self.aim is None or self.over <= self.aim

    @property
    def is_absurd(self) -> bool:
        return self.absurd is not None and self.over - self.spread > self.absurd


class Bench:
    """Runs comparisons and keeps their rows."""

    def __init__(self, rounds: int, seconds: float) -> None:
        self.rounds, self.seconds = rounds, seconds
        self.rows: list[Row] = []

    def compare(
        self, name: str, base: Callable[[], object], hit: Callable[[], object], *, runs: int = 1, **more: Any
    ) -> None:
        """A row in ns a call; `runs` is how many calls one base() or hit() makes. more: aim, absurd, note."""
        calls = {"base": base, "hit": hit, "again": base}
        found = interleave(calls, rounds=self.rounds, seconds=self.seconds, sample_s=2e-3)
        ns = {arm: median(samples) / runs * 1e9 for arm, samples in found.items()}
        over = median((h - b) / runs * 1e9 for h, b in zip(found["hit"], found["base"], strict=True))
        self.rows.append(Row(name, "ns", ns["base"], ns["hit"], over, abs(ns["again"] - ns["base"]), **more))

    def in_turn(
        self,
        name: str,
        base: Callable[..., object],
        hit: Callable[..., object],
        problems: Sequence[Problem],
        **more: Any,
    ) -> None:
        """The same over several problems in turn."""
        self.compare(name, in_turn(base, problems), in_turn(hit, problems), runs=len(problems), **more)


def table(rows: Sequence[Row]) -> Table:
    title = "what a hit costs, and the start of a process; base and hit are one call"
    found = plain_table(title)
    found.add_column("", no_wrap=True)
    for heading in ("base", "hit", "over", "A/A", "aim"):
        found.add_column(heading, justify="right", no_wrap=True)
    found.add_column("", no_wrap=True)
    found.add_column("", overflow="fold")
    for row in rows:
        digits = {"ns": 0, "us": 1, "ms": 2}[row.unit]
        of_over, in_over = ("%", 2) if row.share else (row.unit, digits)
        found.add_row(
            row.name,
            f"{row.base:,.{digits}f} {row.unit}",
            f"{row.hit:,.{digits}f} {row.unit}",
            f"{row.over:+,.{in_over}f} {of_over}",
            f"{row.spread:,.{in_over}f} {of_over}",
            f"<= {row.aim:,.0f}" if row.aim is not None else "",
            "" if row.aim is None else "[green]met[/]" if row.is_met else "[red]missed[/]",
            row.note,
        )
    return found
