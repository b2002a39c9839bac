"""`fastattn cache`: where the verdicts are stored, what they say, and their way into a manifest."""

from __future__ import annotations

from pathlib import Path

import click
import torch

from fastattn.cli.encoding import say
from fastattn.cli.shape_words import Group, device_option, json_option
from fastattn.cli.tables import console, print_json, print_tuned
from fastattn.dispatch.session import session
from fastattn.environment.device import Device
from fastattn.environment.settings import current_settings
from fastattn.verdicts import store
from fastattn.verdicts.manifest import export_manifest


@click.group(cls=Group)
def cache() -> None:
    """The verdicts on disk (docs/cache.md)."""


def _store() -> store.Store:
    """The store that is written. Raises click.ClickException where there is none."""
    found = session.store(current_settings())
    if found.root is None:
        raise click.ClickException(f"{found.why_none}; {store.SET_ONE}")
    return found


@cache.command()
@json_option
def path(as_json: bool) -> None:
    """Print the directories, the one that is written first."""
    layers = [str(layer) for layer in _store().layers]
    if as_json:
        print_json({"written": layers[0], "read": layers})
    else:
        say("\n".join(layers))


@cache.command()
@json_option
def show(as_json: bool) -> None:
    """List the stored verdicts of the directory that is written."""
    mine = _store()
    found = list(mine.verdicts())
    if as_json:
        print_json([{**v.to_json(), "file": str(file), "speedup": v.speedup()} for file, v in found])
        return
    found.sort(key=lambda pair: (pair[1].problem.dtype, str(pair[1].problem)))
    print_tuned([("", v) for _, v in found], console(), f"{len(found)} verdicts in {mine.root}")


@cache.command()
@json_option
def clear(as_json: bool) -> None:
    """Delete the stored verdicts, and nothing else in the directory."""
    mine = _store()
    count = mine.clear()
    if as_json:
        print_json({"deleted": count})
    else:
        say(f"deleted {count} verdicts from {mine.root}")


@cache.command()
@click.argument("file", type=click.Path(dir_okay=False, writable=True, path_type=Path))
@device_option
@json_option
def export(file: Path, device: str, as_json: bool) -> None:
    """Write the verdicts into one FILE.

    They are those that hold on this machine; FASTATTN_MANIFEST=FILE reads them.
    """
    here = Device.of(torch.device(device))
    found = list(_store().verdicts(here))
    file.write_text(export_manifest((v for _, v in found), here) + "\n", encoding="utf-8")
    if as_json:
        print_json({"file": str(file), "verdicts": len(found)})
    else:
        say(f"{len(found)} verdicts for {here.slug} in {file}")
