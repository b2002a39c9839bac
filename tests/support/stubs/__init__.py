"""Stand-ins for kernel libraries: the real signatures (tests/signatures), and each library's own semantics in float64.

A stub computes what its library would: its causal corner, its windows, its mask polarity and units, its log-sum-exp. So an
adapter that gets one of them wrong gives wrong numbers here. What a library refuses, its stub asserts.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, wraps
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

import torch

SIGNATURES = Path(__file__).parents[1] / "signatures"
INF = float("inf")


@dataclass(frozen=True)
class Stub:
    """One library. file: its kernels' file in fastattn.kernels.adapters."""

    file: str
    library: str  # the distribution that is then installed
    version: str
    modules: Callable[[], dict[str, ModuleType]] = dict  # name -> module, to be put into sys.modules
    patch: Callable[[Any], None] = lambda monkeypatch: None  # whatever else has to be replaced
    capability: int = 90
    capabilities: dict[str, int] = field(default_factory=dict)  # kernel -> its own, where that is another
    kernels: tuple[str, ...] = ()  # those of the file that this library brings; all of them where nothing is said
    sizes: dict[str, int] = field(
        default_factory=dict
    )  # of a grid call that says none, where the usual ones are refused
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)  # its own grid calls, beside test_libraries.GRID
    copies: tuple[str, ...] = ()  # kernels that copy even in a plain call
    refuses: dict[str, str] = field(
        default_factory=dict
    )  # kernel -> names of grid cases it refuses, no more and no fewer
    mutations: tuple[tuple[str, str], ...] = ()  # (text, other text) of the file: each must turn the grid red


def named_stubs() -> dict[str, Stub]:
    """The stub of each file of this folder, by the file's name."""
    return {m.name: import_module(f"{__name__}.{m.name}").STUB for m in iter_modules(__path__)}


def all_stubs() -> list[Stub]:
    return list(named_stubs().values())


def module(name: str, **members: Any) -> ModuleType:
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)  # find_spec raises ValueError on a module without one
    for key, value in members.items():
        setattr(made, key, value)
    return made


# --- the real signatures


@cache
def signatures(file: str) -> dict[str, Any]:
    return json.loads((SIGNATURES / f"{file}.json").read_text(encoding="utf-8"))


def signature(file: str, name: str) -> inspect.Signature:
    """The signature of a library's function, as the snapshot of its source says."""
    scope = _Anything(math=math, torch=torch)
    exec(f"def function({signatures(file)['functions'][name]}): pass", {}, scope)
    return inspect.signature(scope["function"])


def of_operator(name: str) -> inspect.Signature:
    """The signature of one of torch's operators, as this torch says."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    given = [
        (a.name, kinds[a.kwarg_only], a.default_value if a.has_default_value() else inspect.Parameter.empty)
        for a in getattr(torch.ops.aten, name).default._schema.arguments
    ]
    return inspect.Signature([inspect.Parameter(name, kind, default=default) for name, kind, default in given])


class _Anything(dict):
    """Defaults that name something of the library's own."""

    def __missing__(self, key: str) -> str:
        return _Name(key)


class _Name(str):
    def __getattr__(self, name: str) -> str:
        return _Name(f"{self}.{name}")

    def __getitem__(self, key: Any) -> str:
        return _Name(f"{self}[{key!r}]")

    def __call__(self, *given: Any) -> str:
        return _Name(f"{self}{given}")


calls: list[tuple[str, dict[str, Any]]] = []  # (function, its arguments) of every call of a signed function
_inside = 0


def is_inside() -> bool:
    """Whether a library is at work: what it copies is its own affair."""
    return _inside > 0


@contextlib.contextmanager
def library_at_work():
    global _inside
    _inside += 1
    try:
        yield
    finally:
        _inside -= 1


def signed(
    file: str, name: str, *, keywords_only: bool = True, real: inspect.Signature | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a stub function the real one's signature; it gets every argument, defaults filled in. Calls are recorded."""
    real = signature(file, name) if real is None else real

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*given: Any, **named: Any) -> Any:
            assert not (given and keywords_only), f"{name}: positional arguments; their order is no library's promise"
            bound = real.bind(*given, **named)
            bound.apply_defaults()
            calls.append((name, dict(bound.arguments)))
            with library_at_work():
                return function(**bound.arguments)

        call.__signature__ = real
        del call.__wrapped__
        return call

    return decorate


# --- semantics


def band(q_len: int, kv_len: int, left: int | None, right: int | None, at: int) -> torch.Tensor:
    """Visible keys (q, k): i + at - left <= j <= i + at + right; None is no limit. at: kv_len - q_len or 0."""
    i, j = torch.arange(q_len)[:, None] + at, torch.arange(kv_len)[None]
    seen = torch.ones(q_len, kv_len, dtype=torch.bool)
    if left is not None:
        seen = seen & (j >= i - left)
    return seen if right is None else seen & (j <= i + right)


def attend(q, k, v, *, scale, visible=None, bias=None, softcap=0.0, empty_lse=-INF):
    """Attention over (b, h, s, d), fewer kv heads allowed, in float64: (out in q's dtype, natural lse (b, h, q) float32)."""
    group = q.shape[1] // k.shape[1]
    wide_k, wide_v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = q.double() @ wide_k.mT * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores if bias is None else scores + bias.double()
    hidden = torch.zeros(scores.shape, dtype=torch.bool) if visible is None else ~visible.expand(scores.shape)
    hidden = hidden | (scores.detach() == -INF)
    none = hidden.all(-1, keepdim=True)
    scores = scores.masked_fill(hidden, -INF).masked_fill(none, 0.0)
    out = (scores.softmax(-1).masked_fill(none, 0.0) @ wide_v).to(q.dtype)
    lse = scores.logsumexp(-1).masked_fill(none[..., 0], empty_lse)
    return out, lse.float()


def for_each_sequence(q, k, v, cu_q, cu_kv, max_q, max_kv, one):
    """Packed sequences, (tokens, heads, dims): one(q, k, v) -> (out, lse) for each, out (1, length, heads, dims).

    What is in no sequence is not written, neither in the output nor in the gradients: NaN stands there.
    """
    assert q.dim() == k.dim() == v.dim() == 3 and len(cu_q) == len(cu_kv) > 1
    for cu, total, longest in ((cu_q, len(q), max_q), (cu_kv, len(k), max_kv)):
        assert cu.dtype is torch.int32 and cu.is_contiguous() and cu[0] == 0 and cu[-1] <= total, "out of bounds"
        assert cu.diff().min() >= 0 and int(cu.diff().max()) <= longest, "rows beyond the longest are not computed"
    q, k, v = (Unwritten.apply(x, int(cu[-1])) for x, cu in ((q, cu_q), (k, cu_kv), (v, cu_kv)))
    outs, lses = [], []
    for n in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[n], cu_q[n + 1]), slice(cu_kv[n], cu_kv[n + 1])
        if cu_q[n] < cu_q[n + 1]:
            out, lse = one(q[None, rows], k[None, keys], v[None, keys])
            outs.append(out[0])
            lses.append(lse[0])
    behind = q.new_full((len(q) - int(cu_q[-1]), q.shape[1], v.shape[2]), float("nan"))
    lse = torch.full((q.shape[1], len(behind)), float("nan"))
    return torch.cat([*outs, behind]), torch.cat([*lses, lse], 1)


def in_one_piece(pages, table, lengths, multiple_of=1):
    """The cache (batch, room, heads, dim) that pages make up. What the lengths do not reach is in no page that is looked at."""
    page = pages.shape[1]
    assert (
        table.dtype is torch.int32 and table.is_contiguous() and len(table) == len(lengths) and page % multiple_of == 0
    )
    found = pages.new_zeros(len(table), table.shape[1] * page, *pages.shape[2:])
    for entry, row, n in zip(found, table.tolist(), lengths.tolist(), strict=True):
        for at in range(-(-n // page)):
            entry[at * page : (at + 1) * page] = pages[row[at]]
    return found


class Unwritten(torch.autograd.Function):
    """A tensor whose gradient is not written from some row on."""

    @staticmethod
    def forward(ctx, x, end):
        ctx.end = end
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[ctx.end :] = float("nan")
        return grad, None


def check_half(*tensors) -> None:
    assert len({x.dtype for x in tensors}) == 1 and tensors[0].dtype in (torch.float16, torch.bfloat16)


def check_aligned(*tensors) -> None:
    """What vector loads of 16 bytes need."""
    for x in tensors:
        assert x.stride(-1) == 1 or x.shape[-1] == 1, f"last stride {x.stride(-1)}"
        assert x.data_ptr() % 16 == 0, "misaligned address"
        steps = [st for n, st in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
        assert all(st * x.itemsize % 16 == 0 for st in steps), f"rows at strides {x.stride()}"
