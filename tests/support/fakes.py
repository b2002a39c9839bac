"""A clock that is told what each candidate costs, and kernels made up for a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from building import problem_of

import fastattn
from fastattn import Problem
from fastattn.dispatch.session import session
from fastattn.kernels import registry
from fastattn.kernels.kernel import Arguments, Kernel, Run
from fastattn.kernels.plain_math import sdpa_math
from fastattn.planning import binding
from fastattn.tuning import cpu_contention, stopwatch
from fastattn.tuning import tune as tuning
from fastattn.tuning.accuracy.judge import Judge
from fastattn.tuning.accuracy.sample import Sample

honest: Run = sdpa_math  # exact in float32: what a made-up kernel computes before it lies
FAST, DEFAULT, SLOW = 1e-3, 4e-3, 8e-3  # seconds


class Clock:
    """A stopwatch over a time that only `spend` moves; `jitter(name, now)` multiplies what a run costs."""

    def __init__(
        self,
        costs: dict[str, float] | None = None,
        other: float = SLOW,
        jitter: Callable[[str, float], float] = lambda name, now: 1.0,
    ) -> None:
        self.costs = {"default": DEFAULT} if costs is None else costs
        self.other, self.jitter = other, jitter
        self.seconds = 0.0
        self.timed: list[str] = []  # the names in the order they were timed
        self.ran: list[str] = []  # the names in the order they ran at all

    def spend(self, name: str) -> None:
        cost = self.costs.get(name, self.costs.get(name.split("+")[0], self.other))
        self.ran.append(name)
        self.seconds += cost * self.jitter(name, self.seconds)

    def time(self, call: Callable[[], object], repeats: int) -> float:
        start = self.seconds
        call()
        self.timed.append(self.ran[-1])
        took = (self.seconds - start) * repeats
        self.seconds = start + took
        return took

    def now(self) -> float:
        return self.seconds

    def calls(self, *names: str) -> dict[str, Callable[[], object]]:
        """Calls that do nothing but take their time."""
        return {name: (lambda name=name: self.spend(name)) for name in names}


def turn(monkeypatch: Any, clock: Clock, rounds: int = 5) -> Clock:
    """From now on tuning reads this clock, and every bound Call takes the time it says. rounds: of a comparison at most."""
    bind = binding.bind

    def ticking(candidate: Any, *args: Any, **named: Any) -> binding.Call:
        call = bind(candidate, *args, **named)

        def run(*given: Any) -> torch.Tensor:
            clock.spend(candidate.name)
            return call(*given)

        return run

    monkeypatch.setattr(binding, "bind", ticking)
    monkeypatch.setattr(tuning, "stopwatch", lambda device: clock)
    monkeypatch.setattr(stopwatch, "MAX_ROUNDS", rounds)
    monkeypatch.setattr(cpu_contention, "read_cpu_usage", lambda: None)  # who else uses the real cores has no say
    monkeypatch.setattr(session, "tuning_s", 0.0)  # what other tests took of the process's budget
    return clock


def made_up(name: str, run: Run, **fields: Any) -> Kernel:
    """A row that accepts nearly everything."""
    able = {"corner": "any", "masks": ("bool", "additive"), "mask_and_causal": True, "mask_grad": True}
    return Kernel(**{"name": name, "summary": "made up", "load": lambda: run, **able, **fields})


def add(monkeypatch: Any, *rows: Kernel) -> None:
    """These kernels exist until the test ends."""
    monkeypatch.setattr(registry, "_registered", [*registry._registered, *rows])


def ship(monkeypatch: Any, rows: tuple[Kernel, ...]) -> None:
    """These are the kernels that fastattn brings until the test ends."""
    monkeypatch.setattr(registry, "_shipped", lambda: rows)
    monkeypatch.setattr(registry, "_shipped_as", lambda name: tuple(row for row in rows if row.name == name))


def quick_wins(monkeypatch: Any) -> Clock:
    """A kernel, "quick", that wins wherever it is timed."""
    add(monkeypatch, made_up("quick", honest))
    return turn(monkeypatch, Clock({"default": 4e-3, "quick": FAST}))


def replace_default(monkeypatch: Any, run: Run) -> None:
    """The default computes `run` until the test ends."""
    rows = tuple(r.replace(load=lambda: run) if r.name == "default" else r for r in registry._shipped())
    ship(monkeypatch, rows)

    def sdpa(q, k, v, mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
        mask = mask[None, None] if mask is not None and mask.dim() == 2 else mask
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return run(q, k, v, mask, Arguments(scale, upper=0 if is_causal else None))

    monkeypatch.setattr(binding, "sdpa", sdpa)


def qkv(
    q_len: int = 64,
    kv_len: int | None = None,
    *,
    batch: int = 1,
    heads: int = 4,
    kv_heads: int | None = None,
    head_dim: int = 32,
    head_dim_v: int | None = None,
    dtype: torch.dtype = torch.float32,
    grad: bool = False,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v in bhsd."""
    g = torch.Generator().manual_seed(seed)
    kv_len, kv_heads, head_dim_v = kv_len or q_len, kv_heads or heads, head_dim_v or head_dim
    shapes = (batch, heads, q_len, head_dim), (batch, kv_heads, kv_len, head_dim), (batch, kv_heads, kv_len, head_dim_v)
    q, k, v = (torch.randn(shape, generator=g).to(dtype).requires_grad_(grad) for shape in shapes)
    return q, k, v


def problem(**changes: Any) -> Problem:
    """A Problem of the CPU: 1 x 4 heads x 64 on 64 x d32, float32; `device` and all else may be changed."""
    head_dim = changes.get("head_dim", 32)
    sizes = {
        "head_dim": head_dim,
        "head_dim_v": head_dim,
        "q_heads": 4,
        "kv_heads": 4,
        "batch": 1,
        "q_len": 64,
        "kv_len": 64,
    }
    return Problem(**{"device": "cpu", "dtype": "float32", **sizes, **changes})


def check(q, k, v, mask=None, **options: Any) -> None:
    """attention() with these arguments (batch 1, bhsd) is right by the gate's own rule, and changes nothing."""
    p = problem_of(q, k, v, mask, **options)
    dense = mask if isinstance(mask, torch.Tensor) else None
    grad = torch.randn(1, p.q_heads, p.q_len, p.head_dim_v).to(q.dtype) if p.needs_grad else None
    judge = Judge(Sample(p, q, k, v, dense, grad), options.get("scale", p.head_dim**-0.5))
    errors = judge.errors(lambda q, k, v, _: fastattn.attention(q, k, v, mask, **options))
    assert errors.passed, errors


def row(name: str, *call: Any, **options: Any) -> Any:
    """explain()'s row of one candidate."""
    [found] = [t for t in fastattn.explain(*call, **options).rows if t.candidate == name]
    return found
