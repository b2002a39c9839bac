"""Shared by tests: inputs in every layout and memory form, and a float64 attention written for the tests alone.

`Expected` follows the rule in the docstring of tuning/accuracy/judge.py and shares no code with
tuning/accuracy/reference.py: heads are expanded, what is hidden is one dense bool tensor, and gradients come from autograd.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from fastattn.environment.device import Device
from fastattn.environment.settings import current_settings
from fastattn.planning import candidates
from fastattn.planning.decision import Accepted
from fastattn.problems import call_key, call_options, masks
from fastattn.problems.classify import classify

ROUNDOFF = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24, torch.float64: 2**-53}
HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
CPU = Device.of(torch.device("cpu"))


def name_of(x) -> str:
    return str(x).removeprefix("torch.")


# --- memory: a (b, h, s, d) view of Gaussian numbers, by how it lies


def _room(shape, order, room_after=None):
    """A (b, h, s, d) view of memory ordered as `order` says, with room behind one dimension."""
    sizes = dict(zip("bhsd", shape, strict=True))
    wide = torch.randn([sizes[n] + 3 * (n == room_after) for n in order])
    cut = wide[tuple(slice(0, sizes[n]) for n in order)]
    return cut.permute([order.index(n) for n in "bhsd"])


MEMORY = {
    "contiguous": lambda *shape: _room(shape, "bhsd"),
    "transposed": lambda *shape: _room(shape, "bshd"),
    "seq_first": lambda *shape: _room(shape, "sbhd"),
    "cache": lambda *shape: _room(shape, "bhsd", "s"),
    "cache_bshd": lambda *shape: _room(shape, "bshd", "s"),
    "packed": lambda *shape: _room(shape, "bshd", "h"),
    "packed_dims": lambda *shape: _room(shape, "bshd", "d"),  # (b, s, h, 3, d), as some models pack
    "every_second_row": lambda b, h, s, d: torch.randn(b, h, 2 * s, d)[:, :, ::2],
    "expanded_batch": lambda b, h, s, d: torch.randn(1, h, s, d).expand(b, h, s, d),
    "expanded_heads": lambda b, h, s, d: torch.randn(b, 1, s, d).expand(b, h, s, d),
    "last_stride_2": lambda b, h, s, d: torch.randn(b, h, s, 2 * d)[..., ::2],
    "dims_before_rows": lambda *shape: _room(shape, "bhds"),
}


def to(layout, x):
    """A (b, h, s, d) tensor as a view in `layout`."""
    return x.permute(["bhsd".index(n) for n in layout])


def back(layout, x):
    """A tensor in `layout` as a (b, h, s, d) view."""
    return x.permute([layout.index(n) for n in "bhsd"])


def keep_strides(x, dtype):
    """The same numbers in another dtype, in memory that lies the same way (strides of 0 and gaps included)."""
    flat = torch.as_strided(x, (x.untyped_storage().nbytes() // x.itemsize,), (1,), 0)
    return torch.as_strided(flat.to(dtype), x.shape, x.stride(), x.storage_offset())


def qkv(b=2, hq=4, hkv=None, sq=19, skv=None, d=16, dv=None, *, dtype=torch.float32, memory="contiguous", layout="bhsd",
        grad=False):  # fmt: skip
    """q, k, v in `layout`, their (b, h, s, d) views lying in memory as `memory` says (one name, or one each)."""
    hkv, skv, dv = (hq if hkv is None else hkv), (sq if skv is None else skv), (d if dv is None else dv)
    forms = (memory,) * 3 if isinstance(memory, str) else memory
    shapes = ((b, hq, sq, d), (b, hkv, skv, d), (b, hkv, skv, dv))
    made = [to(layout, keep_strides(MEMORY[m](*shape), dtype)) for m, shape in zip(forms, shapes, strict=True)]
    return [x.requires_grad_() for x in made] if grad else made


def mask_of(letters, kind, b, h, sq, skv):
    """A mask whose dimensions not in `letters` are 1, e.g. "b11k"; `kind` is a dtype. Every third row is empty."""
    sizes = {"b": b, "h": h, "q": sq, "k": skv, "1": 1}
    shape = [sizes[n] for n in letters]
    visible = torch.rand(shape) < 0.7
    if letters[-1] == "k" and skv:
        visible[..., 0] = True
    if letters[-2] == "q":
        visible[..., 1::3, :] = False
    if kind is torch.bool:
        return visible
    return torch.randn(shape).masked_fill(~visible, float("-inf")).to(kind)


# --- what is right


@dataclass
class Expected:
    """softmax(scale q k^T + mask) v and its gradients in float64, with the budgets of a rung around them.

    q, k, v in `layout`, in the dtype that is computed in; corners: the triangles drawn ("top_left", "bottom_right").
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None = None
    layout: str = "bhsd"
    scale: float | None = None
    corners: tuple[str, ...] = ()
    grad: torch.Tensor | None = None  # upstream, in `layout`
    window: tuple[int, int] | None = None
    softcap: float = 0.0

    def __post_init__(self):
        self.q, self.k, self.v = (back(self.layout, x.detach()) for x in (self.q, self.k, self.v))
        self.b, self.hq, self.sq, self.d = self.q.shape
        self.hkv, self.skv, self.dv = self.v.shape[1:]
        self.dtype = self.q.dtype
        self.u = ROUNDOFF[self.dtype]
        self.group = self.hq // self.hkv if self.hkv else 1
        self.scale = self.d**-0.5 if self.scale is None else self.scale
        shape = (self.b, self.hq, self.sq, self.skv)
        self.hidden = torch.zeros(shape, dtype=torch.bool)
        i, j = torch.arange(self.sq)[:, None], torch.arange(self.skv)[None]
        if "top_left" in self.corners:
            self.hidden |= j > i
        if "bottom_right" in self.corners:
            self.hidden |= j > i + self.skv - self.sq
        if self.window is not None:
            at = self.skv - self.sq if "bottom_right" in self.corners else 0
            left, right = (n if n is not None and n >= 0 else 10**6 for n in self.window)
            self.hidden |= (j < i + at - left) | (j > i + at + right)
        self.bias = None
        if self.mask is not None:
            mask = self.mask.detach()
            self.hidden |= ~mask if mask.dtype is torch.bool else mask == float("-inf")
            self.bias = None if mask.dtype is torch.bool else mask.masked_fill(mask == float("-inf"), 0)

    def _compute(self, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (self.q, self.k, self.v)]
        bias = None if self.bias is None else self.bias.to(dtype).requires_grad_()
        q, k, v = leaves[0], *(x.repeat_interleave(self.group, 1) for x in leaves[1:])
        scores = q @ k.mT * self.scale
        cap = torch.tanh(scores / self.softcap) if self.softcap else None
        scores = scores if cap is None else self.softcap * cap
        scores = scores if bias is None else scores + bias
        empty = self.hidden.all(-1, keepdim=True)
        scores = scores.masked_fill(self.hidden, float("-inf")).masked_fill(empty, 0.0)
        weights = scores.softmax(-1).masked_fill(self.hidden, 0.0)
        out = weights @ v
        found = {
            "out": out.detach(),
            "scores": scores.detach(),
            "weights": weights.detach(),
            "k": k.detach(),
            "v": v.detach(),
        }
        found["slope"] = 1.0 if cap is None else 1 - cap.detach().square()
        found["lse"] = scores.detach().masked_fill(self.hidden, float("-inf")).logsumexp(-1)
        if self.grad is not None:
            grad = back(self.layout, self.grad).to(dtype)
            wanted = leaves if bias is None else [*leaves, bias]
            grads = torch.autograd.grad(out, wanted, grad)
            found |= dict(zip(("dq", "dk", "dv", "dmask"), grads, strict=False))
        return found

    @cached_property
    def exact(self):
        return self._compute(torch.float64)

    @cached_property
    def rounded(self):
        return self._compute(torch.float32)

    @cached_property
    def plain(self):
        return self._compute(self.dtype)

    @cached_property
    def _noise(self):
        """S_i, where it is felt: float32 inputs."""
        return torch.zeros(self.b, self.hq, self.sq, dtype=torch.float64) if self.dtype in HALF else self._sizes

    @cached_property
    def _sizes(self):
        """S_i: how large the terms of a row's scores are."""
        sizes = self.q.double().abs() @ self.exact["k"].abs().mT * abs(self.scale)
        sizes = sizes if self.bias is None else sizes + self.bias.double().abs()
        return (sizes * self.exact["weights"]).sum(-1)

    def _e(self, name):
        return (self.rounded[name].to(self.dtype).double() - self.exact[name]).abs()

    @cached_property
    def _none(self):
        """Rows that may attend to nothing."""
        return self.hidden.all(-1)

    @cached_property
    def _spread(self):
        return (self.exact["weights"] @ self.exact["v"].abs()).amax(-1)

    @cached_property
    def _row_budgets(self):
        c = 2 if self.dtype in HALF else 4
        return c * (self._e("out").amax(-1) + (self.u + 2**-23 * self._noise) * self._spread)

    @cached_property
    def _plain_row_budgets(self):
        plain = (self.plain["out"].double() - self.exact["out"]).abs()
        return 2 * (plain.amax((2, 3), keepdim=True)[..., 0] + self.u * self._spread)

    def forward(self, out, rung="exact"):
        """The largest error of `out` (in `layout`) in budgets."""
        assert tuple(out.shape) == tuple(to(self.layout, torch.empty(self.b, self.hq, self.sq, self.dv)).shape)
        assert out.dtype is self.dtype
        budgets = self._plain_row_budgets if rung == "dtype" else self._row_budgets
        return _worst((back(self.layout, out.detach()).double() - self.exact["out"]).abs().amax(-1), budgets)

    @cached_property
    def _log_sum_budgets(self):
        want = self.exact["lse"]
        e32 = (self.rounded["lse"].double() - want).masked_fill(self._none, 0.0).abs()
        return 4 * (e32 + 2**-24 * (1 + want.masked_fill(self._none, 0.0).abs() + self._sizes))

    def log_sum(self, lse):
        """The largest error of a log-sum-exp (b, h, s) in budgets."""
        assert lse.dtype is torch.float32 and lse.shape == (self.b, self.hq, self.sq)
        lse = lse.detach()
        assert torch.equal(lse == float("-inf"), self._none)
        return _worst((lse.double() - self.exact["lse"]).masked_fill(self._none, 0.0).abs(), self._log_sum_budgets)

    @cached_property
    def _gradient_budgets(self):
        """(b, hkv) of dq, dk and dv; of dmask, where there is one, a number."""
        x, w, s = self.exact, self.exact["weights"], abs(self.scale)
        grad = back(self.layout, self.grad).double()
        lse = x["scores"].logsumexp(-1).abs().masked_fill(self._none, 0.0)
        size = self._per_kv_head(torch.maximum(lse, self._noise)[..., None])
        terms = grad * x["out"]
        dscores = (grad @ x["v"].mT - terms.sum(-1, keepdim=True)) * w
        if self.dtype in HALF:
            # delta = sum_d o_d do_d is taken from an output whose terms were rounded, P and dS are rounded before products
            delta = terms.square().sum(-1, keepdim=True).sqrt() * w
            both = delta.square() + (dscores * x["slope"]).square()
            of_q = (delta.sum(-1, keepdim=True) * (w @ x["k"])).square() + (dscores * x["slope"]).square() @ x[
                "k"
            ].square()
            cancel_q = s * self.u * self._per_kv_head(of_q).sqrt()
            cancel_k = s * self.u * self._heads_sum(both.mT @ self.q.double().square()).sqrt()
            cancel_v = self.u * self._heads_sum(w.square().mT @ grad.square(), self.dv).sqrt()
        else:
            delta = (grad.abs() @ x["v"].abs().mT + terms.abs().sum(-1, keepdim=True)) * w
            most = s * self.u * (1 + size)
            cancel_q = most * self._per_kv_head(delta @ x["k"].abs())
            cancel_k = most * self._heads_sum(delta.mT @ self.q.double().abs())
            cancel_v = self.u * (1 + size) * self._heads_sum(w.mT @ grad.abs(), self.dv)
        found = {}
        for name, cancelling in (("dq", cancel_q), ("dk", cancel_k), ("dv", cancel_v)):
            rounding = (self.u + 2**-24 * size) * self._per_kv_head(x[name].abs())
            found[name] = 3 * (self._per_kv_head(self._e(name)) + rounding + cancelling)
        if self.bias is not None and self.bias.numel():
            sizes = dscores.abs() + delta if self.dtype in HALF else delta
            sizes = sizes.sum_to_size((1,) * (4 - self.bias.dim()) + self.bias.shape)
            most = float(size.max()) if size.numel() else 0.0
            found["dmask"] = 3 * (self.u + min(2**-24, self.u) * most) * sizes.amax()
        return found

    def backward(self, dq, dk, dv, dmask=None):
        """The largest error of the gradients (in `layout`) in budgets."""
        worst = 0.0
        for name, got in (("dq", dq), ("dk", dk), ("dv", dv)):
            error = self._per_kv_head((back(self.layout, got).double() - self.exact[name]).abs())
            worst = max(worst, _worst(error, self._gradient_budgets[name]))
        if dmask is not None:
            error = (dmask.double() - self.exact["dmask"]).abs()
            error = error.masked_fill(self.mask.detach() == float("-inf"), 0.0)
            worst = max(worst, _worst(error, self._gradient_budgets["dmask"]))
        return worst

    def _per_kv_head(self, x):
        """(b, hkv) maxima of a (b, hq or hkv, rows, dims) tensor."""
        return x.reshape(self.b, self.hkv, -1).amax(-1) if x.numel() else x.new_zeros(self.b, self.hkv)

    def _heads_sum(self, x, width=None):
        return self._per_kv_head(x.reshape(self.b, self.hkv, self.group, self.skv, width or self.d).sum(2))


def _worst(error, budget):
    if not error.numel():
        return 0.0
    ratio = torch.where(error == 0, 0.0, error / budget).detach()
    return float(ratio.nan_to_num(nan=float("inf")).max())


def expect(q, k, v, mask=None, *, layout="bhsd", scale=None, corners=(), cast=None, window=None, softcap=0.0):
    """The Expected of a call with these arguments, under autocast to `cast`, with an upstream gradient where q asks for one."""
    dtype = cast or q.dtype
    dense = mask if type(mask) is torch.Tensor else None
    if cast and dense is not None and dense.dtype is not torch.bool:
        dense = dense.to(cast)
    grad = None
    if q.requires_grad and torch.is_grad_enabled():
        b, h, s, _ = back(layout, q).shape
        grad = to(layout, torch.randn(b, h, s, back(layout, v).shape[3])).to(dtype)
    return Expected(q.to(dtype), k.to(dtype), v.to(dtype), dense, layout, scale, corners, grad, window, softcap)


def hold(want, call, q, k, v, mask=None, rung="exact"):
    """Hold `call(q, k, v, mask)`, with its gradients where there is an upstream one, to float64. Returns the output."""
    found = call(q, k, v, mask)
    out, lse = found if isinstance(found, tuple) else (found, None)
    if lse is not None:
        assert (error := want.log_sum(lse)) <= 1.0, f"lse {error:.2f} budgets"
    forward = want.forward(out, rung)
    assert forward <= 1.0, f"forward {forward:.2f} budgets"
    if want.grad is not None:
        leaves = [q, k, v, *([mask] if type(mask) is torch.Tensor and mask.requires_grad else [])]
        found = torch.autograd.grad(out, leaves, want.grad)
        assert [g.dtype for g in found] == [x.dtype for x in leaves]
        backward = want.backward(*found)
        assert backward <= 1.0, f"backward {backward:.2f} budgets"
    return out


def classified(q, k, v, mask=None, layout="bhsd", **options):
    """The Problem and the CallFacts of a call."""
    key = call_key.call_key(q, k, v, mask, layout, call_options.parse_options(options))
    return classify(key, current_settings().accuracy)


def problem_of(q, k, v, mask=None, layout="bhsd", **options):
    """The Problem of a call."""
    return classified(q, k, v, mask, layout, **options)[0]


def facts_of(q, k, v, mask=None, layout="bhsd", **options):
    """The CallFacts of a call."""
    return classified(q, k, v, mask, layout, **options)[1]


def accepted(q, k, v, mask=None, layout="bhsd", **options) -> list[str]:
    """Names of the candidates that can do a call."""
    found = candidates.decisions(problem_of(q, k, v, mask, layout, **options), CPU, current_settings())
    return [d.name for d in found if isinstance(d, Accepted)]


def rung_of(candidate: str, dtype: torch.dtype) -> str:
    """What a candidate can be held to: plain matmul rounds its scores to half precision."""
    parts = candidate.split("+")
    return "dtype" if dtype in HALF and parts[0] == "matmul" and "fp32" not in parts else "exact"


def lse_is_coarse(candidate: str, dtype: torch.dtype) -> bool:
    """Whether the gate refuses its log-sum-exp in half dtypes, measured: torch's CPU flash takes a cheap exp there (3e-5 off),
    plain matmul has scores in half precision.
    """
    parts = candidate.split("+")
    return dtype in HALF and parts[0] in ("matmul", "torch_flash") and "fp32" not in parts


def without_lse(call):
    """The call, but for its log-sum-exp."""
    return lambda *given: call(*given)[0]


def corner(mask, is_causal=False) -> tuple[str, ...]:
    """The triangles that a call draws."""
    value = call_key.as_structured(mask)
    return (*((value.corner,) if isinstance(value, masks.Causal) else ()), *(("top_left",) if is_causal else ()))
