"""What the command line asks for: shape words and options become Problems, the same for every command."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypeVar

import click
import torch

from fastattn.environment.device import Device
from fastattn.environment.settings import check_accuracy
from fastattn.problems import masks, presets
from fastattn.problems.bands import CORNERS, Sides
from fastattn.problems.layouts import TO_BHSD
from fastattn.problems.problem import Problem
from fastattn.problems.shapes import Shape, problem_of_shape

DTYPES = ("float32", "bfloat16", "float16", "float64")
ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
EXAMPLES = "8x16x196x64 is batch x heads x length x head_dim, 1x32/8x1x1024x128 has q_heads/kv_heads and q_len x kv_len"
SHAPES = """SHAPES are words: 8x16x196x64 is batch x heads x length x head_dim; 1x32/8x1x1024x128 is batch x q_heads/kv_heads
    x q_len x kv_len x head_dim; head_dim may be head_dim/head_dim_v."""
NUMBER, PAIR = r"[1-9]\d*", r"[1-9]\d*(?:/[1-9]\d*)?"
WORD = re.compile(rf"({NUMBER})x({PAIR})x({NUMBER})x(?:({NUMBER})x)?({PAIR})")
F = TypeVar("F", bound=Callable[..., Any])


def parse_shape(word: str) -> Shape:
    """A shape word. Raises click.UsageError that says what would be right."""
    found = WORD.fullmatch(word)
    if found is None:
        raise click.UsageError(f"SHAPE {word!r} cannot be read: {EXAMPLES} (head_dim may be head_dim/head_dim_v)")
    batch, heads, q_len, kv_len, dims = found.groups()
    q_heads, kv_heads = _pair(heads)
    head_dim, head_dim_v = _pair(dims)
    if q_heads % kv_heads:
        raise click.UsageError(f"SHAPE {word!r}: q_heads {q_heads} must be a multiple of kv_heads {kv_heads}")
    return Shape(int(batch), q_heads, kv_heads, int(q_len), int(kv_len or q_len), head_dim, head_dim_v)


def _pair(text: str) -> tuple[int, int]:
    first, _, second = text.partition("/")
    return int(first), int(second or first)


def _mask(text: str | None) -> tuple[tuple[str, str] | masks.Mask | None, bool]:
    """((dtype, pattern), whether it wants a gradient) of `DTYPE:PATTERN[:grad]`; or a Mask, as it is written in Python."""
    if text is None:
        return None, False
    if "(" in text:
        try:
            return masks.parse(text), False
        except ValueError as error:
            raise click.UsageError(f"--mask {error}") from None
    parts = text.split(":")
    if len(parts) not in (2, 3) or parts[2:] not in ([], ["grad"]):
        raise click.UsageError(
            f"--mask {text!r} must be DTYPE:PATTERN, as in bool:b11k (padding) or same:1hqk (a bias in q's dtype);"
            " :grad behind it gives it a gradient; or a mask of fastattn.masks, as in 'Causal() & Document(512)'"
        )
    return (ALIASES.get(parts[0], parts[0]), parts[1]), len(parts) == 3


def _window(text: str | None) -> Sides | None:
    if text is None:
        return None
    if not re.fullmatch(r"-?\d+,-?\d+", text):
        raise click.UsageError(f"--window {text!r} must be LEFT,RIGHT, as in 256,0; -1 is no limit")
    left, right = text.split(",")
    return int(left), int(right)


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
    **more: Any,
) -> dict[Problem, str]:
    """The problems that these arguments mean, each with the preset it comes from. Raises click.UsageError.

    more: window, softcap, dropout, lse and cast_from; kept: in a KVCache; compiled: of compiled code.
    """
    compiled, kept = (bool(more.pop(name, False)) for name in ("compiled", "kept"))
    if compiled and more.get("dropout"):
        raise click.UsageError("--dropout does not go with --compiled: compiled code draws its own, unchecked")
    wrong = {"--grad": grad, "--dropout": more.get("dropout"), "--compiled": compiled, "--window": more.get("window")}
    if kept and (with_it := next((name for name, is_there in wrong.items() if is_there), None)):
        raise click.UsageError(f"{with_it} does not go with --kept: a KVCache serves such calls from its plain tensors")
    kind, mask_grad = _mask(mask)
    extra: dict[str, Any] = {"layout": layout, "accuracy": _accuracy(accuracy), **more}
    extra["window"] = _window(more.get("window"))
    extra["cast_from"] = tuple((more.get("cast_from") or "").split(",")) if more.get("cast_from") else ()
    own = {
        "causal": causal,
        "mask": kind,
        "mask_grad": mask_grad,
        "strides": tuple(strides.split(",")) if strides else ("contiguous", "cache", "cache") if kept else None,
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
                problem = problem_of_shape(shape, getattr(torch, each), grad=grad, on=device)
            except (ValueError, NotImplementedError) as error:
                raise click.UsageError(f"{name}: {str(error).removeprefix('attention(): ')}") from None
            problem = problem.replace(compiled=compiled, kept=kept)
            found.setdefault(problem, name if name in presets.PRESETS else "")
    return found


def _accuracy(text: str | None) -> str | float | None:
    if text is None:
        return None
    try:
        return check_accuracy(float(text) if re.fullmatch(r"[\d.]+(e-?\d+)?", text) else text)
    except ValueError as error:
        raise click.UsageError(f"--accuracy: {error}") from None


def _in_full(context: click.Context, parameter: click.Parameter, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(ALIASES.get(name, name) for name in names)


def _is_here(context: click.Context, parameter: click.Parameter, device: str) -> str:
    """The device, if it is here."""
    if device == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        mine = Device.of(torch.device("cpu")).torch
        why = "torch.cuda.is_available() is False" if built else f"torch {mine} is built without CUDA"
        raise click.ClickException(f"no CUDA device here ({why})")
    return device


class Group(click.Group):
    """Commands. An option of theirs in front of the command is told to go behind it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            wrong = error.option_name
            having = [name for name, c in self.commands.items() if any(wrong in p.opts for p in c.params)]
            if not having:
                raise
            example = f"{ctx.command_path} {having[0]} {wrong}"
            raise click.UsageError(f"{wrong} goes behind the command: {example}", ctx) from None


device_option = click.option(
    "--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]), callback=_is_here
)
json_option = click.option("--json", "as_json", is_flag=True, help="Data instead of text.")


def asking(command: F) -> F:
    """The options that name problems, the same for tune and explain."""
    command.__doc__ = f"{(command.__doc__ or '').rstrip()}\n\n    {SHAPES}\n    "
    for option in reversed((
        click.argument("shapes", nargs=-1, metavar="[SHAPES]..."),
        click.option("--preset", multiple=True, metavar="NAME", help=f"all, or any of: {', '.join(presets.PRESETS)}."),
        click.option("--dtype", multiple=True, type=click.Choice((*DTYPES, *ALIASES)), callback=_in_full, metavar="DTYPE",
                     help="float32 (the default), bfloat16, float16, float64, or fp32, bf16, ...; several may be given."),
        click.option("--grad", is_flag=True, help="Forward and backward."),
        click.option("--causal", is_flag=False, flag_value="top_left", type=click.Choice(CORNERS),
                     help="The triangle's corner; top_left where none is named."),
        click.option("--mask", metavar="MASK",
                     help="bool:b11k (padding), same:1hqk (a bias in q's dtype), ...; or 'Causal() & Document(512)'."),
        click.option("--window", metavar="LEFT,RIGHT", help="Keys beside a query's own; -1 is no limit."),
        click.option("--softcap", type=float, default=0.0, metavar="CAP", help="Scores are capped: CAP * tanh(score / CAP)."),
        click.option("--dropout", is_flag=True, help="With dropout, at any rate."),
        click.option("--lse", is_flag=True, help="The log-sum-exp is returned too."),
        click.option("--cast-from", metavar="DTYPES", help="Under autocast: the dtypes of q,k,v and a mask before its casts."),
        click.option("--layout", type=click.Choice(list(TO_BHSD)), default="bhsd", show_default=True),
        click.option("--strides", metavar="CLASS", help="How q, k, v lie in memory, or Q,K,V: transposed, packed, cache, ..."),
        click.option("--accuracy", metavar="RUNG", help="exact, dtype, or the largest row error over |P||V|."),
        click.option("--kept", is_flag=True, help="K and V in a KVCache, which a kernel may keep in its own order."),
        click.option("--compiled", is_flag=True, help="In compiled code, as torch.compile makes it; some seconds a candidate."),
        device_option,
        json_option,
    )):  # fmt: skip
        command = option(command)
    return command
