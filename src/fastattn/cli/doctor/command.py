"""`fastattn doctor`: the doctor's Report on one screen, made to be pasted into an issue."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

import fastattn
from fastattn.cli.doctor import Report, examine
from fastattn.cli.doctor.cache import Layer
from fastattn.cli.doctor.rows import Row
from fastattn.cli.tables import console, print_json
from fastattn.environment.text import format_bytes
from fastattn.kernels.libraries import import_probe


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Data instead of text.")
@click.option(
    "--timeout", default=import_probe.TIMEOUT_S, show_default=True, metavar="SECONDS", help="For importing a library."
)
def doctor(as_json: bool, timeout: float) -> None:
    """Say what is usable here, and what would fix the rest.

    Exit code 1 where fastattn does not work as it was asked to. The home directory is shown as ~, and nothing of the
    environment but fastattn's own settings.
    """
    err = Console(stderr=True)
    spinner = "line" if err.options.ascii_only else "dots"
    with err.status("looking at the kernel libraries", spinner=spinner) if err.is_terminal else nullcontext():
        report = examine(fastattn.__version__, timeout)
    if as_json:
        print_json(report.to_json())
    else:
        show(report, console())
    raise SystemExit(0 if report.works else 1)


def show(report: Report, out: Console) -> None:
    """Print a Report. What is soft-wrapped can be copied whole: commands, and the sentences of faults."""
    out.print(_head(report), soft_wrap=True)
    out.print(_facts(report))
    out.print(_libraries(report.libraries), soft_wrap=True)


def _head(report: Report) -> Text:
    """Whether it works, or each fault with its fix."""
    text = Text.assemble((f"fastattn {report.fastattn}: ", "bold"))
    if report.works:
        return text.append("attention() works here\n", "bold green")
    text.append(f"{len(report.faults)} problem{'s' if len(report.faults) > 1 else ''}\n", "bold red")
    for fault in report.faults:
        text.append("✗ ", "red").append(f"{fault.what}\n").append(f"  {fault.fix}\n", "cyan")
    return text


def _facts(report: Report) -> Table:
    """The machine, the cache, the settings, and fastattn's own kernels."""
    m = report.machine
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")

    def add(name: str, text: str, style: str = "") -> None:
        table.add_row(name, Text(text, style))

    add("torch", f"{m.torch}, CUDA {m.cuda or 'none'}, cuDNN {m.cudnn or 'none'}")
    for device in m.devices:
        here = f", {m.threads} of {m.cpus} threads" if device.type == "cpu" else f", sm{device.capability}"
        add(device.type, device.name + here)
    add("python", f"{m.python}, {m.executable}")
    add("system", m.system)
    add("compiler", m.compiler or "no C++ compiler: flex_attention on the CPU needs one")
    for layer in report.cache:
        add("cache" if layer.is_written else "", _layer(layer), "red" if layer.why_not else "")
    if not report.cache:
        add("cache", "none", "red")
    add(
        "settings",
        ", ".join(f"{name} {_value(value)}" for name, value in report.settings.items() if _is_said(name, value)),
    )
    known = [row for row in report.kernels if row.usable or row.found]  # the others' libraries stand below
    for index, (reason, names) in enumerate(_by_reason(known).items()):
        add(
            "" if index else "kernels",
            ", ".join(names) + (f": {reason}" if reason else ""),
            "dim" if reason else "green",
        )
    return table


def _layer(layer: Layer) -> str:
    if layer.why_not:
        return layer.why_not
    held = f"{layer.files} files, {format_bytes(layer.bytes)}" if layer.exists else "not made yet"
    bad = f", {layer.unreadable} unreadable (fastattn cache clear)" if layer.unreadable else ""
    free = f", {format_bytes(layer.free)} free" if layer.free is not None else ""
    return f"{layer.path}{'' if layer.is_written else ' (only read)'}: {held}{bad}{free}"


def _is_said(name: str, value: object) -> bool:
    return bool(value) and name != "cache_dir"  # the cache has its own line


def _value(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _by_reason(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Names of rows by why they are not usable; those that are come first, under ""."""
    found: dict[str, list[str]] = {}
    for row in sorted(rows, key=lambda row: not row.usable):
        found.setdefault("; ".join(row.why_not), []).append(row.name)
    return found


def _libraries(rows: Sequence[Row]) -> Text:
    """What is installed, each with its version and reasons; then what is not, by what it needs, and how to install it."""
    text = Text()
    width = max(len(row.name) for row in rows)
    for row in sorted((row for row in rows if row.found), key=lambda row: not row.usable):
        mark, style = ("✓", "green") if row.usable else ("✗", "red") if row.fix else ("-", "dim")
        text.append(f"\n{mark} ", style).append(f"{row.name:<{width}}  {row.version}  ")
        text.append("; ".join(row.why_not) or "usable", style)
        text.append(f"\n  {'':<{width}}  {row.fix}" if row.fix else "", "cyan")
    absent: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if not row.found:
            absent.setdefault(row.why_not[:2], []).append(row)
    text.append("\n" if text and absent else "")
    for shared, together in absent.items():
        text.append(f"\nkernel libraries: {'; '.join(shared)}", "dim")
        for row in together:
            own = f"  ({'; '.join(row.why_not[2:])})" if row.why_not[2:] else ""
            text.append(f"\n  {row.name:<{width}}  ").append(row.fix or "", "cyan").append(own, "dim")
    return text
