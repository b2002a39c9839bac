"""What a hit of fastattn costs: nanoseconds on top of the call that it leads to.

    python benchmarks/overhead.py [--json FILE] [--smoke]

Every row is one interleaved measurement: the base, the base again (the A/A spread), and fastattn's way to the same work.
"null op" rows lead to a closure that returns q, so that nothing but the way is measured; the others run the tiny problem
(1, 4, 16, 32) in float32 on one thread. Exit code 1 when an aim of the design is missed (with --smoke: only when absurd).
docs/benchmarks.md says how to read the table.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from rounds import environment, interleave, is_busy
from torch import Tensor

import fastattn
from fastattn.dispatch import patching, resolve
from fastattn.dispatch.attention import front
from fastattn.problems.length_buckets import bucket_bounds

TINY = (1, 4, 16, 32)
LAYERS = 32  # of the decode loop
IMPORT_RUNS = 7


@dataclass(frozen=True)
class Row:
    """One comparison. base and hit are medians of one call; over = hit - base; spread is base against itself."""

    name: str
    unit: str
    base: float
    hit: float
    over: float
    spread: float
    aim: float | None = None
    absurd: float | None = None  # beyond this even a smoke run fails
    note: str = ""

    @property
    def is_met(self) -> bool:
        return self.aim is None or self.over < self.aim


# --- the ways to the same work


def null(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    """Stands for a kernel: no work at all."""
    return q


def lead_to(call: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Any = None, **options: Any) -> None:
    """Publish an entry of attention() for these arguments that leads to `call`, with what a miss would have it compare."""
    real = resolve.attention(q, k, v, mask, "bhsd", options)
    front.publish(real._replace(call=call), q, k, v, mask, "bhsd", options)
    if fastattn.attention(q, k, v, mask, **options) is not q and call is null:
        raise SystemExit("the entry is not hit: this benchmark no longer fits fastattn.api")


def tensors(*shape: int, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(shape or TINY, requires_grad=grad) for _ in range(3))
    return q, k, v


def many(count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Problems that differ in heads and lengths, all of them tiny."""
    return [tensors(1, 1 + i % 8, 16 + i // 8, 32) for i in range(count)]


class Bench:
    """Runs comparisons and keeps their rows."""

    def __init__(self, rounds: int, seconds: float) -> None:
        self.rounds, self.seconds = rounds, seconds
        self.rows: list[Row] = []

    def compare(
        self,
        name: str,
        base: Callable[[], object],
        hit: Callable[[], object],
        *,
        runs: int = 1,
        aim: float | None = None,
        absurd: float | None = None,
        note: str = "",
    ) -> None:
        """A row in ns a call; `runs` is how many calls one base() or hit() makes."""
        found = interleave(
            {"base": base, "hit": hit, "again": base}, rounds=self.rounds, seconds=self.seconds, sample_s=2e-3
        )
        ns = {arm: median(samples) / runs * 1e9 for arm, samples in found.items()}
        over = median((h - b) / runs * 1e9 for h, b in zip(found["hit"], found["base"], strict=True))
        self.rows.append(Row(name, "ns", ns["base"], ns["hit"], over, abs(ns["again"] - ns["base"]), aim, absurd, note))

    def alternate(
        self, name: str, base: Callable[..., object], problems: Sequence[tuple[Tensor, Tensor, Tensor]], **how: Any
    ) -> None:
        """The same over several problems in turn."""

        def over_all(call: Callable[..., object]) -> Callable[[], None]:
            def run() -> None:
                for q, k, v in problems:
                    call(q, k, v, None)

            return run

        self.compare(name, over_all(base), over_all(fastattn.attention), runs=len(problems), **how)


def null_rows(bench: Bench) -> None:
    """The way alone."""
    attention = fastattn.attention
    q, k, v = tensors()

    def fresh(*args: Any, **options: Any) -> None:
        front.clear()
        lead_to(null, *args, **options)

    fresh(q, k, v)
    base = lambda: null(q, k, v, None)  # noqa: E731
    bench.compare("null op: 1 problem", base, lambda: attention(q, k, v), aim=900, absurd=20_000)
    for count, aim in ((4, 1200), (64, 1200)):
        front.clear()
        problems = many(count)
        for problem in problems:
            lead_to(null, *problem)
        bench.alternate(f"null op: {count} problems in turn", null, problems, aim=aim, absurd=20_000)
    mask = torch.randn(16, 16)
    fresh(q, k, v, mask)
    bench.compare("null op: with a mask", base, lambda: attention(q, k, v, mask))
    fresh(q, k, v, is_causal=True)
    bench.compare("null op: is_causal=True", base, lambda: attention(q, k, v, is_causal=True))
    fresh(q, k, v, is_causal=True, scale=0.5)
    bench.compare("null op: is_causal=True, scale=0.5", base, lambda: attention(q, k, v, is_causal=True, scale=0.5))
    fresh(q, q, q)
    bench.compare("null op: attention(x, x, x)", base, lambda: attention(q, q, q))
    qg, kg, vg = tensors(grad=True)
    fresh(qg, kg, vg)
    bench.compare("null op: inputs require grad", base, lambda: attention(qg, kg, vg))

    options = (0.0, False, None, False)
    patching._front.clear()
    real = resolve.drop_in(q, k, v, None, *options)
    patching._front.publish(real._replace(call=null), q, k, v, None, "sdpa", options)
    sdpa = fastattn.sdpa
    if sdpa(q, k, v) is not q:
        raise SystemExit("the entry is not hit: this benchmark no longer fits fastattn.patching")
    bench.compare("null op: sdpa(), the drop-in", base, lambda: sdpa(q, k, v))
    patching._front.clear()
    front.clear()


def op_rows(bench: Bench) -> None:
    """The same with the tiny problem really computed. Nothing is tuned: F.sdpa itself serves, bound as it is."""
    attention, f_sdpa = fastattn.attention, F.scaled_dot_product_attention
    q, k, v = tensors()
    plain = lambda: f_sdpa(q, k, v)  # noqa: E731
    front.clear()
    attention(q, k, v)
    bench.compare("F.sdpa -> attention(), 1 problem", plain, lambda: attention(q, k, v))
    handle = fastattn.plan(q, k, v)
    bench.compare("F.sdpa -> plan() handle", plain, lambda: handle(q, k, v), note=handle.candidate)
    attention(q, k, v, is_causal=True)
    bench.compare(
        "F.sdpa -> attention(), is_causal=True",
        lambda: f_sdpa(q, k, v, is_causal=True),
        lambda: attention(q, k, v, is_causal=True),
    )
    fastattn.sdpa(q, k, v)
    bench.compare("F.sdpa -> sdpa(), the drop-in", plain, lambda: fastattn.sdpa(q, k, v))
    front.clear()
    problems = many(64)
    for problem in problems:
        attention(*problem)
    bench.alternate("F.sdpa -> attention(), 64 in turn", f_sdpa, problems)

    flash = getattr(torch, "_scaled_dot_product_flash_attention_for_cpu", None)
    if flash is not None:
        pinned = fastattn.plan(q, k, v, kernel="torch_flash")
        front.clear()
        served = resolve.attention(q, k, v, None, "bhsd", {"kernel": "torch_flash"})
        front.publish(served, q, k, v, None, "bhsd", {})
        bare = lambda: flash(q, k, v)[0]  # noqa: E731
        bench.compare("bare flash op -> F.sdpa", bare, plain, note="what torch itself adds")
        bench.compare("bare flash op -> attention()", bare, lambda: attention(q, k, v), note="torch_flash served")
        bench.compare("bare flash op -> plan() handle", bare, lambda: pinned(q, k, v), note="torch_flash")
    front.clear()


# --- decode


def decode_row(bench: Bench, tokens: int, start: int) -> None:
    """kv_len grows by one a token, 32 layers with a cache each; attention() against the handle of the same kernel."""
    heads, kv_heads, dim, room = 32, 8, 128, start + tokens + 8
    caches = [torch.randn(2, 1, kv_heads, room, dim, dtype=torch.bfloat16) for _ in range(LAYERS)]
    q = torch.randn(1, heads, 1, dim, dtype=torch.bfloat16)

    def loop(call: Callable[..., object]) -> Callable[[], None]:
        def run() -> None:
            for n in range(start, start + tokens):
                for cache in caches:
                    call(q, cache[0, :, :, :n], cache[1, :, :, :n])

        return run

    k, v = caches[0][0, :, :, :start], caches[0][1, :, :, :start]
    fastattn.attention(q, k, v)  # tunes
    handle = fastattn.plan(q, k, v, kernel=fastattn.plan(q, k, v).candidate)  # pinned: no fallback chain behind it
    edges = len({bucket_bounds(n) for n in range(start, start + tokens)}) - 1
    loop(fastattn.attention)()  # meets, and tunes, the next bucket
    calls = {"base": loop(handle), "hit": loop(fastattn.attention), "again": loop(handle)}
    found = interleave(calls, rounds=max(5, bench.rounds // 4), seconds=4 * bench.seconds, min_rounds=3)
    base, hit = median(found["base"]), median(found["hit"])
    ratio = median(h / b for h, b in zip(found["hit"], found["base"], strict=True)) - 1
    calls_made = tokens * LAYERS
    again = abs(median(found["again"]) / base - 1) * 100
    note = f"{handle.candidate}, 1x32/8 d128 bfloat16, kv_len {start}+, {edges} bucket edge{'s' * (edges != 1)}"
    name = f"decode, kv_len + 1 a token, {LAYERS} layers"
    us = 1e6 / calls_made
    bench.rows.append(Row(name, "%", base * us, hit * us, ratio * 100, again, aim=5.0, absurd=100.0, note=note))


def null_decode_row(bench: Bench) -> None:
    """The way alone for a growing kv_len: one entry serves a whole bucket."""
    q = torch.randn(1, 4, 1, 32)
    low, high = bucket_bounds(100)
    cache = torch.randn(2, 1, 4, high, 32)
    views = [(q, cache[0, :, :, :n], cache[1, :, :, :n]) for n in range(low, high + 1)]
    front.clear()
    lead_to(null, *views[0])
    bench.alternate("null op: decode, kv_len + 1 a call", null, views, aim=1200, absurd=20_000)
    front.clear()


# --- import


def import_row(runs: int) -> Row:
    """`import fastattn` after `import torch`, each time in a new process."""
    code = (
        "import sys, time, torch\nstart = time.perf_counter()\nimport fastattn\n"
        "print((time.perf_counter() - start) * 1e3)\n"
        "print(*[m for m in ('flash_attn', 'xformers', 'sageattention', 'flashinfer', 'transformer_engine', 'triton')"
        " if m in sys.modules])\n"
    )
    took, loaded = [], set()
    for _ in range(runs):
        lines = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split(
            "\n"
        )
        took.append(float(lines[0]))
        loaded |= set(lines[1].split())
    spread = median(abs(t - median(took)) for t in took)
    note = f"imports {', '.join(sorted(loaded))}" if loaded else "no kernel library imported"
    over = math.inf if loaded else median(took)
    return Row(
        "import fastattn beyond torch", "ms", 0.0, median(took), over, spread, aim=30.0, absurd=1000.0, note=note
    )


# --- output


def table(rows: Sequence[Row]) -> Table:
    found = Table(
        title="what a hit costs; base and hit are one call", title_justify="left", box=None, padding=(0, 1, 0, 0)
    )
    found.add_column("", no_wrap=True)
    for heading in ("base", "hit", "over", "A/A", "aim"):
        found.add_column(heading, justify="right", no_wrap=True)
    found.add_column("", no_wrap=True)
    found.add_column("", overflow="fold")
    for row in rows:
        digits = 0 if row.unit == "ns" else 1
        plain = {"%": "us"}.get(row.unit, row.unit)
        met = "" if row.aim is None else "[green]met[/]" if row.is_met else "[red]missed[/]"
        found.add_row(
            row.name,
            f"{row.base:,.{digits}f} {plain}" if row.base else "",
            f"{row.hit:,.{digits}f} {plain}",
            f"{row.over:+,.{digits}f} {row.unit}",
            f"{row.spread:,.{digits}f} {row.unit}",
            f"< {row.aim:,.0f}" if row.aim is not None else "",
            met,
            row.note,
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write all numbers to FILE")
    parser.add_argument("--smoke", action="store_true", help="few rounds, exit 0 unless absurd")
    parser.add_argument("--rounds", type=int, help="interleaved rounds a row (default 41, with --smoke 5)")
    args = parser.parse_args()
    rounds = args.rounds or (5 if args.smoke else 41)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    if is_busy():
        console.print("something else keeps this machine busy: the numbers below say little", style="yellow")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    bench = Bench(rounds, seconds=0.3 if args.smoke else 2.0)
    busy = torch.randn(256, 256)
    interleave({"busy": lambda: busy @ busy}, rounds=20, seconds=0.5, sample_s=25e-3)  # the clock rate settles
    with tempfile.TemporaryDirectory() as directory:
        fastattn.options(cache_dir=directory, mode="cached")  # an empty store: nothing is tuned, F.sdpa serves
        null_rows(bench)
        null_decode_row(bench)
        op_rows(bench)
        fastattn.options(mode="auto", tune_budget=600.0)
        decode_row(bench, tokens=8 if args.smoke else 32, start=508 if args.smoke else 496)
    bench.rows.append(import_row(3 if args.smoke else IMPORT_RUNS))
    facts = environment()
    console.print(table(bench.rows))
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), style="dim")
    missed = [row.name for row in bench.rows if not row.is_met]
    absurd = [row.name for row in bench.rows if row.absurd is not None and row.over - row.spread > row.absurd]
    if missed:
        console.print(f"aims missed: {', '.join(missed)}" + (" (a smoke run decides nothing)" if args.smoke else ""))
    if args.json:
        data = {
            "environment": facts,
            "smoke": args.smoke,
            "rows": [asdict(row) | {"is_met": row.is_met} for row in bench.rows],
        }
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
    return 1 if absurd or (missed and not args.smoke) else 0


if __name__ == "__main__":
    sys.exit(main())
