"""`fastattn tune | explain | cache`: verdicts ahead of time, why a problem is served as it is, and what is stored.

Results go to stdout, as tables or with --json as data; the progress bar goes to stderr.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from math import exp, log
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import fastattn
from fastattn import config, explanation, guards, learnt, presets, prewarming, store
from fastattn.device import Device
from fastattn.masks import CORNERS
from fastattn.problem import Problem
from fastattn.verdict import Trial, Verdict

DTYPES = ("float32", "bfloat16", "float16", "float64")
EXAMPLES = "8x16x196x64 is batch x heads x length x head_dim, 1x32/8x1x1024x128 has q_heads/kv_heads and q_len x kv_len"
NUMBER, PAIR = r"[1-9]\d*", r"[1-9]\d*(?:/[1-9]\d*)?"
WORD = re.compile(rf"({NUMBER})x({PAIR})x({NUMBER})x(?:({NUMBER})x)?({PAIR})")
F = TypeVar("F", bound=Callable[..., Any])


# --- from the command line to problems


def parse_shape(word: str) -> presets.Shape:
    """A shape word. Raises click.UsageError that says what would be right."""
    found = WORD.fullmatch(word)
    if found is None:
        raise click.UsageError(f"SHAPE {word!r} cannot be read: {EXAMPLES} (head_dim may be head_dim/head_dim_v)")
    batch, heads, q_len, kv_len, dims = found.groups()
    q_heads, kv_heads = _pair(heads)
    head_dim, head_dim_v = _pair(dims)
    if q_heads % kv_heads:
        raise click.UsageError(f"SHAPE {word!r}: q_heads {q_heads} must be a multiple of kv_heads {kv_heads}")
    return presets.Shape(int(batch), q_heads, kv_heads, int(q_len), int(kv_len or q_len), head_dim, head_dim_v)


def _pair(text: str) -> tuple[int, int]:
    first, _, second = text.partition("/")
    return int(first), int(second or first)


def _mask(text: str | None) -> tuple[tuple[str, str] | None, bool]:
    """((dtype, pattern), whether it wants a gradient) of `DTYPE:PATTERN[:grad]`."""
    if text is None:
        return None, False
    parts = text.split(":")
    if len(parts) not in (2, 3) or parts[2:] not in ([], ["grad"]):
        raise click.UsageError(
            f"--mask {text!r} must be DTYPE:PATTERN, as in bool:b11k (padding) or same:1hqk (a bias in q's dtype);"
            " :grad behind it gives it a gradient"
        )
    return (parts[0], parts[1]), len(parts) == 3


def problems(
    shapes: Iterable[str],
    preset: Iterable[str] = (),
    dtype: Iterable[str] = (),
    grad: bool = False,
    causal: str | None = None,
    mask: str | None = None,
    layout: str = "bhsd",
    strides: str | None = None,
    accuracy: str | None = None,
    device: str = "cpu",
) -> dict[Problem, str]:
    """The problems that these arguments mean, each with the preset it comes from. Raises click.UsageError."""
    kind, mask_grad = _mask(mask)
    extra: dict[str, Any] = {"layout": layout, "accuracy": _accuracy(accuracy)}
    own = {
        "causal": causal,
        "mask": kind,
        "mask_grad": mask_grad,
        "strides": tuple(strides.split(",")) if strides else None,
    }
    wanted = [(word, replace(parse_shape(word), **own, **extra)) for word in shapes]
    given = [f"--{name}" for name, value in (("causal", causal), ("mask", mask), ("strides", strides)) if value]
    chosen = list(presets.PRESETS) if "all" in preset else list(preset)
    if chosen and given:
        raise click.UsageError(f"{given[0]} does not go with --preset, which brings its own; give the SHAPE instead")
    for name in chosen:
        if name not in presets.PRESETS:
            raise click.UsageError(f"--preset {name!r} is not known; there are all, {', '.join(presets.PRESETS)}")
        wanted += [(name, replace(shape, **extra)) for shape in presets.PRESETS[name]]
    if not wanted:
        raise click.UsageError(
            f"nothing to do: give a SHAPE ({EXAMPLES}) or --preset all, {', '.join(presets.PRESETS)}"
        )
    found: dict[Problem, str] = {}
    for each in dtype or ("float32",):
        for name, shape in wanted:
            try:
                problem = presets.problem(shape, getattr(torch, each), grad=grad, on=device)
            except (ValueError, NotImplementedError) as error:
                raise click.UsageError(f"{name}: {error}") from None
            found.setdefault(problem, name if name in presets.PRESETS else "")
    return found


def _accuracy(text: str | None) -> str | float | None:
    if text is None:
        return None
    try:
        return config.check_accuracy(float(text) if re.fullmatch(r"[\d.]+(e-?\d+)?", text) else text)
    except ValueError as error:
        raise click.UsageError(f"--accuracy: {error}") from None


# --- what is shown


def _console() -> Console:
    """A terminal's own width, else COLUMNS, else 100."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=min(plain.width, 120) if "COLUMNS" in os.environ else 100)


def _print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=1))


def _time(us: float | None) -> str:
    if us is None:
        return ""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if us >= size:
            return f"{us / size:.3g} {unit}" if us < 999.5 * size else f"{us / size:.0f} {unit}"
    return f"{us:.3g} us"


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
                _time(before.time_us if before else None),
                _time(after.time_us if after else None),
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
            said = f"{explanation._bytes(t.temporary_bytes or 0)} temporary"
            said += f", keeps {explanation._bytes(t.saved_bytes)}" if t.saved_bytes else ""
            table.add_row(mark, t.candidate, _time(t.time_us), _gain(gain), _error(t), said, style=style)
        else:
            table.add_row(mark, t.candidate, "", "", _error(t), explanation.describe(t), style=style)
    return table


# --- commands


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(fastattn.__version__, prog_name="fastattn")
def main() -> None:
    """Attention by the fastest kernel on this machine that is right."""
    try:
        config.current()
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _asking(command: F) -> F:
    """The options that name problems, the same for tune and explain."""
    for option in reversed((
        click.argument("shapes", nargs=-1, metavar="[SHAPES]..."),
        click.option("--preset", multiple=True, metavar="NAME", help=f"all, or any of: {', '.join(presets.PRESETS)}."),
        click.option("--dtype", multiple=True, type=click.Choice(DTYPES), help="Several may be given. Default: float32."),
        click.option("--grad", is_flag=True, help="Forward and backward."),
        click.option("--causal", type=click.Choice(CORNERS), help="The triangle's corner."),
        click.option("--mask", metavar="DTYPE:PATTERN", help="bool:b11k (padding), same:1hqk (a bias in q's dtype), ..."),
        click.option("--layout", type=click.Choice(["bhsd", "bshd", "sbhd"]), default="bhsd", show_default=True),
        click.option("--strides", metavar="CLASS", help="How q, k, v lie in memory, or Q,K,V: transposed, packed, cache, ..."),
        click.option("--accuracy", metavar="RUNG", help="exact, dtype, or the largest row error over |P||V|."),
        click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"])),
        click.option("--json", "as_json", is_flag=True, help="Data instead of tables."),
    )):  # fmt: skip
        command = option(command)
    return command


@main.command()
@_asking
@click.option("--force", is_flag=True, help="Tune again what has a verdict already.")
def tune(as_json: bool, force: bool, **asked: Any) -> None:
    """Tune problems now, without a time limit, and store the verdicts.

    SHAPES are words: 8x16x196x64 is batch x heads x length x head_dim; 1x32/8x1x1024x128 is batch x q_heads/kv_heads x q_len x
    kv_len x head_dim; head_dim may be head_dim/head_dim_v.
    """
    wanted = problems(**asked)
    found: list[tuple[str, Verdict]] = []
    counts = (SpinnerColumn(), BarColumn(20), TextColumn("{task.completed}/{task.total}"))
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    what = TextColumn("{task.description}", markup=False)
    with Progress(*counts, *times, what, console=Console(stderr=True), transient=True, disable=as_json) as bar:
        task = bar.add_task("", total=len(wanted))

        def step(problem: Problem, candidate: str, index: int, count: int) -> None:
            bar.update(task, description=f"{short(problem)} {problem.dtype}: {candidate} ({index}/{count})")

        for problem, name in wanted.items():
            bar.update(task, description=f"{short(problem)} {problem.dtype}")
            found.append((name, prewarming.tune(problem, progress=step, force=force)[0]))
            bar.advance(task)
    if as_json:
        _print_json([{**v.to_json(), "preset": name or None, "speedup": v.speedup()} for name, v in found])
        return
    console = _console()
    console.print(tuned_table(found))
    console.print(
        Text(f"\nspeed against F.scaled_dot_product_attention on {Device.of(torch.device(asked['device'])).name}, "
             f"{torch.get_num_threads()} threads; error of what serves, 1.00 is the most allowed"
             f"{' (forward / backward)' if asked['grad'] else ''}; ~ stands for its bucket of lengths", "dim")
    )  # fmt: skip


@main.command()
@_asking
@click.option("--tune", "tune_first", is_flag=True, help="Measure now.")
def explain(as_json: bool, tune_first: bool, **asked: Any) -> None:
    """Show which kernel serves a problem, and why: every known kernel with its numbers or its reason."""
    wanted = problems(**asked)
    if tune_first:
        for problem in wanted:
            prewarming.tune(problem)
    settings = config.current()
    now = guards.Context(off=settings.mode == "off", cached=settings.mode == "cached")
    found = [explanation.of_problem(problem, None, now) for problem in wanted]
    if as_json:
        _print_json([e.to_json() for e in found])
        return
    console = _console()
    for index, e in enumerate(found):
        if index:
            console.print()
        console.print(Text(str(e.problem), "bold"))
        console.print(Text.assemble("served by ", (e.served_by, "bold green"), f": {e.why}"))
        console.print(explained(e), soft_wrap=False)


@main.group()
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
        _print_json({"written": layers[0], "read": layers})
    else:
        click.echo("\n".join(layers))


@cache.command()
@_json_option
def show(as_json: bool) -> None:
    """List the stored verdicts of the directory that is written."""
    found = list(_store().verdicts())
    if as_json:
        _print_json([{**v.to_json(), "file": str(file), "speedup": v.speedup()} for file, v in found])
        return
    console = _console()
    if found:
        found.sort(key=lambda pair: (pair[1].problem.dtype, str(pair[1].problem)))
        console.print(tuned_table([("", v) for _, v in found]))
    console.print(Text(f"{len(found)} verdicts in {_store().root}", "dim"), soft_wrap=True)


@cache.command()
@_json_option
def clear(as_json: bool) -> None:
    """Delete the stored verdicts, and nothing else in the directory."""
    count = _store().clear()
    if as_json:
        _print_json({"deleted": count})
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
        _print_json({"file": str(file), "verdicts": len(found)})
    else:
        click.echo(f"{len(found)} verdicts for {silicon.slug} in {file}")


if __name__ == "__main__":
    main()
