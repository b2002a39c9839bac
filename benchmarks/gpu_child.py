"""What a child of gpu_check.py does: the workload, or some kernels, each answer a line that is printed once it is known."""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import cpu
import gpu_rehearsal
import report
import torch
from workload import Case, cases

import fastattn
from fastattn.environment.device import Device
from fastattn.environment.settings import Settings
from fastattn.environment.torch_state import torch_state
from fastattn.kernels import registry
from fastattn.planning import binding, candidates
from fastattn.planning.decision import Accepted
from fastattn.problems import call_key, call_options
from fastattn.problems.classify import classify
from fastattn.problems.problem import Problem
from fastattn.tuning import memory_use
from fastattn.tuning.accuracy import dropout
from fastattn.tuning.accuracy.judge import Judge, judges_of_problem, worst_errors
from fastattn.tuning.accuracy.judge_call import judge_of_call
from fastattn.tuning.accuracy.probes import stand_in_scale

WORKLOAD = Path(__file__).with_name("gpu_workload.toml")
MARK = "answer:"  # begins a line that is one
SERVED = "attention()"  # in the place of a kernel: what is served
RANDOM_PROBLEMS = 16
LENGTHS = ((1, 1), (1, 513), (4, 200), (64, 64), (127, 127), (65, 1000), (1000, 77), (511, 513))
CORNERS = ("top_left", "bottom_right")


# --- what is verified


def grid(device: str, smoke: bool) -> list[Problem]:
    """One field at a time away from a plain problem in bfloat16, then random mixtures in other dtypes too."""
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
        {"strides": ("expanded",) * 3}, {"strides": ("gapped",) * 3}, {"strides": ("other",) * 3},
        {"layout": "bshd"}, {"layout": "sbhd"},
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
        mixed["dtype"] = "bfloat16" if smoke else draw.choice(("float16", "float32", "bfloat16"))
        changes.append(mixed)
    found = []
    for change, needs_grad in product(changes[:: 4 if smoke else 1], (False, True)):
        dtype = change.get("dtype", "bfloat16")
        change = {name: value for name, value in change.items() if name != "dtype"}
        row = {**base, "needs_grad": needs_grad, **change}
        row.setdefault("head_dim_v", row["head_dim"])
        row["mask"] = dtype if row.get("mask") == "own" else row.get("mask")
        threads = torch.get_num_threads() if device == "cpu" else 0
        found.append(Problem(device=device, dtype=dtype, threads=threads, switches=torch_state(device).switches, **row))
    return list(dict.fromkeys(found))


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
    on = gpu_rehearsal.where(device)
    silicon, settings = Device.of(on), Settings().naming(name)
    [kernel] = [k for k in registry.rows_for(silicon.type, settings.named) if k.name == name]
    for p in grid(device, smoke):
        p = p.replace(accuracy=0.1) if kernel.approximate else p
        found = candidates.decide(kernel, p, silicon, settings, certain=True)
        accepted = [d for d in found if isinstance(d, Accepted)]
        if not accepted:
            yield Found(str(p), name, refused="; ".join(found[0].reasons))  # type: ignore[union-attr]
            continue
        if p.dropout:
            yield from _dropout(accepted, p, on)
            continue
        with torch.set_grad_enabled(p.needs_grad):
            judged: list[Judge] = []
            for candidate in accepted:
                try:
                    judged = judged or judges_of_problem(p, on)
                    call = binding.bind(candidate, judged[0].sample.problem, stand_in_scale(p))
                    errors = worst_errors(judged, call)
                    yield Found(str(p), candidate.name, _three(errors.forward), _three(errors.backward))
                except Exception as error:
                    yield Found(str(p), candidate.name, error=f"{type(error).__name__}: {error}"[:300])


def _dropout(accepted: list[Accepted], p: Problem, on: torch.device) -> Iterator[Found]:
    small, scale = dropout.dropout_problem(p), stand_in_scale(p)
    for candidate in accepted:
        try:
            call = binding.bind(candidate, small, scale, dropout_p=dropout.RATE)
            without = binding.bind(candidate, small, scale)
            with torch.set_grad_enabled(p.needs_grad), dropout.preserve_rng(on):
                errors = dropout.check_dropout(call, without, small, on)
            yield Found(str(p), candidate.name, _three(errors.forward), _three(errors.backward))
        except Exception as error:
            yield Found(str(p), candidate.name, error=f"{type(error).__name__}: {error}"[:300])


def _three(x: float | None) -> float | None:
    return None if x is None else round(x, 3)


# --- what is special


def special(name: str, device: str, smoke: bool) -> Iterator[Found]:
    """What random grids do not meet; name: a kernel, or SERVED."""
    for what, run in (SPECIAL | (OF_SERVED if name == SERVED else {})).items():
        order: dict[str, Any] = {} if name == SERVED else {"kernel": name}
        if order and any(k.approximate for k in registry.rows() if k.name == name):
            order["accuracy"] = 0.1
        try:
            with fastattn.options(kernels=[f"+{name}"] if order else None):
                error = run(device, order, smoke)
            yield (
                Found(what, name, round(error, 3))
                if error is not None
                else Found(what, name, refused="not on this device")
            )
        except fastattn.NoKernelError as refusal:
            yield Found(what, name, refused=str(refusal)[:300])
        except torch.cuda.OutOfMemoryError:
            yield Found(what, name, refused="this device has too little memory")
        except Exception as error:
            yield Found(what, name, error=f"{type(error).__name__}: {error}"[:300])
        memory_use.release_memory(gpu_rehearsal.where(device))


def error_of(q: Any, k: Any, v: Any, order: dict[str, Any], **options: Any) -> float:
    """The error of attention() on these tensors, first batch entry and kv head, in budgets."""
    out = fastattn.attention(q, k, v, **order, **options)
    return judged(out, q, k, v, **options, **{name: order[name] for name in order if name == "accuracy"})


def judged(out: Any, q: Any, k: Any, v: Any, **options: Any) -> float:
    """The error of an output that is there already."""
    p, _ = classify(call_key.call_key(q, k, v, None, "bhsd", call_options.parse_options(options)))
    judge = judge_of_call(p, q, k, v, None, stand_in_scale(p))
    assert judge is not None
    return judge.errors(lambda *_: out[:1, : p.group]).forward


def far_offsets(device: str, order: dict[str, Any], smoke: bool) -> float | None:
    """Keys and values whose last element lies beyond 2^31 elements: the last kv head is looked at."""
    if gpu_rehearsal.where(device).type == "cpu":
        return None
    rows = 2**31 // (8 * 128) + 4096
    k = torch.randn(8, rows, 128, device=device, dtype=torch.bfloat16)[None]
    q = torch.randn(1, 8, 4, 128, device=device, dtype=torch.bfloat16)
    out = fastattn.attention(q, k, k, **order)
    return judged(out[:, -1:], *(x[:, -1:] for x in (q, k, k)))


def many_heads(device: str, order: dict[str, Any], smoke: bool) -> float:
    on = gpu_rehearsal.where(device)
    q, k, v = (torch.randn(1, 700 if smoke else 70_000, 32, 64, device=on, dtype=torch.bfloat16) for _ in range(3))
    return error_of(q, k, v, order)


def many_batches(device: str, order: dict[str, Any], smoke: bool) -> float:
    on = gpu_rehearsal.where(device)
    q, k, v = (torch.randn(700 if smoke else 70_000, 1, 32, 64, device=on, dtype=torch.bfloat16) for _ in range(3))
    return error_of(q, k, v, order, is_causal=True)


def misaligned(device: str, order: dict[str, Any], smoke: bool) -> float:
    made = [
        torch.randn(2 * 4 * 100 * 64 + 1, device=gpu_rehearsal.where(device), dtype=torch.bfloat16) for _ in range(3)
    ]
    return error_of(*(x[1:].view(2, 4, 100, 64) for x in made), order=order)


def odd_strides(device: str, order: dict[str, Any], smoke: bool) -> float:
    made = [
        torch.randn(2, 4, 100, 65, device=gpu_rehearsal.where(device), dtype=torch.bfloat16)[..., 1:] for _ in range(3)
    ]
    return error_of(*made, order=order)


def pages(device: str, order: dict[str, Any], smoke: bool) -> float:
    """A cache in pages that lie about, whose table and lengths lie on the GPU; both entries are looked at."""
    on, page, lengths = gpu_rehearsal.where(device), 256, (500, 257)
    pools = [torch.randn(9, page, 2, 64, device=on, dtype=torch.bfloat16) for _ in range(2)]
    table = torch.tensor([[7, 2], [0, 5]], dtype=torch.int32, device=on)
    filled = torch.tensor(lengths, dtype=torch.int32, device=on)
    q = torch.randn(2, 1, 8, 64, device=on, dtype=torch.bfloat16)
    out = fastattn.attention(q, *pools, layout="bshd", kv_lens=filled, page_table=table, **order)
    worst = 0.0
    for entry, n in enumerate(lengths):
        k, v = (pool[table[entry].long()].flatten(0, 1)[None, :n] for pool in pools)
        worst = max(worst, judged(*(x.transpose(1, 2) for x in (out[entry, None], q[entry, None], k, v))))
    return worst


def graph(device: str, order: dict[str, Any], smoke: bool) -> float | None:
    """Captured after a warm-up, replayed on other numbers."""
    if gpu_rehearsal.where(device).type == "cpu":
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


def compiled(device: str, order: dict[str, Any], smoke: bool, **options: Any) -> float | None:
    """In a graph of torch.compile, captured as a CUDA graph, on a CPU only traced; then run on other numbers."""
    on = gpu_rehearsal.where(device)
    if on != torch.device(device):
        return None  # in a rehearsal triton is a stub, which Dynamo looks into
    torch.compiler.reset()
    run = torch.compile(
        lambda q, k, v: fastattn.attention(q, k, v, is_causal=True, **options, **order),
        backend="cudagraphs" if on.type == "cuda" else "aot_eager", fullgraph=True,
    )  # fmt: skip
    with torch.no_grad():
        for _ in range(3):
            q, k, v = (torch.randn(2, 8, 128, 64, device=on, dtype=torch.bfloat16) for _ in range(3))
            out = run(q, k, v)
    return judged(out, q, k, v, is_causal=True, **options)


def compiled_window(device: str, order: dict[str, Any], smoke: bool) -> float | None:
    return compiled(device, order, smoke, window=(31, 0))


SPECIAL: dict[str, Callable[..., float | None]] = {
    "offsets beyond 2^31": far_offsets,
    "70,000 heads": many_heads,
    "batch of 70,000": many_batches,
    "misaligned views": misaligned,
    "odd strides": odd_strides,
    "a cache in pages": pages,
    "CUDA graph": graph,
}
OF_SERVED: dict[str, Callable[..., float | None]] = {  # what stands in the graph is the winner
    "compiled, in a CUDA graph": compiled,
    "compiled, in a CUDA graph, a window": compiled_window,
}


# --- the child


def say(**answer: Any) -> None:
    """An answer is a line of its own, printed as soon as it is known."""
    print(f"\n{MARK}{json.dumps(answer)}", flush=True)


def run_workload(args: argparse.Namespace) -> None:
    """Every problem that is asked for: F.sdpa, each pinned kernel, attention()."""
    fastattn.options(mode="auto", accuracy="exact", tune_budget=1e9)
    for case in workload(args):
        title = report.title_of(case)
        if title in args.skip:
            continue
        say(began=title)
        rounds, seconds = (5, 0.3) if args.smoke else (15, 1.0)
        store = tempfile.mkdtemp(
            dir=os.environ.get("FASTATTN_CACHE_DIR")
        )  # its notes tell the next child what ended this one
        result = cpu.measure(case, rounds, seconds, args.device, compile_kernels=args.compile, store=store)
        say(title=title, result=asdict(result), seconds=result.took_s)
        memory_use.release_memory(gpu_rehearsal.where(args.device))


def run_kernels(args: argparse.Namespace) -> None:
    """Verification, then the special cases, of one kernel after the other."""
    for name in args.names:
        say(began=name)
        for part, ask in (("verify", verify), ("special", special)):
            if part in args.parts and (part, name) != ("verify", SERVED):
                for found in ask(name, args.device, args.smoke):
                    say(part=part, kernel=name, found=asdict(found))


def workload(args: argparse.Namespace) -> list[Case]:
    """The problems that are asked for; with --smoke the small ones of workload.toml, as gpu_workload.toml's fit no CPU."""
    if args.smoke and not args.rehearse:
        return [c for c in cases() if c.name == "tiny" and not c.is_training]
    found = [c for c in cases(WORKLOAD) if not args.only or re.search(args.only, report.title_of(c))]
    return [gpu_rehearsal.small(c) for c in found] if args.rehearse else found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("job", choices=["workload", "kernels"])
    parser.add_argument("--names", nargs="*", default=[], help="kernels")
    parser.add_argument("--parts", nargs="*", default=["verify", "special"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--skip", action="append", default=[])
    args = parser.parse_args()
    with gpu_rehearsal.made_up_gpu(args.rehearse):
        (run_workload if args.job == "workload" else run_kernels)(args)


if __name__ == "__main__":
    main()
