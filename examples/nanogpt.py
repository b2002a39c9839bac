"""Train a small causal language model on a text, stock and with fastattn in the place of F.scaled_dot_product_attention.

The model is a GPT of characters (_gpt.py), trained as nanoGPT trains: AdamW, clipped gradients, random windows of the text.
Copies of it train in lockstep on the same batches, stock and patched. Shown are the step times side by side, how far apart the
loss curves are and how far they may be, which kernels served, and that a second process finds every verdict on disk. The text
is the source of fastattn unless another one is named.

    python examples/nanogpt.py [TEXT_FILE] [--steps 200] [--dtype float16] [--quick] [--plot curves.png] [--json]
"""

from __future__ import annotations

import argparse
import json
import random
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from statistics import median

import _report
import torch
from _gpt import GPT, Size
from rich.console import Console
from rich.progress import Progress
from rich.text import Text
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from fastattn.dispatch.ahead import collect

# What a user would do on a CPU. bfloat16: autocast. float16: the model in float32 and its attention in half, the loss scaled as
# in recipes for GPUs; not autocast, as few CPUs have float16 products: a step took ten to twenty times as long.
ATTEND_IN = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# The copies that train in lockstep. `again` says what a ratio of times is worth, `math` what a distance of curves is worth:
# it has torch's unfused kernel.
COPIES = {
    "stock": nullcontext,
    "fastattn": fastattn.patch,
    "again": nullcontext,
    "math": lambda: sdpa_kernel(SDPBackend.MATH),
}
SEED = 1337
UNTIMED = 3  # steps: the first one tunes
RATE, WARM_UP = 1e-3, 10  # steps until the full rate

# How far apart the loss curves of two correct kernels may be. Training amplifies rounding by a factor that nobody knows ahead,
# so it is measured: `math` differs from `stock` by rounding alone, with the same model and batches. While curves are close,
# their distance is in proportion to the error that each step adds. A kernel of torch's adds about e32, the error of plain math,
# or u (P|V|), that of a fused kernel, which are alike; fastattn accepts 4 (e32 + u (P|V|)), 8 times that (in half precision 2,
# of gradients 3: 4 and 6 times). To it comes what the loss itself, a float32 mean of logarithms, is rounded by: 8 ulp. The
# proportion needs the rate's warm-up: Adam's first steps move every weight by the whole rate, whatever its gradient's size, so
# that where a gradient is near zero rounding alone chooses the direction (bfloat16 curves: 5e-3 apart without, 5e-4 with it).
ALLOWED = 8
FLOOR = 8 * torch.finfo(torch.float32).eps


class Copy:
    """One of the copies: its model, its optimizer, its losses, and the seconds of its steps."""

    def __init__(self, size, dtype, within):
        torch.manual_seed(SEED)
        self.within, self.dtype, self.losses, self.seconds = within, dtype, [], []
        self.model = GPT(size, ATTEND_IN[dtype])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
        self.scaler = torch.amp.GradScaler("cpu", enabled=dtype == "float16")

    def step(self, tokens, targets):
        start = time.perf_counter()
        self.optimizer.param_groups[0]["lr"] = RATE * min(1.0, (len(self.losses) + 1) / WARM_UP)
        with self.within():
            with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bfloat16"):
                loss = self.model(tokens, targets)
            self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())

    def step_ms(self):
        return 1e3 * median(self.seconds[UNTIMED:] or self.seconds)

    def distance(self, other):
        return max(abs(x - y) for x, y in zip(self.losses, other.losses, strict=True))


def source():
    """The text of the installed fastattn."""
    return "".join(path.read_text(encoding="utf-8") for path in sorted(Path(fastattn.__file__).parent.rglob("*.py")))


def batches(text, size, steps):
    """`steps` pairs of tokens and targets [batch, context], the same ones for every copy and dtype."""
    number = {symbol: i for i, symbol in enumerate(sorted(set(text)))}
    tokens = torch.tensor([number[symbol] for symbol in text])
    chance = torch.Generator().manual_seed(SEED)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - size.context, (size.batch,), generator=chance)
        windows = torch.stack([tokens[i : i + size.context + 1] for i in starts])
        yield windows[:, :-1], windows[:, 1:]


def train(dtype, text, size, steps, progress):
    """One row of the result, as data."""
    copies = {name: Copy(size, dtype, within) for name, within in COPIES.items()}
    before, order, bar = fastattn.stats()["tunings"], random.Random(SEED), progress.add_task(dtype, total=steps)
    with collect() as met:
        for batch in batches(text, size, steps):
            for name in order.sample(list(copies), len(copies)):  # nobody always follows the same neighbour
                copies[name].step(*batch)
            progress.update(bar, advance=1, description=f"{dtype}, loss {copies['fastattn'].losses[-1]:.2f}")
    stock, ours, again, math = copies.values()
    return {
        "dtype": dtype,
        "stock_ms": stock.step_ms(),
        "fastattn_ms": ours.step_ms(),
        "aa_spread": abs(again.step_ms() / stock.step_ms() - 1),
        "losses": {name: copy.losses for name, copy in copies.items()},
        "distance": ours.distance(stock),
        "of_itself": again.distance(stock),
        "of_math": math.distance(stock),
        "allowed": ALLOWED * math.distance(stock) + FLOOR * stock.losses[0],
        "problems": len(met),
        "tuned": fastattn.stats()["tunings"] - before,
        "kernels": _report.served(met),
    }


def measure(given):
    """All dtypes in this process."""
    text = Path(given.text).read_text(encoding="utf-8", errors="replace") if given.text else source()
    size = Size(symbols=len(set(text)))
    if len(text) <= size.context:
        raise SystemExit(f"the text has {len(text)} characters; it needs more than {size.context}")
    terminal = Console(stderr=True)
    with Progress(console=terminal, disable=not terminal.is_terminal, transient=True) as progress:
        rows = [train(dtype, text, size, given.steps, progress) for dtype in given.dtype]
    return {
        "text": given.text or "the source of fastattn",
        "characters": len(text),
        "size": asdict(size),
        "parameters": sum(p.numel() for p in GPT(size, torch.float32).parameters()),
        "steps": given.steps,
        "rows": rows,
        "tuned": fastattn.stats()["tunings"],
        "tuning_s": fastattn.stats()["tuning_s"],
    }


def show(first, second):
    size = first["size"]
    console = _report.open_console(
        f"GPT of {first['parameters'] / 1e6:.1f} M parameters, {size['layers']} layers, {size['heads']} heads of"
        f" {size['width'] // size['heads']}, batch {size['batch']} x {size['context']}, {first['steps']} steps"
    )
    console.print(Text(f"text: {first['text']}, {first['characters']:,} characters\n", "dim"))
    times = _report.table(*_report.TIMES, wide="kernels that served")
    losses = _report.table("first loss", "last: stock", "fastattn", "distance", "stock's own", "math's", "allowed")
    for row in first["rows"]:
        times.add_row(row["dtype"], *_report.times(row), _report.kernels(row))
        stock, ours = row["losses"]["stock"], row["losses"]["fastattn"]
        distances = [f"{row[name]:.1g}" for name in ("distance", "of_itself", "of_math", "allowed")]
        distances[0] = Text(distances[0], "bold green" if row["distance"] <= row["allowed"] else "bold red")
        losses.add_row(row["dtype"], f"{stock[0]:.4f}", f"{stock[-1]:.4f}", f"{ours[-1]:.4f}", *distances)
    console.print(times)
    console.print(Text("whole steps, medians of interleaved rounds; A/A: stock against itself\n", "dim"))
    console.print(losses)
    console.print(Text(
        f"distance: the largest between the loss curves of stock and fastattn; stock's own: of two stock runs;"
        f"\nmath's: of two of torch's own kernels, what rounding alone comes to; allowed: {ALLOWED} times that\n", "dim"
    ))  # fmt: skip
    _report.tell_tunings(console, first, second)


def plot(path, first):
    """Per dtype the two loss curves, one over the other, and the step times."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = first["rows"]
    figure, axes = pyplot.subplots(2, len(rows), figsize=(4 * len(rows) + 1, 6), squeeze=False, height_ratios=(3, 1))
    for row, (curve, bars) in zip(rows, axes.T, strict=True):
        curve.plot(row["losses"]["stock"], color="tab:gray", linewidth=5, alpha=0.5, label="stock")
        curve.plot(row["losses"]["fastattn"], color="tab:blue", linewidth=1.2, label="fastattn")
        curve.set(title=f"{row['dtype']}: at most {row['distance']:.1g} apart", xlabel="step", ylabel="loss")
        curve.legend()
        found = bars.barh(["fastattn", "stock"], [row["fastattn_ms"], row["stock_ms"]], color=["tab:blue", "tab:gray"])
        bars.bar_label(found, fmt="%.0f ms", padding=3)
        bars.margins(x=0.2)
        bars.set(xlabel=f"step time: {row['stock_ms'] / row['fastattn_ms']:.2f}x")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", nargs="?", metavar="TEXT_FILE", help="default: the source of fastattn")
    parser.add_argument("--steps", type=int, help="default: 200")
    parser.add_argument("--dtype", action="append", choices=tuple(ATTEND_IN), help="repeatable; default: all three")
    parser.add_argument("--quick", action="store_true", help="20 steps")
    parser.add_argument("--plot", metavar="PNG", help="write the curves and step times; needs matplotlib")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-second", action="store_true", help="do not start a second process")
    given = parser.parse_args()
    given.steps = given.steps or (20 if given.quick else 200)
    given.dtype = given.dtype or list(ATTEND_IN)
    first = measure(given)
    again = ["--steps", "1", *(f"--dtype={dtype}" for dtype in given.dtype), *([given.text] if given.text else [])]
    second = None if given.no_second else _report.second_process(__file__, *again)
    if given.plot:
        plot(given.plot, first)
    if given.json:
        print(json.dumps({**first, **({"second": second} if second else {})}, indent=1))
    else:
        show(first, second)


if __name__ == "__main__":
    main()
