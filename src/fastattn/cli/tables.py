"""What the command line shows: a table of verdicts, an explanation, and how a number stands in them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from math import exp, log
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastattn.cli.encoding import say
from fastattn.dispatch.explain import Explanation
from fastattn.dispatch.render import IN_DOUBT, challenger, errors_of, mark_of_doubt
from fastattn.environment.text import format_duration
from fastattn.problems.spelling import briefly
from fastattn.verdicts.verdict import Verdict

ONE_LINE: dict[str, Any] = {"no_wrap": True, "overflow": "ellipsis"}
WIDE = 10_000  # columns: what is piped is never wrapped, so that grep finds it
Named = tuple[str, Verdict]  # the preset that a verdict's problem comes from, or ""


def console() -> Console:
    """As wide as the terminal; without end where the output is none."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=WIDE)


def print_json(data: Any) -> None:
    """Data as JSON, which is always ASCII: it is read by programs."""
    say(json.dumps(data, indent=1, ensure_ascii=True))


def geomean(values: Iterable[float]) -> float:
    """The geometric mean; 1 of nothing."""
    logs = [log(value) for value in values]
    return exp(sum(logs) / len(logs)) if logs else 1.0


def _gain(ratio: float | None, mark: str = "") -> Text:
    if ratio is None:
        return Text("")
    style = "bold green" if ratio >= 1.03 else "dim" if ratio >= 0.97 else "red"
    return Text(f"{ratio:.2f}x{mark}", style)


def _nearest(verdict: Verdict) -> str:
    """What came nearest to replacing the default where nothing did, and its speed against it."""
    found = challenger(verdict) if verdict.winner == verdict.incumbent else None
    return f"{found[0]} {found[1]:.2f}x" if found else ""


DROPPED = (
    "nearest",
    "error",
    "winner",
    "default",
)  # columns that go, in this order, where a terminal is too narrow for all


def tuned_table(found: Sequence[Named], width: int) -> Table:
    """One line per verdict, in blocks of one dtype, and the geometric means below, with as many columns as the width has."""
    table = _tuned_table(found, (), in_full=True)
    for count in range(len(DROPPED) + 1):
        if Console(width=WIDE).measure(table).maximum <= width:
            break
        table = _tuned_table(found, DROPPED[:count], in_full=False)
    return table


def _tuned_table(found: Sequence[Named], dropped: Sequence[str], in_full: bool) -> Table:
    """in_full: a preset's name and its shape; else the shape only where the name does not tell."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1), show_footer=True)
    unsure = " " if any(mark_of_doubt(v) for _, v in found) else ""
    table.add_column("problem", footer=Text("geometric mean", "bold"))
    table.add_column("served by")
    mean = _gain(geomean(v.speedup() or 1.0 for _, v in found), unsure)
    table.add_column("speed", justify="right", footer=mean, no_wrap=True)
    last = [name for name in ("default", "winner", "error", "nearest") if name not in dropped]
    for name in last:
        table.add_column(name, justify="left" if name == "nearest" else "right", no_wrap=True)
    for dtype in dict.fromkeys(v.problem.dtype for _, v in found):
        rows = [(name, v) for name, v in found if v.problem.dtype == dtype]
        times = Counter(name for name, _ in rows)
        mean = geomean(v.speedup() or 1.0 for _, v in rows)
        table.add_row(Text(dtype, "bold"), "", Text(f"{mean:.2f}x{unsure}", "bold"))
        for name, v in rows:
            about = Text(f"  {name or briefly(v.problem)}", **ONE_LINE)
            if name and (in_full or times[name] > 1):
                about.append(f"  {briefly(v.problem)}", "dim")
            before, after = v.trial(v.incumbent), v.trial(v.winner)
            cells = {
                "default": format_duration(before.time_us if before else None),
                "winner": format_duration(after.time_us if after else None),
                "error": errors_of(after),
                "nearest": _nearest(v),
            }
            gain = _gain(v.speedup(), mark_of_doubt(v) or unsure)
            table.add_row(about, Text(v.winner, "cyan", **ONE_LINE), gain, *(cells[column] for column in last))
        table.add_section()
    return table


def print_tuned(found: Sequence[Named], out: Console, *notes: str) -> None:
    """The table, and the notes below it."""
    if found:
        out.print(tuned_table(found, out.width))
        out.print()
    for note in (*notes, *([IN_DOUBT] if any(mark_of_doubt(v) for _, v in found) else ())):
        out.print(Text(note, "yellow" if note == IN_DOUBT else "dim"), soft_wrap=True)


STYLES = {"head": "", "served": "bold green", "timed": "", "out": "dim", "note": "yellow"}


def print_explained(e: Explanation, out: Console) -> None:
    """What `print(fastattn.explain(...))` prints, in colours, folded at the terminal's width."""
    for kind, line in e.lines(None if out.width == WIDE else out.width):
        out.print(Text(line, STYLES[kind]), soft_wrap=True)
