"""What the structure of a mask is worth: F.sdpa with the dense mask against attention(), told the mask and given it dense.

    python benchmarks/masks.py [--only REGEX] [--dtype bfloat16] [--grad] [--flex] [--lengths] [--smoke]
        [--results docs/results]

F.sdpa, F.sdpa again (A/A), attention(q, k, v, masks....) and attention(q, k, v, dense) alternate within each round; times are
medians. Every problem starts from an empty store; the dense mask is made before. --flex adds flex_attention, compiled.
--lengths measures how time and memory grow with the length of a window. Exit code 1 where an answer is wrong.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from math import log
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from machine import add_results, environment, in_one_line, keep, open_console
from report import plain_table
from rich.table import Table
from rounds import interleave, peak_bytes, spread

import fastattn
from fastattn import masks

SDPA, AGAIN, TOLD, FOUND, FLEX = "F.sdpa", "F.sdpa again", "told", "found", "flex"
LEFT = masks.Causal() & masks.Padding([1024, 512, 256, 256], "left")
HALF = masks.Padding([64 + 25 * i for i in range(16)])
NO_STRUCTURE = {"random": 0.75, "all True": 1.0}


@dataclass(frozen=True)
class Case:
    """A mask and a problem: batch x heads x tokens x head_dim."""

    name: str
    mask: masks.Mask | None
    batch: int
    heads: int
    tokens: int
    head_dim: int = 64
    one_head_differs: bool = False  # each head has a mask of its own
    told: bool = True
    found: bool = True


CASES = (
    Case("Window(256, 256), 4,096", masks.Window(256, 256), 1, 8, 4096),
    Case("Window(256, 256), 16,384", masks.Window(256, 256), 1, 4, 16_384, found=False),
    Case("window 512, causal, 4,096", masks.Causal() & masks.Window(511, 0), 1, 8, 4096),
    Case("chunks of 1,024, causal, 4,096", masks.Causal() & masks.Chunked(1024), 1, 8, 4096),
    Case("documents of 512 in 8,192", masks.Document(512), 1, 4, 8192),
    Case("causal, 4,096", masks.Causal(), 1, 8, 4096),
    Case("left padding to half, causal, 4 x 8 x 1,024", LEFT, 4, 8, 1024),
    Case("every 4th key, 4,096", masks.Dilated(4), 1, 8, 4096, found=False),
    Case("56 x 56 grid, radius 4", masks.Neighborhood((56, 56), 4), 1, 8, 3136),
    Case("padded to half, 16 x 12 x 512", HALF, 16, 12, 512),
    Case("window 128 and 16 global tokens, 4,096", masks.Window(128, 128) | masks.Global(16), 1, 8, 4096),
    Case("prefix 1,024, causal, 4,096", masks.Causal() | masks.Prefix(1024), 1, 8, 4096),
    Case("random", None, 1, 8, 4096, told=False),
    Case("all True", None, 1, 8, 4096, told=False),
    Case("a window, each head its own mask", masks.Window(256, 256), 1, 8, 2048, told=False, one_head_differs=True),
)


@dataclass(frozen=True)
class Result:
    """Medians in ms; error: the largest difference from F.sdpa in float64, of some rows."""

    name: str
    dtype: str
    grad: bool
    ms: dict[str, float]
    spread: float
    served: dict[str, str]
    error: float

    def factor(self, which: str) -> float | None:
        return self.ms[SDPA] / self.ms[which] if which in self.ms else None


def dense_of(case: Case) -> torch.Tensor:
    n = case.tokens
    if case.mask is not None:
        dense = case.mask.dense(case.batch, n, n)
        return dense.repeat(1, case.heads, 1, 1) if case.one_head_differs else dense.clone()
    return torch.rand(1, 1, n, n, generator=torch.Generator().manual_seed(0)) < NO_STRUCTURE[case.name]


def measure(case: Case, dtype: torch.dtype, grad: bool, seconds: float, with_flex: bool) -> Result:
    shape = (case.batch, case.heads, case.tokens, case.head_dim)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=g).to(dtype).requires_grad_(grad) for _ in range(3))
    dense, up = dense_of(case), torch.ones(shape, dtype=dtype)

    def run(call: Callable[[], torch.Tensor]) -> Callable[[], object]:
        return (lambda: torch.autograd.grad(call(), (q, k, v), up)) if grad else call

    calls = {SDPA: lambda: F.scaled_dot_product_attention(q, k, v, dense)}
    given: dict[str, Any] = {}
    if case.told:
        given[TOLD] = case.mask
    if case.found:
        given[FOUND] = dense
    with tempfile.TemporaryDirectory() as directory:
        fastattn.options(cache_dir=directory)
        fastattn.clear()
        for name, mask in given.items():
            fastattn.explain(q, k, v, mask, tune=True)
            calls[name] = lambda mask=mask: fastattn.attention(q, k, v, mask)
        served = {name: fastattn.explain(q, k, v, mask).served_by for name, mask in given.items()}
        if with_flex and case.mask is not None and not grad:
            calls[FLEX] = _flex(case, q, k, v)
        runs = {name: run(call) for name, call in {**calls, AGAIN: calls[SDPA]}.items()}
        found = interleave(runs, rounds=15, seconds=seconds)
        error = max((_error(q, k, v, dense, calls[name]()) for name in given), default=0.0)
    ms = {name: 1e3 * median(samples) for name, samples in found.items()}
    return Result(case.name, str(dtype)[6:], grad, ms, spread(found, SDPA, AGAIN), served, error)


def _error(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dense: torch.Tensor, out: torch.Tensor) -> float:
    """The largest error of 64 rows of the last head, against float64."""
    rows = torch.linspace(0, q.shape[2] - 1, 64).long()
    q, k, v, out = (x.detach()[-1:, -1:].double() for x in (q, k, v, out))
    seen = dense[-1:, -1:].expand(1, 1, q.shape[2], k.shape[2])[:, :, rows]
    want = F.scaled_dot_product_attention(q[:, :, rows], k, v, seen)
    return float((out[:, :, rows] - want).abs().max())


def _flex(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], torch.Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    dense = dense_of(case)[:, 0]
    per_batch = dense.shape[0] > 1
    block = create_block_mask(
        lambda b, h, i, j: dense[b if per_batch else 0, i, j], case.batch if per_batch else None, None, case.tokens,
        case.tokens, device="cpu",
    )  # fmt: skip
    compiled = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, block_mask=block)


def table(results: list[Result]) -> Table:
    shown = plain_table("times over F.sdpa with the dense mask")
    names = [name for name in (TOLD, FOUND, FLEX) if any(name in r.ms for r in results)]
    shown.add_column("")
    for heading in ("dtype", "F.sdpa", *(f"{name} {part}" for name in names for part in ("ms", "")), "A/A"):
        shown.add_column(heading.strip(), justify="right")
    shown.add_column("served by")
    for r in results:
        cells = [r.name + (", fwd+bwd" if r.grad else ""), r.dtype, f"{r.ms[SDPA]:.1f} ms"]
        for name in names:
            factor = r.factor(name)
            cells += [f"{r.ms[name]:.1f}", f"{factor:.2f}x"] if factor else ["", ""]
        shown.add_row(*cells, f"{100 * r.spread:.0f}%", "; ".join(dict.fromkeys(r.served.values())))
    return shown


def growth(dtype: torch.dtype, lengths: list[int]) -> tuple[Table, float]:
    """Time and peak memory of Window(256, 256) over the length, and the slope on a log-log plot."""
    shown = plain_table(f"Window(256, 256), 1 x 4 x tokens x 64, {dtype}")
    for heading in ("tokens", "ms", "peak bytes over q, k, v and out"):
        shown.add_column(heading, justify="right")
    mask, times = masks.Window(256, 256), []
    for n in lengths:
        q, k, v = (torch.randn(1, 4, n, 64).to(dtype) for _ in range(3))
        fastattn.explain(q, k, v, mask, tune=True)
        run = lambda: fastattn.attention(q, k, v, mask)  # noqa: B023, E731
        times.append(median(interleave({"ours": run}, rounds=7, seconds=5)["ours"]))
        shown.add_row(f"{n:,}", f"{1e3 * times[-1]:.1f}", f"{1 + peak_bytes(run) / (4 * q.nbytes):.2f}x")
    x, y = [log(n) for n in lengths], [log(t) for t in times]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    return shown, slope


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name it finds")
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--grad", action="store_true", help="forward and backward")
    parser.add_argument("--flex", action="store_true", help="flex_attention, compiled, as well")
    parser.add_argument("--lengths", action="store_true", help="how time and memory grow with the length")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each problem's rounds")
    parser.add_argument("--smoke", action="store_true", help="a few small problems")
    add_results(parser, "masks.txt and masks.json")
    args = parser.parse_args()
    console, facts = open_console(150), environment()
    console.print(in_one_line(facts))
    cases = [case for case in CASES if re.search(args.only, case.name)]
    if args.smoke:
        cases = [Case("documents of 64", masks.Document(64), 1, 2, 512), Case("random", None, 1, 2, 512, told=False)]
    results = []
    for dtype in [getattr(torch, name) for name in args.dtype or ("float32", "bfloat16")]:
        for case in cases:
            print(f"{case.name}, {dtype} ...", file=sys.stderr)
            results.append(measure(case, dtype, args.grad, 0.5 if args.smoke else args.seconds, args.flex))
    console.print(table(results))
    if args.lengths:
        shown, slope = growth(torch.float32, [2048, 4096, 8192, 16_384, 32_768])
        console.print(shown)
        console.print(f"slope on a log-log plot: {slope:.2f}")
    keep(args, facts, "masks-grad" if args.grad else "masks", console, results)
    wrong = [r for r in results if r.error > (1e-4 if r.dtype == "float32" else 3e-2)]
    for r in wrong:
        console.print(f"wrong: {r.name}, {r.dtype}: an error of {r.error:.2g}", style="red")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
