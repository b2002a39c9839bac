"""Random calls in random states of torch, against stock: the same result, or the same type of exception.

Every problem's winner is drawn too, as though it had been tuned: what is tried here is what surrounds the numbers, and any
kernel may win somewhere. A draw depends on nothing but its seed. `-m long` makes 20,000 calls.
"""

from __future__ import annotations

import contextlib
import random
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from changes import changed
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn.dispatch import tune_now
from fastattn.dispatch.session import session
from fastattn.environment.device import Device
from fastattn.planning import candidates
from fastattn.planning.decision import Accepted
from fastattn.verdicts.verdict import Trial, Verdict

STOCK = F.scaled_dot_product_attention
ROUNDOFF = {torch.float64: 2.0**-50, torch.float32: 2.0**-22, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
BLOCK = 250
CALLS, MANY = 1000, 20_000


class Subclass(torch.Tensor):
    """A tensor of a type of its own, without a say."""


class WatchesFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class WatchesOperators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def default_dtype(dtype):
    return changed(torch.get_default_dtype, torch.set_default_dtype, dtype)


def threads(count):
    return changed(torch.get_num_threads, torch.set_num_threads, count)


def deterministic():
    write = partial(torch.use_deterministic_algorithms, warn_only=True)
    return changed(torch.are_deterministic_algorithms_enabled, write, True)


STATES = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", dtype=torch.float16),
    "autocast off": lambda: torch.autocast("cpu", enabled=False),
    "default float64": lambda: default_dtype(torch.float64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device": lambda: torch.device("cpu"),
    "deterministic": deterministic,
    "no oneDNN": lambda: torch.backends.mkldnn.flags(enabled=False),
    "two threads": lambda: threads(2),
    "function mode": WatchesFunctions,
    "dispatch mode": WatchesOperators,
    "saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x),
    "on the CPU": torch.autograd.graph.save_on_cpu,
    "math alone": lambda: sdpa_kernel(SDPBackend.MATH),
    "anomaly": lambda: torch.autograd.detect_anomaly(check_nan=False),
}


def tensor(r: random.Random, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Values in one of many memory layouts."""
    g = torch.Generator().manual_seed(r.randrange(2**31))
    x = torch.randn(shape, generator=g, dtype=torch.float32, device="cpu").to(dtype)
    how = r.choice(["plain"] * 4 + ["transposed", "gap", "offset", "expanded", "last dim", "negative"])
    if how == "transposed" and x.dim() >= 3:
        return x.transpose(-2, -3).contiguous().transpose(-2, -3)
    if how == "gap":
        return torch.cat([x, x], -1)[..., : x.shape[-1]]
    if how == "offset":
        return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)
    if how == "expanded" and x.dim() >= 3:
        return x[..., :1, :, :].expand(x.shape)
    if how == "last dim":
        return x.mT.contiguous().mT
    return x


def drawn(seed: int) -> tuple[list[Any], dict[str, Any], list[str]]:
    """(q, k, v), the other arguments, and the states to be in."""
    r = random.Random(seed)
    dtype = r.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64])
    heads = r.choice([1, 2, 4])
    kv_heads = r.choice([heads, heads, heads, 1, 2])
    q_len, kv_len, d = r.choice([1, 1, 3, 8, 17]), r.choice([1, 8, 17, 33]), r.choice([8, 8, 16, 5])
    batch = r.choice([[2], [2], [2], [1], [], [2, 2]])
    q, k, v = (tensor(r, [*batch, h, n, d], dtype) for h, n in ((heads, q_len), (kv_heads, kv_len), (kv_heads, kv_len)))
    options: dict[str, Any] = {}
    if r.random() < 0.45:
        shape = r.choice([[q_len, kv_len], [1, kv_len], [*batch, 1, q_len, kv_len], [*batch, heads, q_len, kv_len]])
        mask_dtype = r.choice([torch.bool, torch.bool, dtype, dtype if dtype is torch.float64 else torch.float32])
        mask = tensor(r, shape, torch.float32)
        options["attn_mask"] = mask > -1 if mask_dtype is torch.bool else mask.to(mask_dtype)
    if r.random() < 0.3:
        options["is_causal"] = r.choice([True, True, False])
    if r.random() < 0.3:
        options["scale"] = r.choice([0.3, 1, 1.0, None, 2.5])
    if kv_heads != heads or r.random() < 0.1:
        options["enable_gqa"] = r.random() < 0.8
    if r.random() < 0.1:
        options["dropout_p"] = r.choice([0.0, 0])
    spoilt = r.random()
    if spoilt < 0.04:
        k = k.to(torch.float16 if dtype is not torch.float16 else torch.float32)
    elif spoilt < 0.08:
        v = v[..., :-1, :] if kv_len > 1 else v[..., None]
    elif spoilt < 0.10:
        options[r.choice(["scale", "is_causal", "attn_mask"])] = r.choice(["x", 3 + 0j, object()])
    elif spoilt < 0.12:
        q = q[..., :-1]
    grads = [x.requires_grad_() if r.random() < 0.3 and type(x) is torch.Tensor else x for x in (q, k, v)]
    if r.random() < 0.06:
        at = r.randrange(3)
        grads[at] = grads[at].detach().as_subclass(Subclass)
    states = [name for name in r.sample(sorted(STATES), r.choice([0, 0, 1, 1, 2])) if r.random() < 0.9]
    return grads, options, states


def outcome(call: Any, given: list[Any], options: dict[str, Any], states: list[str]) -> Any:
    """(output, gradients), or the exception's type."""
    leaves = [x for x in given if x.requires_grad]
    with contextlib.ExitStack() as stack:
        try:
            for state in states:
                stack.enter_context(STATES[state]())
            out = call(*given, **options)
            if not out.requires_grad:
                return out, ()
            upstream = torch.ones_like(out)
            return out, torch.autograd.grad(out, leaves, upstream, allow_unused=True)
        except Exception as error:
            return type(error)


def differs(found: Any, want: Any, exact: Any, size: float) -> str | None:
    """In what a result is not the stock one: its kind, or values that lie further from float64's than a kernel may."""
    if isinstance(found, type) or isinstance(want, type):
        return None if found is want else f"{found} instead of {want}"
    for name, a, b, c in zip(["out", "dq", "dk", "dv"], *((x[0], *x[1]) for x in (found, want, exact))):
        if (a is None) != (b is None):
            return f"{name} is {a} instead of {b}"
        if a is None:
            continue
        if (type(a), a.dtype, a.shape, a.requires_grad, a.is_inference()) != (
            type(b), b.dtype, b.shape, b.requires_grad, b.is_inference(),
        ):  # fmt: skip
            return f"{name} is {type(a)} {a.dtype} {a.shape}, not {type(b)} {b.dtype} {b.shape}"
        a, b, c = (x.detach().as_subclass(torch.Tensor).double() for x in (a, b, c))
        off, stock = (float((x - c).abs().max()) for x in (a, b))
        if not off <= 4 * stock + 8 * ROUNDOFF[want[0].dtype] * size:
            return f"{name} is off by {off:.3g}, stock by {stock:.3g}"
    return None


def run(seed: int) -> str | None:
    """One call in its states: None, or what is wrong with it."""
    given, options, states = drawn(seed)
    want = outcome(STOCK, given, options, states)
    with fastattn.patch():
        found = [outcome(F.scaled_dot_product_attention, given, options, states) for _ in range(2)]  # a miss and a hit
    if isinstance(want, type):
        exact = want
    else:
        wide = [x.detach().as_subclass(torch.Tensor).double().requires_grad_(x.requires_grad) for x in given]
        mask = options.get("attn_mask")
        more = {"attn_mask": mask if mask is None or mask.dtype is torch.bool else mask.double()}
        exact = outcome(STOCK, wide, {**options, **more}, [s for s in states if s == "no_grad" or s == "inference"])
    size = 1.0 if isinstance(want, type) else sum(float(x.detach().abs().max()) for x in given) ** 2
    for which, one in zip(("first", "second"), found):
        if why := differs(one, want, exact, size):
            return f"seed {seed}, {which} call: {why}; {[(tuple(x.shape), x.dtype) for x in given]} {options.keys()} {states}"
    return None


@pytest.fixture(autouse=True)
def drawn_winners(monkeypatch):
    """A problem's first call draws its winner; nothing is timed or verified."""

    def tune(problem, settings, on=None, **_):
        device = Device.of(torch.device(problem.device))
        found = [d.name for d in candidates.decisions(problem, device, settings) if isinstance(d, Accepted)]
        found = [name for name in found if not name.startswith("flex")]
        r = random.Random(problem.digest)
        winner = r.choice(sorted(found))
        trials = tuple(Trial(name, time_us=1.0 if name == winner else 2.0) for name in found)
        verdict = Verdict(problem, winner, trials)
        session.keep(verdict, settings, device, on_disk=False)
        return verdict

    monkeypatch.setattr(tune_now, "tune_and_keep", tune)
    with threads(1):
        yield


def hold_all(start: int) -> None:
    wrong = [why for seed in range(start, start + BLOCK) if (why := run(seed))]
    assert not wrong, f"{len(wrong)} of {BLOCK}: " + "\n".join(wrong[:8])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("start", range(0, CALLS, BLOCK))
def test_random_calls_in_random_states_are_stocks(start):
    hold_all(start)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("start", range(CALLS, MANY, BLOCK))
def test_many_random_calls_in_random_states_are_stocks(start):
    hold_all(start)


def test_the_draw_reaches_every_state_and_both_outcomes():
    """1,000 draws use every state, alone and with another one; of 200 a tenth at least is refused by stock, and half is not."""
    draws = [drawn(seed) for seed in range(CALLS)]
    states = [some for _, _, some in draws]
    assert {name for some in states for name in some} == set(STATES) and any(len(some) == 2 for some in states)
    refused = [isinstance(outcome(STOCK, given, options, []), type) for given, options, _ in draws[:200]]
    assert 20 <= sum(refused) <= 100
