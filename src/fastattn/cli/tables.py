"""What the command line shows: tables of verdicts and of candidates, and how a number stands in them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from math import exp, log
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastattn import explanation, units
from fastattn.problem import Problem
from fastattn.verdict import Trial, Verdict


def console() -> Console:
    """A terminal's own width, else COLUMNS, else 100."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=min(plain.width, 120) if "COLUMNS" in os.environ else 100)


def print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=1))


def _error(t: Trial | None) -> str:
    if t is None or t.forward is None:
        return ""
    return f"{t.forward:.2f}" + (f" / {t.backward:.2f}" if t.backward is not None else "")


def _gain(ratio: float | None) -> Text:
    if ratio is None:
        return Text("")
    style = "bold green" if ratio >= 1.03 else "dim" if ratio >= 0.97 else "red"
    return Text(f"{ratio:.2f}x", style)


def short(p: Problem) -> str:
    """A problem in as few words as tell it from the others of a table; the dtype stands apart."""
    heads = f"{p.q_heads}" if p.group == 1 else f"{p.q_heads}/{p.kv_heads}"
    q_len, kv_len = (f"{'~' if is_bucket and n > 16 else ''}{n}" for n, is_bucket in (
        (p.q_len, p.lengths == "all"), (p.kv_len, p.lengths != "exact")
    ))  # fmt: skip
    length = q_len if q_len == kv_len else f"{q_len} on {kv_len}"
    dims = f"{p.head_dim}" if p.head_dim == p.head_dim_v else f"{p.head_dim}/{p.head_dim_v}"
    causal = {None: "", "top_left": " causal", "bottom_right": " causal↘"}[p.causal]
    mask = f" {'bool' if p.mask == 'bool' else 'bias'} {p.mask_shape}" if p.mask else ""
    return f"{p.batch} x {heads} x {length} d{dims}{causal}{mask}{' fwd+bwd' if p.needs_grad else ''}"


def geomean(values: Iterable[float]) -> float:
    """The geometric mean; 1 of nothing."""
    logs = [log(value) for value in values]
    return exp(sum(logs) / len(logs)) if logs else 1.0


def tuned_table(found: list[tuple[str, Verdict]]) -> Table:
    """One line per verdict, in blocks of one dtype, and the geometric means below."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1), show_footer=True)
    all_gains = [v.speedup() or 1.0 for _, v in found]
    table.add_column("problem", footer=Text("geometric mean", "bold"), ratio=1)
    table.add_column("served by", style="cyan", overflow="fold")
    table.add_column("speed", justify="right", footer=_gain(geomean(all_gains)))
    table.add_column("default", justify="right")
    table.add_column("winner", justify="right")
    table.add_column("error", justify="right")
    for dtype in dict.fromkeys(v.problem.dtype for _, v in found):
        rows = [(name, v) for name, v in found if v.problem.dtype == dtype]
        mean = geomean(v.speedup() or 1.0 for _, v in rows)
        table.add_row(Text(dtype, "bold"), "", Text(f"{mean:.2f}x", "bold"))
        for name, v in rows:
            before, after = v.trial(v.incumbent), v.trial(v.winner)
            about = Text(f"  {name or short(v.problem)}")
            if name:
                about.append(f"  {short(v.problem)}", "dim")
            table.add_row(
                about,
                v.winner,
                _gain(v.speedup()),
                units.duration(before.time_us if before else None),
                units.duration(after.time_us if after else None),
                _error(after),
            )
        table.add_section()
    return table


def explained(e: explanation.Explanation) -> Table:
    """Every candidate of a problem: its numbers, or its reason in their place."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    table.add_column("")
    table.add_column("candidate", overflow="fold", max_width=34)
    for name in ("time", "speed", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", ratio=1)
    base = e.verdict.trial(e.verdict.incumbent) if e.verdict else None
    for t in e.rows:
        is_serving = t.candidate == e.served_by
        mark = "▸" if is_serving else ""
        style = "bold green" if is_serving else "" if t.time_us is not None else "dim"
        if t.time_us is not None and t.tombstone is None:
            gain = base.time_us / t.time_us if base is not None and base.time_us else None
            said = f"{units.size(t.temporary_bytes or 0)} temporary"
            said += f", keeps {units.size(t.saved_bytes)}" if t.saved_bytes else ""
            table.add_row(mark, t.candidate, units.duration(t.time_us), _gain(gain), _error(t), said, style=style)
        else:
            table.add_row(mark, t.candidate, "", "", _error(t), explanation.describe(t), style=style)
    return table
