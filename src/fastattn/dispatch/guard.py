"""The guard of one hot-path entry: a generated function guard(q, k, v, m, layout, kw) that returns the Call or None.

It is generated so that each entry reads just the state its plan depends on. What TensorGuards does not see is read beside
it: nested tensors before it (it aborts the process on a strided one), repeated tensors by identity, grad mode where an
input asks for a gradient, modes, forward-mode AD, autocast's dtype. It never calls what it returns, so that nothing can
mistake an error of the kernel for a miss. Costs are in docs/how-it-works.md; `benchmarks/overhead.py` measures them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastattn.dispatch.guard_conditions import alignment_conditions, mask_condition, option_conditions
from fastattn.environment import torch_private, torch_switches
from fastattn.environment.settings import scoped_settings

if TYPE_CHECKING:
    from fastattn.dispatch.resolve import Resolved

Guard = Callable[..., Any]
LeadsTo = tuple[str, str, float]  # (candidate, why the call is passed on or "", what a call saves in us)
Sizes = dict[str, int]  # tensor name -> dimension whose size is free

# State a plan may depend on beside its tensors: how to read it.
READERS: dict[str, Callable[[], Any]] = {
    "deterministic": torch_private.deterministic,
    "grad": torch.is_grad_enabled,
    "threads": torch.get_num_threads,
    "unrestricted": torch_private.not_inside_sdpa_kernel,
    **torch_private.BACKEND_SWITCHES,
    **torch_switches.READERS,
    "autocast_cpu": lambda: torch.get_autocast_dtype("cpu"),
    "autocast_cuda": lambda: torch.get_autocast_dtype("cuda"),
}


_NO_NAME = re.compile(r"\W")


def _moving_strides(x: Tensor, dim: int) -> list[int]:
    """Dimensions whose stride follows the length of `dim`: those that step over all of it."""
    step = x.stride(dim) * x.shape[dim]
    return [i for i, stride in enumerate(x.stride()) if i != dim and stride and stride % step == 0]


def _native(tensors: list[Tensor], free: dict[int, int], any_sizes: bool = False) -> Callable[..., bool]:
    sizes: list[list[int | None]] = [[None] * x.dim() if any_sizes else list(x.shape) for x in tensors]
    strides: list[list[int | None]] = [[None] * x.dim() if any_sizes else list(x.stride()) for x in tensors]
    for i, dim in free.items():
        sizes[i][dim] = None
        for moving in _moving_strides(tensors[i], dim):
            strides[i][moving] = None
    guards = torch_private.private("tensor_guards")
    return guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check


def _plain(tensors: list[Tensor], free: dict[int, int], any_sizes: bool = False) -> Callable[..., bool]:
    """The stand-in where torch has no TensorGuards: the same answers from public attributes, in some microseconds."""

    def facts(x: Any, dim: int | None, moving: list[int]) -> tuple[Any, ...]:
        shape, stride = ([], [x.dim()]) if any_sizes else (list(x.shape), list(x.stride()))
        if dim is not None and x.dim() > dim:
            for i in moving:
                stride[i] = -1
            shape[dim] = -1
        keys = (x.is_conj(), x.is_neg(), x.is_inference(), x.requires_grad, x.layout)
        return (type(x), shape, stride, x.dtype, x.device, keys)

    def switches() -> tuple[Any, ...]:
        on = torch.is_autocast_enabled
        tracing = torch.jit.is_tracing()
        return (torch.is_inference_mode_enabled(), on("cpu"), on("cuda"), torch_private.functorch_level(), tracing)

    dims = [free.get(i) for i in range(len(tensors))]
    moving = [[] if dim is None else _moving_strides(x, dim) for x, dim in zip(tensors, dims, strict=True)]
    want = list(map(facts, tensors, dims, moving))
    state = switches()

    def check(*given: Any) -> bool:
        return state == switches() and all(f == w for f, w in zip(map(facts, given, dims, moving), want, strict=True))

    return check


def _native_works() -> bool:
    """Whether TensorGuards of this torch tells apart all that the guards rely on."""
    try:
        zeros = partial(torch.zeros, dtype=torch.float32, device="cpu")
        a, b = zeros(2, 3, 4), zeros(2, 3, 4)
        check = _native([a, b], {})
        other = [a.double(), zeros(2, 3, 5), zeros(2, 4, 3).mT, a.clone().requires_grad_(), a[:, :2],
                 torch.nn.Parameter(a.clone(), False), torch._neg_view(a), 1]  # fmt: skip
        ok = check(b, a) and not any(check(x, b) for x in other)
        with torch.inference_mode():
            ok = ok and not check(a, b)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ok = ok and not check(a, b)
        free = _native([a], {0: 1})
        return ok and free(zeros(2, 9, 4)) and not free(zeros(2, 3, 5))
    except Exception:
        return False


NATIVE = _native_works()


def build_guard(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    layout: str,
    kw: Any,
    resolved: Resolved,
    kv_lens: tuple[int, int, int] | None,
) -> Guard:
    """The guard of an entry made by this very call.

    resolved.reads: names of READERS whose present value its Call depends on. resolved.any_sizes: it serves tensors of every
    size with as many dimensions, as nothing was decided by a size. kv_lens: (dimension of the length in k and v,
    lowest, highest kv_len) for which the Call serves; k and v must then be distinct tensors of one length.
    """
    conditions: list[str] = []
    hits = count()
    values: dict[str, Any] = {"call": resolved.call, "LAYOUT": layout, "SCOPE": scoped_settings(), "hit": hits.__next__}
    unique: dict[str, Tensor] = {}
    seen: dict[int, str] = {}
    for name, x in (("q", q), ("k", k), ("v", v), ("m", mask)):
        if not isinstance(x, Tensor):
            conditions.append(mask_condition(x, k, layout, kv_lens is not None, values))
        elif name == "m":
            values["MASK_CLASS"] = type(x)
            conditions.append("m.__class__ is MASK_CLASS")
            if id(x) not in seen:
                unique[name] = x
            else:
                conditions.append(f"m is {seen[id(x)]}")
        elif id(x) in seen:
            conditions.append(f"{name} is {seen[id(x)]}")
        else:
            seen[id(x)] = name
            unique[name] = x
    conditions += ["layout == LAYOUT", *option_conditions(kw, values)]
    names = ", ".join(unique)
    # a default device changes where tensors are made, which no Call leaves to chance
    mode = "only_default_device()" if torch_private.only_default_device() else f"not has_torch_function({names})"
    conditions += [mode, "not dispatch_modes()", "forward_ad._current_level < 0"]
    conditions += [f"not {name}.is_nested" for name in unique]
    free: Sizes = {}
    if kv_lens is not None:
        dim, low, high = kv_lens
        free = {"k": dim, "v": dim}
        grows = [("k", k), ("v", v)]
        if "m" in unique and mask.shape[-1] == k.shape[dim]:  # a dense mask grows with its keys
            free["m"] = mask.dim() - 1
            grows.append(("m", mask))
            values["M_BYTES"] = mask.nbytes
            conditions.append("m.nbytes * K_BYTES == k.nbytes * M_BYTES")
        unit = k.nbytes // k.shape[dim]
        values.update(LOW=low * unit, HIGH=high * unit, K_BYTES=k.nbytes, V_BYTES=v.nbytes)
        conditions.append("LOW <= k.nbytes <= HIGH")
        conditions.append(
            "v.nbytes == k.nbytes" if v.nbytes == k.nbytes else "v.nbytes * K_BYTES == k.nbytes * V_BYTES"
        )
        # Strides that follow the length are free; a contiguous tensor stays one, so that they cannot become 0.
        conditions += [f"{name}.is_contiguous()" for name, x in grows if x.is_contiguous()]
    conditions.append(f"check({names})")
    conditions += alignment_conditions(unique) if resolved.reads_alignment else []
    conditions += [_state_condition(name, READERS[name](), values) for name in resolved.reads]
    make = _native if NATIVE else _plain
    at = {i: free[n] for i, n in enumerate(unique) if n in free}
    values["check"] = make(list(unique.values()), at, resolved.any_sizes)
    conditions.append("scope() is SCOPE")
    guard = _maker(tuple(values), " and ".join(conditions))(**values, **_CONSTANTS)
    leads_to = resolved.candidate, resolved.passed_on, resolved.saves_us
    guard.hits, guard.leads_to, guard.otherwise = hits, leads_to, resolved.otherwise  # type: ignore[attr-defined]
    return guard


def hits_of(guard: Any) -> Iterator[tuple[LeadsTo, int]]:
    """(what the entry leads to, how often it was hit); both candidates where each call's mask decides between two.

    The verdict's own may be at -1: the miss that made the entry was counted for it, and its mask chose the other.
    """
    hits = _counted(guard.hits)
    if guard.otherwise is not None:
        leads_to, calls = guard.otherwise
        others = _counted(calls)
        yield leads_to, others
        hits -= others
    yield guard.leads_to, hits


def _counted(counter: Iterator[int]) -> int:
    """How far an itertools.count() is, which only its text tells."""
    return int(repr(counter)[len("count(") : -1])


def _state_condition(name: str, value: Any, values: dict[str, Any]) -> str:
    at = _NO_NAME.sub("_", name)
    values[f"read_{at}"] = READERS[name]
    if isinstance(value, bool):
        return f"read_{at}()" if value else f"not read_{at}()"
    values[f"WANT_{at}"] = value
    return f"read_{at}() == WANT_{at}"


_CONSTANTS = {
    "scope": scoped_settings,
    "has_torch_function": torch_private.has_torch_function,
    "dispatch_modes": torch_private.dispatch_modes,
    "only_default_device": torch_private.only_default_device,
    "forward_ad": torch_private.forward_ad,
}


@lru_cache(512)
def _maker(names: tuple[str, ...], condition: str) -> Callable[..., Guard]:
    """Compiled once per shape of condition: building a bucket-mate's guard must stay cheap."""
    arguments = ", ".join((*names, *_CONSTANTS))
    source = (
        f"def make({arguments}):\n    def guard(q, k, v, m, layout, kw):\n"
        f"        if {condition}:\n            hit()\n            return call\n    return guard\n"
    )
    scope: dict[str, Any] = {}
    exec(source, scope)
    return scope["make"]
