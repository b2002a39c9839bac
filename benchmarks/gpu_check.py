"""Every kernel this machine can use: is it right over a grid, and how fast over gpu_workload.toml.

    python benchmarks/gpu_check.py [verify] [special] [workload] [--only REGEX] [--results docs/results]

verify    each kernel, with all its conversions, against float64 by the gate's probes, forward and backward
special   offsets beyond 2^31, more than 65,535 heads, misaligned views, a CUDA graph: through attention() and through each kernel
workload  F.sdpa, every pinned candidate and attention(), interleaved, as benchmarks/cpu.py does it

Each kernel, and the workload, runs in a process of its own, so that a crash costs a row. Without a name: all three.
`--device cpu --smoke` runs the same on a CPU. Exit code 1 where a kernel raised, ended its process, or attention() was wrong; a
refusal is no fault, nor is a candidate over its error budget, which the gate keeps from every caller ("over").
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import cpu
import report
import torch
from report import Grid
from rich.console import Console
from rounds import environment
from workload import Case, cases

import fastattn
from fastattn import candidates, config, dropping, inputs, kernels, memory, planning, samples, verifying
from fastattn.device import Device, state
from fastattn.kernel import Accepted
from fastattn.problem import Problem

PARTS = ("verify", "special", "workload")
WORKLOAD = Path(__file__).with_name("gpu_workload.toml")
CHILD_S = 420.0
MARK = "answer:"  # begins a line of a child that is an answer
RANDOM_PROBLEMS = 60


# --- what is verified


def grid(device: str, smoke: bool) -> list[Problem]:
    """One field at a time away from a plain problem, then random mixtures, in both half dtypes and float32."""
    base: dict[str, Any] = {"head_dim": 64, "q_heads": 8, "kv_heads": 8, "batch": 2, "q_len": 128, "kv_len": 128}
    changes: list[dict[str, Any]] = [
        {}, *({"q_len": q, "kv_len": kv} for q, kv in LENGTHS), *({"head_dim": d} for d in (16, 40, 80, 96, 128, 192, 256)),
        {"head_dim": 192, "head_dim_v": 128}, {"head_dim": 64, "head_dim_v": 128}, {"kv_heads": 2}, {"kv_heads": 1},
        {"causal": "top_left"}, *({"causal": c, "q_len": q, "kv_len": kv} for c in CORNERS for q, kv in ((64, 200), (200, 64))),
        {"mask": "bool", "mask_shape": "b11k"}, {"mask": "bool", "mask_shape": "bhqk"}, {"mask": "own", "mask_shape": "1hqk"},
        {"mask": "own", "mask_shape": "bhqk", "mask_grad": True, "needs_grad": True},
        {"window": (32, 0), "causal": "top_left"}, {"window": (20, 12)}, {"softcap": 20.0}, {"lse": True},
        {"lse": True, "causal": "bottom_right", "q_len": 200, "kv_len": 64}, {"scale": "negative"}, {"scale": "zero"},
        {"strides": ("transposed",) * 3}, {"strides": ("packed",) * 3}, {"strides": ("contiguous", "cache", "cache")},
        {"strides": ("expanded",) * 3}, {"strides": ("other",) * 3}, {"layout": "bshd"}, {"layout": "sbhd"},
        {"deterministic": True, "needs_grad": True}, {"dropout": True},
    ]  # fmt: skip
    draw = Random(0)
    for _ in range(RANDOM_PROBLEMS if not smoke else 4):
        q_len, kv_len = draw.choice(LENGTHS)
        causal = draw.choice((None, *CORNERS))
        mixed: dict[str, Any] = {
            "q_len": q_len, "kv_len": kv_len, "head_dim": draw.choice((40, 64, 96, 128, 256)), "kv_heads": draw.choice((8, 2)),
            "causal": None if causal == "bottom_right" and q_len in (1, kv_len) else causal, "lse": draw.random() < 0.2,
            "softcap": draw.choice((0.0, 0.0, 30.0)), "layout": draw.choice(("bhsd", "bshd")),
            "window": draw.choice((None, None, (16, -1))),
        }  # fmt: skip
        changes.append(mixed)
    dtypes = ("bfloat16",) if smoke else ("bfloat16", "float16", "float32")
    found = []
    for dtype, change, needs_grad in product(dtypes, changes[:: 4 if smoke else 1], (False, True)):
        row = {**base, "needs_grad": needs_grad, **change}
        row.setdefault("head_dim_v", row["head_dim"])
        row["mask"] = dtype if row.get("mask") == "own" else row.get("mask")
        threads = torch.get_num_threads() if device == "cpu" else 0
        found.append(Problem(device=device, dtype=dtype, threads=threads, precision=precision(device), **row))
    return list(dict.fromkeys(found))


LENGTHS = ((1, 1), (1, 513), (4, 200), (64, 64), (127, 127), (65, 1000), (1000, 77), (511, 513))
CORNERS = ("top_left", "bottom_right")


def precision(device: str) -> str:
    return state(device).precision


@dataclass(frozen=True)
class Found:
    """What one candidate came to on one problem, or why a kernel refuses it."""

    what: str
    candidate: str
    forward: float | None = None
    backward: float | None = None
    error: str | None = None  # an exception, a wrong number
    refused: str | None = None

    @property
    def is_over(self) -> bool:
        """Over its error budget: the gate would refuse it."""
        return not (self.forward or 0.0) <= 1.0 or not (self.backward or 0.0) <= 1.0


def verify(name: str, device: str, smoke: bool) -> Iterator[Found]:
    """Each candidate of a kernel on each problem of the grid, by the gate's own judges."""
    on = torch.device(device)
    silicon, settings = Device.of(on), config.Config().naming(name)
    [kernel] = [k for k in kernels.rows_for(silicon.type, settings.named) if k.name == name]
    for p in grid(device, smoke):
        p = p.replace(accuracy=0.1) if kernel.approximate else p
        found = candidates.decide(kernel, p, silicon, settings)
        accepted = [d for d in found if isinstance(d, Accepted)]
        if not accepted:
            yield Found(str(p), name, refused="; ".join(found[0].reasons))  # type: ignore[union-attr]
            continue
        if p.dropout:
            yield from _dropout(accepted, p, on)
            continue
        with torch.set_grad_enabled(p.needs_grad):
            judges = verifying.judges(p, on)
            for candidate in accepted:
                try:
                    call = planning.bind(candidate, judges[0].sample.problem, samples.scale_of(p))
                    errors = verifying.summary(judges, call)
                    yield Found(str(p), candidate.name, _three(errors.forward), _three(errors.backward))
                except Exception as error:
                    yield Found(str(p), candidate.name, error=f"{type(error).__name__}: {error}"[:300])


def _dropout(accepted: list[Accepted], p: Problem, on: torch.device) -> Iterator[Found]:
    small, scale = dropping.problem_of(p), samples.scale_of(p)
    for candidate in accepted:
        try:
            call = planning.bind(candidate, small, scale, dropout_p=dropping.RATE)
            without = planning.bind(candidate, small, scale)
            with torch.set_grad_enabled(p.needs_grad), dropping.own_random(on):
                errors = dropping.check(call, without, small, on)
            yield Found(str(p), candidate.name, _three(errors.forward), _three(errors.backward))
        except Exception as error:
            yield Found(str(p), candidate.name, error=f"{type(error).__name__}: {error}"[:300])


def _three(x: float | None) -> float | None:
    return None if x is None else round(x, 3)


# --- what is special


def special(name: str, device: str, smoke: bool) -> Iterator[Found]:
    """What random grids do not meet; name: a kernel, or "attention()" for what is served."""
    for what, run in SPECIAL.items():
        order = {} if name == "attention()" else {"kernel": name}
        try:
            with fastattn.options(kernels=[f"+{name}"] if order else None):
                error = run(device, order, smoke)
            yield Found(what, name, round(error, 3)) if error is not None else Found(what, name, refused="not on this device")
        except fastattn.NoKernelError as refusal:
            yield Found(what, name, refused=str(refusal)[:300])
        except torch.cuda.OutOfMemoryError:
            yield Found(what, name, refused="this device has too little memory")
        except Exception as error:
            yield Found(what, name, error=f"{type(error).__name__}: {error}"[:300])
        memory.release(torch.device(device))


def error_of(q: Any, k: Any, v: Any, order: dict[str, Any], **options: Any) -> float:
    """The error of attention() on these tensors, first batch entry and kv head, in budgets."""
    return judged(fastattn.attention(q, k, v, **order, **options), q, k, v, **options)


def judged(out: Any, q: Any, k: Any, v: Any, **options: Any) -> float:
    """The error of an output that is there already."""
    p = Problem.from_key(inputs.call_key(q, k, v, None, "bhsd", inputs.parse(options)))
    judge = verifying.judge_of_call(p, q, k, v, None, samples.scale_of(p))
    assert judge is not None
    return judge.errors(lambda *_: out[:1, : p.group]).forward


def far_offsets(device: str, order: dict[str, Any], smoke: bool) -> float | None:
    """Keys and values whose last element lies beyond 2^31 elements: the last kv head is looked at."""
    if device == "cpu":
        return None
    rows = 2**31 // (8 * 128) + 4096
    k = torch.randn(8, rows, 128, device=device, dtype=torch.bfloat16)[None]
    q = torch.randn(1, 8, 4, 128, device=device, dtype=torch.bfloat16)
    out = fastattn.attention(q, k, k, **order)
    return judged(out[:, -1:], *(x[:, -1:] for x in (q, k, k)))


def many_heads(device: str, order: dict[str, Any], smoke: bool) -> float:
    q, k, v = (torch.randn(1, 700 if smoke else 70_000, 32, 64, device=device, dtype=torch.bfloat16) for _ in range(3))
    return error_of(q, k, v, order)


def many_batches(device: str, order: dict[str, Any], smoke: bool) -> float:
    q, k, v = (torch.randn(700 if smoke else 70_000, 1, 32, 64, device=device, dtype=torch.bfloat16) for _ in range(3))
    return error_of(q, k, v, order, is_causal=True)


def misaligned(device: str, order: dict[str, Any], smoke: bool) -> float:
    made = [torch.randn(2 * 4 * 100 * 64 + 1, device=device, dtype=torch.bfloat16) for _ in range(3)]
    return error_of(*(x[1:].view(2, 4, 100, 64) for x in made), order=order)


def odd_strides(device: str, order: dict[str, Any], smoke: bool) -> float:
    made = [torch.randn(2, 4, 100, 65, device=device, dtype=torch.bfloat16)[..., 1:] for _ in range(3)]
    return error_of(*made, order=order)


def graph(device: str, order: dict[str, Any], smoke: bool) -> float | None:
    """Captured after a warm-up, replayed on other numbers."""
    if device == "cpu":
        return None
    q, k, v = (torch.randn(2, 8, 128, 64, device=device, dtype=torch.bfloat16) for _ in range(3))
    for _ in range(3):
        fastattn.attention(q, k, v, is_causal=True, **order)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        out = fastattn.attention(q, k, v, is_causal=True, **order)
    for x in (q, k, v):
        x.copy_(torch.randn_like(x))
    captured.replay()
    torch.cuda.synchronize()
    return judged(out, q, k, v, is_causal=True)


SPECIAL: dict[str, Callable[..., float | None]] = {
    "offsets beyond 2^31": far_offsets,
    "70,000 heads": many_heads,
    "batch of 70,000": many_batches,
    "misaligned views": misaligned,
    "odd strides": odd_strides,
    "CUDA graph": graph,
}


# --- children


def child(part: str, name: str, args: argparse.Namespace) -> None:
    """Print each answer as a line of its own, as soon as it is known."""
    if part == "workload":
        fastattn.options(mode="auto", accuracy="exact", tune_budget=1e9)
        skip = set(args.skip)
        for case in workload(args):
            title = report.title_of(case)
            if title in skip:
                continue
            print(f"{MARK}{json.dumps({'began': title})}", flush=True)
            result = cpu.measure(case, 5 if args.smoke else 15, 0.3 if args.smoke else 1.0, args.device)
            print(f"{MARK}{json.dumps({'title': title, 'result': asdict(result)})}", flush=True)
            memory.release(torch.device(args.device))
        return
    for found in (verify if part == "verify" else special)(name, args.device, args.smoke):
        print(f"{MARK}{json.dumps(asdict(found))}", flush=True)


def ask(part: str, name: str, args: argparse.Namespace, extra: tuple[str, ...] = ()) -> tuple[list[dict[str, Any]], str | None]:
    """A child's answers, and how it ended where that was not well."""
    command = [sys.executable, __file__, "--child", part, name, "--device", args.device]
    command += ["--only", args.only] if args.only else []
    command += ["--smoke"] if args.smoke else []
    try:
        run = subprocess.run([*command, *extra], capture_output=True, text=True, timeout=args.child_seconds)
        output, ended = run.stdout, None
        if run.returncode:
            last = (run.stderr.strip().splitlines() or ["it printed nothing"])[-1]
            ended = f"exit {run.returncode}: {last[:200]}"
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        ended = f"no end within {args.child_seconds:.0f} s"
    return [json.loads(line.removeprefix(MARK)) for line in output.split("\n") if line.startswith(MARK)], ended


# --- the parent


def usable(device: str, only: str | None) -> list[tuple[str, str | None]]:
    """(kernel, why it cannot be used here): those that could run on this device at all."""
    silicon = Device.of(torch.device(device))
    found = []
    for kernel in kernels.rows_for(silicon.type):
        if silicon.type not in kernel.devices or (only and not re.search(only, kernel.name)):
            continue
        found.append((kernel.name, f"package {kernel.library} is not installed" if candidates.version(kernel.library) is None else None))
    return found


def check(part: str, args: argparse.Namespace, console: Console) -> tuple[Grid, list[dict[str, Any]], int]:
    """The table of a part, its raw answers, and how many are wrong."""
    rows, raw, wrong = [], [], 0
    names = usable(args.device, args.only)
    if part == "special":
        names.insert(0, ("attention()", None))
    for name, why in names:
        if why is not None:
            rows.append((name, "", "", "", "", "", "", "", why))
            continue
        console.print(f"{part} {name} ...", style="dim")
        start = time.perf_counter()
        answers, ended = ask(part, name, args)
        found = [Found(**answer) for answer in answers]
        raw += [{"kernel": name, **answer} for answer in answers]
        ran = [f for f in found if f.refused is None]
        over = [f for f in ran if f.error is None and f.is_over]
        bad = [f for f in ran if f.error is not None] + (over if name == "attention()" else [])
        ended = ended or (None if found else "it answered nothing")
        wrong += len(bad) + (ended is not None)
        worst = max((f.forward or 0.0 for f in ran), default=0.0), max((f.backward or 0.0 for f in ran), default=0.0)
        told = [*bad, *(f for f in over if f not in bad)]
        says = "; ".join([*(_complaint(f) for f in told[:3]), *([f"and {len(told) - 3} more"] if len(told) > 3 else []),
                          *([ended] if ended else [])])  # fmt: skip
        if not ran and found:
            says = says or f"refused all: {found[0].refused}"
        rows.append((name, str(len(ran)), str(len(found) - len(ran)), str(len(bad)), str(len(over)), f"{worst[0]:.2f}", f"{worst[1]:.2f}",
                     f"{time.perf_counter() - start:.0f} s", says))  # fmt: skip
    headings = (part, "ran", "refused", "raised", "over", "forward", "backward", "took", "")
    return Grid(f"{part}: largest errors in budgets", headings, rows, texts=2), raw, wrong


def _complaint(f: Found) -> str:
    return f"{f.candidate} on {f.what}: {f.error or f'{f.forward} / {f.backward} budgets'}"


def workload(args: argparse.Namespace) -> list[Case]:
    """The problems that are asked for; with --smoke the small ones of workload.toml, as gpu_workload.toml's fit no CPU."""
    if args.smoke:
        return [c for c in cases() if c.name == "tiny" and not c.is_training]
    return [c for c in cases(WORKLOAD) if not args.only or re.search(args.only, report.title_of(c))]


def run_workload(args: argparse.Namespace, console: Console) -> tuple[list[Any], list[str]]:
    """Results, and what ended a child; another one goes on after the problem that ended it."""
    results, ends, done = [], [], []
    todo = {report.title_of(c): c for c in workload(args)}
    while len(done) < len(todo):
        console.print(f"workload, {len(todo) - len(done)} problems ...", style="dim")
        answers, ended = ask("workload", "all", args, tuple(x for title in done for x in ("--skip", title)))
        for answer in (a for a in answers if "result" in a):
            data = answer["result"] | {"case": todo[answer["title"]]}
            data["candidates"] = [cpu.Candidate(**c) for c in data["candidates"]]
            results.append(cpu.Result(**data))
        began = [a["began"] for a in answers if "began" in a]
        done += began
        if ended is not None:
            ends.append(f"{began[-1] if began else 'the start'}: {ended}")
        if not began:
            ends += [] if ended else ["the start: it answered nothing"]
            break
    return results, ends


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="|".join(PARTS), help="default: all three")
    parser.add_argument("--only", metavar="REGEX", help="kernels, or titles of the workload, that match")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--smoke", action="store_true", help="a small part of everything")
    parser.add_argument("--results", metavar="FOLDER", help="write gpu_<part>.json and .md there")
    parser.add_argument("--child-seconds", type=float, default=CHILD_S, help="that one kernel may take (default %(default).0f)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--skip", action="append", default=[], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu --smoke runs the same on the CPU")
    if args.child:
        child(*args.child, args)
        return 0
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    facts = environment(args.device) | {"libraries": installed()}
    wrong = 0
    for part in args.parts or PARTS:
        if part == "workload":
            results, ends = run_workload(args, console)
            tables = report.grids(results, with_candidates=True) if results else []
            wrong += len(ends) + sum(not r.error <= 1 for r in results)
            data: Any = report.to_json(facts, results) if results else {}
            notes = ends
        else:
            table, raw, bad = check(part, args, console)
            tables, data, notes = [table], {"environment": facts, "answers": raw}, []
            wrong += bad
        for table in tables:
            console.print(table.rich(), "")
        for note in notes:
            console.print(note, style="red")
        if args.results:
            write(Path(args.results), part, facts, tables, notes, data)
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()), style="dim")
    console.print("all right" if not wrong else f"{wrong} wrong", style="green" if not wrong else "red")
    return 1 if wrong else 0


def installed() -> str:
    """The kernel libraries of this machine, with versions."""
    named = {k.library: candidates.version(k.library) for k in kernels.rows() if k.library != "torch"}
    return ", ".join(f"{name} {version}" for name, version in named.items() if version) or "none"


def write(folder: Path, part: str, facts: dict[str, str], tables: list[Grid], notes: list[str], data: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"gpu_{part}.json").write_text(json.dumps({**data, "ended": notes}, indent=1), encoding="utf-8")
    lines = [f"# GPU check: {part}", "", "Made by `benchmarks/gpu_check.py`.", "", *(f"- {k}: {v}" for k, v in facts.items()), ""]
    text = "\n".join([*lines, *(f"- {note}" for note in notes), *(t.markdown() for t in tables)])
    (folder / f"gpu_{part}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
