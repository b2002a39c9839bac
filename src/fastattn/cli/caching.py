"""`fastattn cache`: where the verdicts are stored, what they say, and their way into a manifest."""

from __future__ import annotations

from pathlib import Path

import click
import torch
from rich.text import Text

from fastattn import config, learnt, store
from fastattn.cli.tables import console, print_json, tuned_table
from fastattn.device import Device


@click.group()
def cache() -> None:
    """The verdicts on disk (docs/cache.md)."""


_json_option = click.option("--json", "as_json", is_flag=True, help="Data instead of text.")


def _store() -> store.Store:
    return learnt.settings_store(config.current())


@cache.command()
@_json_option
def path(as_json: bool) -> None:
    """Print the directories, the one that is written first."""
    layers = [str(layer) for layer in _store().layers]
    if not layers:
        raise click.ClickException("there is no home directory to cache in; set FASTATTN_CACHE_DIR")
    if as_json:
        print_json({"written": layers[0], "read": layers})
    else:
        click.echo("\n".join(layers))


@cache.command()
@_json_option
def show(as_json: bool) -> None:
    """List the stored verdicts of the directory that is written."""
    found = list(_store().verdicts())
    if as_json:
        print_json([{**v.to_json(), "file": str(file), "speedup": v.speedup()} for file, v in found])
        return
    out = console()
    if found:
        found.sort(key=lambda pair: (pair[1].problem.dtype, str(pair[1].problem)))
        out.print(tuned_table([("", v) for _, v in found]))
    out.print(Text(f"{len(found)} verdicts in {_store().root}", "dim"), soft_wrap=True)


@cache.command()
@_json_option
def clear(as_json: bool) -> None:
    """Delete the stored verdicts, and nothing else in the directory."""
    count = _store().clear()
    if as_json:
        print_json({"deleted": count})
    else:
        click.echo(f"deleted {count} verdicts from {_store().root}")


@cache.command()
@click.argument("file", type=click.Path(dir_okay=False, writable=True, path_type=Path))
@click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]))
@_json_option
def export(file: Path, device: str, as_json: bool) -> None:
    """Write the verdicts that hold on this machine into one FILE, for FASTATTN_MANIFEST."""
    silicon = Device.of(torch.device(device))
    found = list(_store().verdicts(silicon))
    file.write_text(store.export(iter(found), silicon) + "\n", encoding="utf-8")
    if as_json:
        print_json({"file": str(file), "verdicts": len(found)})
    else:
        click.echo(f"{len(found)} verdicts for {silicon.slug} in {file}")
