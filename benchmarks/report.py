"""What cpu.py found, as tables for the terminal and for docs/results, as JSON, and as a chart. gpu_check.py uses the tables."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

from rich.table import Table
from rich.text import Text

LONG_US = 100.0  # shorter problems count for their own rule alone: at least SHORT of F.sdpa's speed
SLOWER = 0.97
SHORT = 0.85
DTYPES = ("float32", "bfloat16", "float16")
AIMS = {
    ("forward", "all"): 1.5, ("forward", "bfloat16"): 1.5, ("forward", "float16"): 1.7,
    ("training", "float32"): 1.0, ("training", "bfloat16"): 1.0, ("training", "float16"): 3.0,
}  # fmt: skip


def plain_table(title: str | Text) -> Table:
    """A table without lines, for the terminal and for text files."""
    return Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))


@dataclass(frozen=True)
class Grid:
    """A table with one text column in front."""

    title: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]
    texts: int = 1  # so many columns are text, the first one and the last ones

    def _is_text(self, column: int) -> bool:
        return column == 0 or column > len(self.headings) - self.texts

    def rich(self) -> Table:
        table = plain_table(Text(self.title, "bold"))
        for column, heading in enumerate(self.headings):
            is_last = column == len(self.headings) - 1 and self._is_text(column)
            justify = "left" if self._is_text(column) else "right"
            table.add_column(heading, justify=justify, no_wrap=not is_last, overflow="fold")  # type: ignore[arg-type]
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def markdown(self) -> str:
        rule = ["---" if self._is_text(c) else "---:" for c in range(len(self.headings))]
        lines = [self.headings, rule, *([cell.replace("|", "\\|") for cell in row] for row in self.rows)]
        return f"### {self.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def kind(case: Any) -> str:
    return "training" if case.is_training else "forward"


def title_of(case: Any) -> str:
    """Such as "vit-196 bfloat16 training"; `--only` is matched against it."""
    return f"{case.name} {case.dtype} {kind(case)}"


def us(value: float) -> str:
    """A time in three digits or so."""
    for unit, size in (("us", 1.0), ("ms", 1e3), ("s", 1e6)):
        if value < 1e3 * size or unit == "s":
            shown = value / size
            return f"{shown:.{0 if shown >= 100 else 1 if shown >= 10 else 2}f} {unit}"
    raise AssertionError


def mean(results: Iterable[Any], value: Callable[[Any], float]) -> float:
    """Geometric mean with one weight per family and dtype, shared among the family's problems."""
    families: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for r in results:
        families[(r.case.family, r.case.dtype)].append((r.case.share, math.log(value(r))))
    logs = [sum(w * x for w, x in rows) / sum(w for w, _ in rows) for rows in families.values()]
    return math.exp(sum(logs) / len(logs))


def is_slower(r: Any) -> bool:
    """Below 0.97x of F.sdpa (0.85x on short problems) by more than the A/A spread."""
    return r.speedup < (SLOWER if r.sdpa_us >= LONG_US else SHORT) - r.spread


def first_call_limit_us(r: Any) -> float:
    return max(0.5e6, 40 * r.sdpa_us)


def grids(results: Sequence[Any], with_candidates: bool) -> list[Grid]:
    """One table per kind and dtype, the candidates if asked for, and the summary at the end."""
    found = []
    for of_kind in ("forward", "training"):
        for dtype in DTYPES:
            mine = [r for r in results if kind(r.case) == of_kind and r.case.dtype == dtype]
            if mine:
                found.append(_problems(f"{of_kind}, {dtype}", mine))
    if with_candidates:
        found += [candidates_of(r) for r in results]
    return [*found, summary(results)]


def _problems(title: str, results: Sequence[Any]) -> Grid:
    headings = ("problem", "F.sdpa", "cold", "disk", "warm", "gain", "regret", "error", "MiB", "A/A", "served by")
    rows = [
        (
            r.case.name,
            us(r.sdpa_us),
            us(r.cold_us) + ("!" if r.cold_us > first_call_limit_us(r) else ""),
            us(r.disk_us),
            us(r.ours_us),
            f"{r.speedup:.2f}x" + ("!" if is_slower(r) else ""),
            f"{r.regret:.2f}",
            f"{r.error:.2f}",
            f"{r.peak_bytes / 2**20:.1f}",
            f"{r.spread:.1%}",
            r.served,
        )
        for r in results
    ]
    return Grid(title, headings, rows, texts=2)


def candidates_of(r: Any) -> Grid:
    """Every candidate of one problem: its time, or why it was not timed."""
    rows = []
    for c in sorted(r.candidates, key=lambda c: (c.time_us is None, c.time_us or 0.0)):
        marks = ["oracle"] * (c is r.oracle) + ["served"] * (c.name == r.served)
        marks += [f"{c.left_out} at the first call"] if c.left_out and c.time_us is not None else []
        errors = [f"{e:.2f}" if e < 100 else f"{e:.3g}" for e in (c.forward, c.backward) if e is not None]
        time = us(c.time_us) if c.time_us is not None else ""
        gain = f"{r.sdpa_us / c.time_us:.2f}x" if c.time_us is not None else ""
        memory = f"{c.temporary_bytes / 2**20:.1f}" if c.temporary_bytes is not None else ""
        rows.append((f"kernel={c.name}", time, gain, " / ".join(errors), memory, ", ".join(marks) or c.reason or ""))
    headings = (title_of(r.case), "time", "gain", "error", "MiB", "")
    return Grid(f"candidates of {title_of(r.case)}: F.sdpa {us(r.sdpa_us)}", headings, rows, texts=2)


SUMMARY = (
    "geometric means", "problems", "gain", "aim", "regret", "first call", "disk", "error", "slower", "worst regret",
)  # fmt: skip


def summary(results: Sequence[Any]) -> Grid:
    """Means and the worst over problems of 100 us and more, forward and training apart; the other columns over all."""
    rows = []
    for of_kind in ("forward", "training"):
        for dtype in (*DTYPES, "all"):
            mine = [r for r in results if kind(r.case) == of_kind and dtype in ("all", r.case.dtype)]
            if not mine or (dtype == "all" and len({r.case.dtype for r in mine}) == 1):
                continue
            long = [r for r in mine if r.sdpa_us >= LONG_US]
            if not long:
                continue
            worst = max(long, key=lambda r: r.regret)
            aim = AIMS.get((of_kind, dtype))
            in_time = sum(r.cold_us <= first_call_limit_us(r) for r in mine)
            rows.append(
                (
                    f"{of_kind}, {dtype}",
                    str(len(long)),
                    f"{mean(long, lambda r: r.speedup):.2f}x",
                    f">= {aim:g}x" if aim else "",
                    f"{mean(long, lambda r: r.regret):.3f}",
                    f"{in_time}/{len(mine)}",
                    us(max(max(0.0, r.disk_us - r.ours_us) for r in mine)),
                    f"{max(r.error for r in mine):.2f}",
                    f"{sum(map(is_slower, mine))}/{len(mine)}",
                    f"{worst.regret:.2f} {worst.case.name} {worst.case.dtype}",
                )
            )
    return Grid("summary", SUMMARY, rows, texts=2)


def to_json(facts: dict[str, str], results: Sequence[Any]) -> dict[str, Any]:
    rows = [
        asdict(r) | {
            "title": title_of(r.case), "speedup": r.speedup, "regret": r.regret, "is_slower": is_slower(r),
            "oracle": r.oracle.name if r.oracle else None, "first_call_limit_us": first_call_limit_us(r),
        }
        for r in results
    ]  # fmt: skip
    table = summary(results)
    means = [dict(zip(table.headings, row, strict=True)) for row in table.rows]
    return {"environment": facts, "summary": means, "results": rows}


def write_json(path: str, facts: dict[str, str], results: Sequence[Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(to_json(facts, results), file, indent=1)


def write_markdown(path: str, facts: dict[str, str], results: Sequence[Any]) -> None:
    *tables, last = grids(results, with_candidates=True)
    lines = ["# Benchmark", "", "Made by `benchmarks/cpu.py`; docs/benchmarks.md says how to read it.", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join([*lines, "", last.markdown(), *(t.markdown() for t in tables)]))


def can_plot() -> bool:
    return find_spec("matplotlib") is not None


def plot(path: str, facts: dict[str, str], results: Sequence[Any]) -> None:
    """Speed against F.sdpa, one bar per problem and dtype; the line at 1 is F.sdpa."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = [k for k in ("forward", "training") if any(kind(r.case) == k for r in results)]
    names = {k: list(dict.fromkeys(r.case.name for r in results if kind(r.case) == k)) for k in kinds}
    figure, axes = pyplot.subplots(
        1, len(kinds), figsize=(4 + 0.45 * sum(map(len, names.values())), 5), squeeze=False,
        gridspec_kw={"width_ratios": [max(2, len(names[k])) for k in kinds]},
    )  # fmt: skip
    for axis, of_kind in zip(axes[0], kinds, strict=True):
        for index, dtype in enumerate(DTYPES):
            mine = {r.case.name: r for r in results if kind(r.case) == of_kind and r.case.dtype == dtype}
            if mine:
                places = [names[of_kind].index(name) + (index - 1) * 0.27 for name in mine]
                long = [r for r in mine.values() if r.sdpa_us >= LONG_US] or list(mine.values())
                label = f"{dtype} (mean {mean(long, lambda r: r.speedup):.2f}x)"
                axis.bar(places, [r.speedup for r in mine.values()], 0.25, label=label)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axis.set_xticks(range(len(names[of_kind])), names[of_kind], rotation=60, ha="right")
        axis.set_title(f"attention() over F.sdpa, {of_kind}")
        axis.legend(fontsize="small")
    figure.text(0.01, 0.01, f"{facts['machine']}, torch {facts['torch']}", fontsize="x-small")
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(path, dpi=150)
