"""torch.compile with fastattn: what compiling costs, cold and from torch's caches, and what compiled code is worth.

    python benchmarks/compiled.py [--dtype bfloat16] [--seconds 5] [--repeats 3] [--smoke] [--results docs/results]

Start-up: a new process compiles the first model and runs it once, with empty caches of Inductor (cold), then with those it
left (warm): stock, stock again (A/A), stock with fastattn imported, patched, by attention(). The ways take turns. Run time:
the same model compiled in one process, stock, stock again (A/A), by sdpa(), by attention() and with the stored winner ordered
by name, alternate in each round; times are medians. Everything is tuned before, in eager code; "tuned compiled" is attention()
again, after `fastattn.tune(model, x, compiled=True)`. Training: a window, forward and backward, in eager code and by
fastattn::attend.
Exit code 1 where an answer is wrong.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from types import FunctionType

import torch
import torch.nn.functional as F
from machine import add_results, environment, in_one_line, keep, open_console
from report import plain_table
from rich.table import Table
from rounds import interleave, spread

STOCK, AGAIN, IMPORTED, PATCHED, OURS = "stock", "stock again", "stock, fastattn imported", "patched", "attention()"
IN_REGIME = "tuned compiled"
WAYS = (STOCK, AGAIN, IMPORTED, PATCHED, OURS)


@dataclass(frozen=True)
class Result:
    """Medians, in seconds of a start and in ms of a run. error: the largest difference from stock's answer."""

    name: str
    dtype: str
    times: dict[str, float]
    spread: float = 0.0
    error: float = 0.0
    winners: tuple[str, ...] = ()  # in eager code, and in compiled code


@dataclass(frozen=True)
class Case:
    """A model of some layers of attention with GQA, causal."""

    name: str
    batch: int
    length: int
    heads: tuple[int, int]
    head_dim: int
    layers: int


CASES = (
    Case("4 layers, 1 x 16/4 x 512 d64", 1, 512, (16, 4), 64, 4),
    Case("2 layers, 4 x 12 x 196 d64", 4, 196, (12, 12), 64, 2),
)
SMOKE = (Case("1 layer, 1 x 4/2 x 64 d32", 1, 64, (4, 2), 32, 1),)


class Model(torch.nn.Module):
    """Projections around attention, heads side by side as models have them."""

    def __init__(self, case: Case, attend: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = case.heads[0] * case.head_dim
        wide = (case.heads[0] + 2 * case.heads[1]) * case.head_dim
        self.case, self.attend = case, attend
        self.projections = torch.nn.ModuleList(torch.nn.Linear(width, wide) for _ in range(case.layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads, kv_heads = self.case.heads
        for project in self.projections:
            parts = project(x).unflatten(-1, (heads + 2 * kv_heads, self.case.head_dim)).transpose(1, 2)
            q, k, v = parts.split([heads, kv_heads, kv_heads], 1)
            x = x + self.attend(q, k, v).transpose(1, 2).flatten(-2)
        return x


def stock(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def drop_in(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What a patched model calls: a patch itself would have to be on in its rounds, and off in the others."""
    import fastattn

    return fastattn.sdpa(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def by_attention(kernel: str | None = None) -> Callable[..., torch.Tensor]:
    import fastattn

    return lambda q, k, v: fastattn.attention(q, k, v, is_causal=True, kernel=kernel)


def _of_its_own() -> type[Model]:
    """Model with a code object of its own, as graphs of several ways to attend would stand behind each other's guards."""
    forward = FunctionType(Model.forward.__code__.replace(), globals())
    return type("Model", (Model,), {"forward": forward})


def build(case: Case, dtype: torch.dtype, attend: Callable[..., torch.Tensor]) -> tuple[Model, torch.Tensor]:
    model = _of_its_own()(case, attend).to(dtype).eval()
    g = torch.Generator().manual_seed(1)
    return model, torch.randn(case.batch, case.length, case.heads[0] * case.head_dim, generator=g).to(dtype)


def compiled(model: Model) -> Callable[..., torch.Tensor]:
    """At its own lengths: Dynamo takes those of a second model with the same source for symbols."""
    return torch.compile(model, fullgraph=True, dynamic=False)


# --- start-up


def child(name: str, case: Case, dtype: torch.dtype) -> None:
    """Print the seconds that the first compiled call takes in this process, one way."""
    attend = stock
    if name not in (STOCK, AGAIN):
        import fastattn

        if name == PATCHED:
            fastattn.patch()
        elif name == OURS:
            attend = by_attention()
    model, x = build(case, dtype, attend)
    with torch.no_grad():
        torch.compile(torch.nn.Linear(2, 2))(torch.ones(1, 2))  # torch's own compiler is imported and warm
        start = time.perf_counter()
        torch.compile(model, fullgraph=True)(x)
        print(time.perf_counter() - start)


def start_up(case: Case, dtype: torch.dtype, repeats: int, store: str, numbers: tuple[int, str]) -> list[Result]:
    found: dict[str, dict[str, list[float]]] = {when: {name: [] for name in WAYS} for when in ("cold", "warm")}
    for _ in range(repeats):
        for name in WAYS:
            with tempfile.TemporaryDirectory() as caches:
                for when in ("cold", "warm"):
                    ran = subprocess.run(
                        [sys.executable, __file__, "--child", name, str(numbers[0]), numbers[1], str(dtype)[6:]],
                        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": caches, "FASTATTN_CACHE_DIR": store,
                             "FASTATTN_MODE": "cached", "FASTATTN_LOG": "error"},
                        capture_output=True, text=True, check=True,
                    )  # fmt: skip
                    found[when][name].append(float(ran.stdout.split()[-1]))
    return [
        Result(
            f"{case.name}, {when}", str(dtype)[6:], {name: median(times) for name, times in of.items()},
            spread=spread(of, STOCK, AGAIN),
        )
        for when, of in found.items()
    ]  # fmt: skip


# --- run time


def run_time(case: Case, dtype: torch.dtype, seconds: float) -> Result:
    """ms of the compiled model; what attention() needs is tuned by an eager run before."""
    import fastattn

    model, x = build(case, dtype, by_attention())
    runs: dict[str, Callable[[], torch.Tensor]] = {}
    with torch.no_grad():
        model(x)
        with fastattn.options.scope(mode="cached"):
            parts = model.projections[0](x).unflatten(-1, (-1, case.head_dim)).transpose(1, 2)
            heads, kv_heads = case.heads
            winner = fastattn.explain(*parts.split([heads, kv_heads, kv_heads], 1), is_causal=True).served_by
            attends = {STOCK: stock, AGAIN: stock, PATCHED: drop_in, OURS: by_attention()}
            attends[f"pinned {winner}"] = stock if winner == "default" else by_attention(winner)
            answers = {}
            for name, attend in attends.items():
                runs[name] = partial(compiled(build(case, dtype, attend)[0]), x)
                answers[name] = runs[name]()
            in_regime = fastattn.tune(model, x, compiled=True)[0].winner
            runs[IN_REGIME] = partial(compiled(build(case, dtype, by_attention())[0]), x)
            answers[IN_REGIME] = runs[IN_REGIME]()
        found = interleave(runs, rounds=15, seconds=seconds)
    error = max(float((out - answers[STOCK]).abs().max()) for out in answers.values())
    ms = {name: 1e3 * median(samples) for name, samples in found.items()}
    return Result(case.name, str(dtype)[6:], ms, spread(found, STOCK, AGAIN), error, (winner, in_regime))


# --- training through the operator


def training(length: int, dtype: torch.dtype, seconds: float) -> Result:
    """ms of a forward and backward in a window: in eager code, and by fastattn::attend, which makes the forward twice."""
    import fastattn

    window = fastattn.masks.Causal() & fastattn.masks.Window(length // 8 - 1, 0)
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, h, length, 64, generator=g).to(dtype).requires_grad_() for h in (8, 2, 2))

    def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return fastattn.attention(q, k, v, window)

    def trained(call: Callable[..., torch.Tensor]) -> torch.Tensor:
        out = call(q, k, v)
        return torch.cat([out.detach(), torch.autograd.grad(out.sum(), q)[0]])

    with torch.no_grad():
        eager(q, k, v)
    operator = torch.compile(eager, fullgraph=True)
    runs = {"eager": partial(trained, eager), "fastattn::attend": partial(trained, operator)}
    answers = [run().float() for run in runs.values()]
    found = interleave({**runs, "eager again": partial(trained, eager)}, rounds=15, seconds=seconds)
    ms = {name: 1e3 * median(found[name]) for name in runs}
    name = f"forward + backward, 1 x 8/2 x {length} d64, window {length // 8}"
    return Result(
        name, str(dtype)[6:], ms, spread(found, "eager", "eager again"), float((answers[0] - answers[1]).abs().max())
    )


def table(title: str, unit: str, results: list[Result], base: str = STOCK) -> Table:
    shown = plain_table(title)
    names = list(dict.fromkeys("pinned winner" if n.startswith("pinned") else n for r in results for n in r.times))
    headings = [f"{n}{part}" for n in names for part in ([f" {unit}"] if n == base else [f" {unit}", ""])]
    for heading in (
        "",
        "dtype",
        *headings,
    ):
        shown.add_column(heading, justify="left" if not heading else "right", overflow="fold")
    for r in results:
        times = {"pinned winner" if n.startswith("pinned") else n: t for n, t in r.times.items()}
        cells = [r.name, r.dtype]
        for name in names:
            cells += (
                [f"{times[name]:.2f}"] if name == base else [f"{times[name]:.2f}", f"{times[base] / times[name]:.2f}x"]
            )
        shown.add_row(*cells)
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each model's rounds")
    parser.add_argument("--repeats", type=int, default=3, help="new processes of each way, cold and warm")
    parser.add_argument("--smoke", action="store_true", help="one small model, one process of each way")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    add_results(parser, "compiled.txt and compiled.json")
    args = parser.parse_args()
    if args.child:
        name, number, which, dtype = args.child
        child(name, (SMOKE if which == "smoke" else CASES)[int(number)], getattr(torch, dtype))
        return 0
    import fastattn

    console, facts = open_console(150), environment()
    console.print(in_one_line(facts))
    starts, runs, trainings = [], [], []
    dtypes = args.dtype or (["float32"] if args.smoke else ["float32", "bfloat16"])
    with tempfile.TemporaryDirectory() as store:
        fastattn.options(cache_dir=store, tune_budget=1e6)
        for dtype in (getattr(torch, name) for name in dtypes):
            trainings.append(training(256 if args.smoke else 2048, dtype, 0.3 if args.smoke else args.seconds))
            for number, case in enumerate(SMOKE if args.smoke else CASES):
                print(f"{case.name}, {dtype} ...", file=sys.stderr)
                runs.append(run_time(case, dtype, 0.3 if args.smoke else args.seconds))
                if not starts:  # a start is much the same whatever is compiled
                    which = "smoke" if args.smoke else "all"
                    starts = start_up(case, dtype, 1 if args.smoke else args.repeats, store, (number, which))
    console.print(table("compiled models: times over stock", "ms", runs))
    for r in runs:
        console.print(
            f"{r.name}, {r.dtype}: A/A {100 * r.spread:.0f}%, winner {r.winners[0]}, in compiled code {r.winners[1]}"
        )
    console.print(table("training through the operator: times over eager code", "ms", trainings, "eager"))
    console.print(table("the first compiled call of a process: times over stock", "s", starts))
    for r in starts:
        console.print(f"{r.name}: A/A {100 * r.spread:.0f}%")
    keep(args, facts, "compiled", console, [*runs, *trainings, *starts])
    wrong = [r for r in [*runs, *trainings] if r.error > (1e-3 if r.dtype == "float32" else 1e-1)]
    for r in wrong:
        console.print(f"wrong: {r.name}, {r.dtype}: a difference of {r.error:.2g}", style="red")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main())
