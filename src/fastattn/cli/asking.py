"""What the command line asks for: shape words and options become Problems, the same for every command."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

import click
import torch

from fastattn import config, presets
from fastattn.masks import CORNERS
from fastattn.problem import Problem

DTYPES = ("float32", "bfloat16", "float16", "float64")
EXAMPLES = "8x16x196x64 is batch x heads x length x head_dim, 1x32/8x1x1024x128 has q_heads/kv_heads and q_len x kv_len"
NUMBER, PAIR = r"[1-9]\d*", r"[1-9]\d*(?:/[1-9]\d*)?"
WORD = re.compile(rf"({NUMBER})x({PAIR})x({NUMBER})x(?:({NUMBER})x)?({PAIR})")
F = TypeVar("F", bound=Callable[..., Any])


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


def asking(command: F) -> F:
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
