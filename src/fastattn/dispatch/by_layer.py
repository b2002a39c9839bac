"""report(): what a model's attention is served by, layer by layer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn.dispatch import attention, entries, four_dims, sdpa
from fastattn.dispatch.explain import Explanation, explain
from fastattn.dispatch.patching import patch
from fastattn.dispatch.resolve import Resolved
from fastattn.dispatch.session import session
from fastattn.environment.text import format_duration
from fastattn.problems.spelling import briefly

NONE = (
    "no attention was called: neither F.scaled_dot_product_attention nor fastattn.attention"
    " (torch.nn.TransformerEncoder attends by itself in eval mode without gradients)"
)


@dataclass(frozen=True, slots=True)
class Row:
    """Calls of layers that are alike. before_us, after_us: one by `before` and by what serves, as the tuning measured."""

    layers: tuple[str, ...]  # names of the modules, one for each call
    problem: str
    served_by: str
    why: str
    before: str = ""  # what would serve without fastattn, or where that cannot do it, what serves untuned
    before_us: float | None = None
    after_us: float | None = None

    @property
    def gain(self) -> float | None:
        return self.before_us / self.after_us if self.before_us and self.after_us else None


@dataclass(frozen=True, slots=True)
class Report:
    """What one run of a model came to: print it, or read its rows."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        if not self.rows:
            return NONE
        cells = [("layers", "calls", "problem", "served by", "", "a call", "why"), *map(_cells, self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(6)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[6]]) for row in cells
        ]
        return "\n".join([*(line.rstrip() for line in lines), self._in_all()])

    __repr__ = __str__

    def _in_all(self) -> str:
        measured = [row for row in self.rows if row.before_us and row.after_us]
        before, after = (
            sum(len(r.layers) * us for r in measured if (us := getattr(r, name))) for name in ("before_us", "after_us")
        )
        calls, timed = sum(len(row.layers) for row in self.rows), sum(len(row.layers) for row in measured)
        if not measured:
            return f"{calls} calls, none of which has been timed"
        by = " and ".join(dict.fromkeys(row.before for row in measured))
        spared = f"{format_duration(before)} by {by}, {format_duration(after)} by what serves ({before / after:.2f}x)"
        return f"{timed} of {calls} calls were timed by their tunings: {spared}"


def report(model: torch.nn.Module, *inputs: Any, **named_inputs: Any) -> Report:
    """Run a model once, with fastattn in the place of F.scaled_dot_product_attention, and say what serves each attention call.

    Calls of fastattn.attention are seen as well, those inside a compiled graph are not. Problems that are new are tuned, as in
    any first call, where the mode allows it. Times are those of the tunings, with the backward where gradients are wanted.
    Raises what the model raises, and TypeError where it is no torch.nn.Module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"fastattn.report: expected a torch.nn.Module and its inputs, got {type(model).__name__}")
    path: list[str] = []
    found: dict[tuple[str, ...], list[tuple[str, Row]]] = {}

    def note(resolved: Resolved, at: str, given: Any) -> None:
        if resolved.candidate:  # else it was rewritten as another call, which comes by itself
            row = _row_of(resolved, given)
            found.setdefault((re.sub(r"\d+", "*", at), row.problem, row.served_by, row.why), []).append((at, row))

    with ExitStack() as stack:
        stack.enter_context(_observed(path, note))
        for name, module in model.named_modules():
            stack.enter_context(_entered(module, name or type(model).__name__, path))
        stack.enter_context(patch())
        counted = Counter(session.counts.passed_on)
        model(*inputs, **named_inputs)
        counted = session.counts.passed_on - counted
    rows = [replace(calls[0][1], layers=tuple(at for at, _ in calls)) for calls in found.values()]
    for why, calls in counted.items():  # an integration answers some itself, by the model's own attention
        unseen = calls - sum(len(row.layers) for row in rows if row.why == f"passed on: {why}")
        rows += [Row(("?",) * unseen, "", "the model", f"passed on: {why}")] if unseen > 0 else []
    return Report(tuple(rows))


@contextmanager
def _observed(path: list[str], note: Callable[[Resolved, str, Any], None]) -> Generator[None]:
    """Every call is a miss in here, and is noted."""
    doors = (attention.entries, sdpa.entries)
    before = [door.resolve for door in doors]

    def seen(resolve: Callable[..., Resolved], *given: Any) -> Resolved:
        resolved = resolve(*given)
        note(resolved, path[-1] if path else "", given)
        return resolved._replace(remember=False)

    entries.drop_all()
    try:
        for door, resolve in zip(doors, before, strict=True):
            door.resolve = partial(seen, resolve)
        yield
    finally:
        for door, resolve in zip(doors, before, strict=True):
            door.resolve = resolve


@contextmanager
def _entered(module: torch.nn.Module, name: str, path: list[str]) -> Generator[None]:
    """The module's name is the last of the path while it runs."""
    enter = module.register_forward_pre_hook(lambda *_: path.append(name))
    leave = module.register_forward_hook(lambda *_: path.pop() and None, always_call=True)
    try:
        yield
    finally:
        enter.remove()
        leave.remove()


def _row_of(resolved: Resolved, given: tuple[Any, ...]) -> Row:
    q, k, v, mask, layout, options = given
    if resolved.passed_on:
        return Row((), _in_brief(q, k), "F.sdpa", f"passed on: {resolved.passed_on}")
    if layout == "sdpa":
        dropout_p, is_causal, scale, enable_gqa = options
        layout, options = "bhsd", {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
        seen = four_dims.as_four_dims(q, k, v, mask, enable_gqa)
        q, k, v, mask = seen.views(q, k, v, mask) if isinstance(seen, four_dims.FourDims) else (q, k, v, mask)
    explained: Explanation = explain(q, k, v, mask, layout, **options)
    incumbent, before, after = "", None, None
    if explained.verdict is not None:
        incumbent = explained.verdict.incumbent
        timed = (explained.verdict.trial(name) for name in (incumbent, resolved.candidate))
        before, after = (trial.time_us if trial is not None else None for trial in timed)
    words = f"{briefly(explained.problem)} {explained.problem.dtype}"
    why = "; ".join(filter(None, (explained.why, explained.mask)))
    return Row((), words, resolved.candidate, why, "F.sdpa" if incumbent == "default" else incumbent, before, after)


def _in_brief(q: Any, k: Any) -> str:
    return " on ".join("x".join(map(str, x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in (q, k))


def _cells(row: Row) -> tuple[str, ...]:
    time = format_duration(row.after_us) if row.after_us else ""
    gain = f"{row.gain:.2f}x" if row.gain else ""
    return _named(row.layers), str(len(row.layers)), row.problem, row.served_by, gain, time, row.why


def _named(layers: tuple[str, ...]) -> str:
    """One name for all: where they differ in one number, its range."""
    parts = [re.split(r"(\d+)", layer) for layer in dict.fromkeys(layers)]
    varying = [i for i in range(len(parts[0])) if len({part[i] for part in parts}) > 1]
    if len(varying) != 1:
        return layers[0] if not varying else re.sub(r"\d+", "*", layers[0])
    numbers = _ranges([int(part[varying[0]]) for part in parts])
    return "".join([*parts[0][: varying[0]], f"[{numbers}]", *parts[0][varying[0] + 1 :]])


def _ranges(numbers: list[int]) -> str:
    """As people write them: 0-4,6-10."""
    starts = [n for i, n in enumerate(numbers) if i == 0 or n != numbers[i - 1] + 1]
    ends = [n for i, n in enumerate(numbers) if i + 1 == len(numbers) or n + 1 != numbers[i + 1]]
    return ",".join(f"{first}-{last}" if first < last else f"{first}" for first, last in zip(starts, ends, strict=True))
