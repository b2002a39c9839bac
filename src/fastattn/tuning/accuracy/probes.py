"""Tensors made from a Problem alone: plain ones to time with, and the probes, data that breaks kernels, to check with.

Tuning uses the caller's tensors only for one last check (tuning/callers_tensors.py), so that first-call tuning and
`fastattn tune` are one path. Nothing here touches torch's global random state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastattn.problems.layouts import from_bhsd, strides_of_class
from fastattn.problems.masks import Mask
from fastattn.problems.problem import Problem, default_scale
from fastattn.tuning.accuracy.patterns import Pattern, half_visible, random_visible
from fastattn.tuning.accuracy.sample import Sample


def stand_in_scale(p: Problem) -> float:
    """The scale that stands for the problem's: the sign is part of the problem, the value is not."""
    return {"positive": 1.0, "zero": 0.0, "negative": -1.0}[p.scale] * default_scale(p.head_dim)


def plain_sample(p: Problem, device: torch.device, seed: int = 0) -> Sample:
    """Gaussian tensors at the problem's own size and strides."""
    g = torch.Generator(device).manual_seed(seed)
    q = _repeated(g, (p.batch, p.q_heads, p.q_len, p.head_dim), p.torch_dtype)
    k = _repeated(g, (p.batch, p.kv_heads, p.kv_len, p.head_dim), p.torch_dtype)
    v = _repeated(g, (p.batch, p.kv_heads, p.kv_len, p.head_dim_v), p.torch_dtype)
    return _sample(p, g, q, k, v, _mask(p, g, None, half_visible))


def probe_problem(p: Problem) -> Problem:
    """The problem that is checked: the same but for batch 1, one kv head for each probe (so none can be expanded), and lengths
    of a bounded size (checked_lengths).
    """
    count = len(PROBES) - (0 if p.mask or p.causal else 1)
    q, k, v = ("contiguous" if cls == "expanded" else cls for cls in p.strides)
    q_len, kv_len = checked_lengths(p, count)
    return p.replace(batch=1, kv_heads=count, q_heads=count * p.group, q_len=q_len, kv_len=kv_len, strides=(q, k, v))


def checked_lengths(p: Problem, count: int) -> tuple[int, int]:
    """(q_len, kv_len) of the probes: whatever the problem's own, checking takes a bounded time and memory.

    Long ones keep their remainder by the powers of two up to half the bound, on which a tail depends; which of both is the
    longer, on which the causal corner does; and twice the span of a window. What happens at the full length is looked at
    there (full_size.py).
    """
    row = count * (p.group + 2) * max(p.head_dim, p.head_dim_v) * 4  # bytes of q, k and v in float32
    most = next((n for n in (2048, 1024) if n * row <= PROBE_BYTES), 512) if not p.structure else 2048
    span = 2 * sum(n for n in p.window or () if n > 0) + 2
    most = max(most, 1 << (span - 1).bit_length())
    q_len, kv_len = _shortened(p.q_len, most), _shortened(p.kv_len, most)
    if p.q_len < p.kv_len and q_len >= kv_len:
        kv_len += most // 2
    elif p.q_len > p.kv_len and q_len <= kv_len:
        q_len += most // 2
    return q_len, kv_len


def _shortened(n: int, most: int) -> int:
    return n if n <= most else most - -n % (most // 2)


PROBE_BYTES = 48 * 2**20


def probe_sample(p: Problem, device: torch.device, seed: int = 1, visible: Pattern | None = None) -> Sample:
    """The reduced problem with each probe in a kv head of its own. visible: which pairs a mask leaves, if not random ones."""
    r = probe_problem(p)
    g = torch.Generator(device).manual_seed(seed)
    shape = (r.kv_heads, r.group, r.q_len, r.head_dim)
    q, k = _normal(g, shape, p.torch_dtype), _normal(g, (r.kv_heads, r.kv_len, r.head_dim), p.torch_dtype)
    v = _normal(g, (r.kv_heads, r.kv_len, r.head_dim_v), p.torch_dtype)
    unit = (
        1.0 / (abs(stand_in_scale(p)) * math.sqrt(p.head_dim)) if stand_in_scale(p) else 1.0
    )  # q ~ N(0, unit): scores of deviation 1
    q *= unit
    for head, probe in enumerate(PROBES[: r.kv_heads]):
        probe(g, q[head], k[head], v[head], unit if stand_in_scale(p) >= 0 else -unit)
    q, k, v = q.flatten(0, 1)[None], k[None], v[None]
    return _sample(r, g, q, k, v, _mask(r, g, (q, k), visible or random_visible))


# A probe rewrites the tensors of its kv head: q (g, s, d), k (kv_len, d), v (kv_len, dv). `unit` makes a product with a
# standard normal key score 1, and carries the sign of the scale.


def _gaussian(g: torch.Generator, q: Tensor, k: Tensor, v: Tensor, unit: float) -> None:
    """Scores of standard deviation 1."""


def _wide(g: torch.Generator, q: Tensor, k: Tensor, v: Tensor, unit: float) -> None:
    """Scores of standard deviation 16, which products rounded to half precision cannot hold."""
    q *= 16


def _negative_rows(g: torch.Generator, q: Tensor, k: Tensor, v: Tensor, unit: float) -> None:
    """Some rows score about -300 everywhere: a padding key that slips in as 0 takes the whole row."""
    sign = torch.randint(0, 2, (k.shape[-1],), generator=g, dtype=torch.int64, device=k.device).float() * 2 - 1
    k += 2 * sign
    size = 150 * abs(unit) / math.sqrt(k.shape[-1])
    q[:, :: max(1, q.shape[1] // 16)] = -sign * math.copysign(2 ** round(math.log2(size)), unit)


def _one_hot(g: torch.Generator, q: Tensor, k: Tensor, v: Tensor, unit: float) -> None:
    """Each row looks at one key."""
    chosen = torch.randint(0, k.shape[0], q.shape[:2], generator=g, dtype=torch.int64, device=k.device)
    q[:] = k[chosen] * unit * 50 / math.sqrt(k.shape[-1])


def _sink(g: torch.Generator, q: Tensor, k: Tensor, v: Tensor, unit: float) -> None:
    """The first key holds half the mass, all the others are equal."""
    root = math.sqrt(k.shape[-1])
    k[:] = 0
    k[0] = math.log(max(2, k.shape[0] - 1)) / root
    k -= 4 / root  # equal, not zero
    q[:] = unit


def _last_tile(g: torch.Generator, q: Tensor, k: Tensor, v: Tensor, unit: float) -> None:
    """Large values at the end: a tail that is dropped, or read past, shows."""
    v[-min(16, max(1, k.shape[0] // 2)) :] *= 64


def _hidden_large(g: torch.Generator, q: Tensor, k: Tensor, v: Tensor, unit: float) -> None:
    """The keys that a mask or the triangle hides from some rows score high: they must not set the row's maximum."""
    start = k.shape[0] - max(1, k.shape[0] // 4)
    q[:] = q * 0.25 + 8 * unit / math.sqrt(k.shape[-1])
    k[start:] = 0.25 * k[start:] + 6


PROBES = (_gaussian, _wide, _negative_rows, _one_hot, _sink, _last_tile, _hidden_large)


def _mask(
    p: Problem, g: torch.Generator, cancel: tuple[Tensor, Tensor] | None, pattern: Pattern
) -> Tensor | Mask | None:
    """A mask of the problem's class that leaves the pairs of a pattern; a float one cancels part of the scores."""
    if p.structure:
        return p.told_mask and p.told_mask.of_lengths(p.q_len, p.kv_len, g.device)
    if p.mask is None:
        return None
    sizes = {"b": p.batch, "h": p.q_heads, "q": p.q_len, "k": p.kv_len}
    shape = tuple(sizes[letter] if letter in p.mask_shape else 1 for letter in "bhqk")
    rows_differ = "q" in p.mask_shape and p.q_len > 1
    visible = pattern(p, g, shape)
    if p.mask == "bool":
        return _strided(visible, p.mask_strides)
    bias = _tiled(_normal(g, _drawn(shape), getattr(torch, p.mask)), shape)
    if cancel is not None and rows_differ and "k" in p.mask_shape:
        q, k = cancel
        heads = slice(None) if shape[1] > 1 else slice(p.group, p.group + 1)  # the wide probe
        keys = k.repeat_interleave(p.group, 1)[:, heads]
        bias[:, :, 1::2] = -(q[:, heads, 1::2] @ keys.mT * stand_in_scale(p)).clamp(-1e4, 1e4)
    bias = bias.masked_fill_(visible.logical_not(), float("-inf"))
    return _strided(bias.to(getattr(torch, p.mask)), p.mask_strides)


def _sample(p: Problem, g: torch.Generator, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Mask | None) -> Sample:
    dtypes = [getattr(torch, name) for name in p.cast_from[:3]] or [p.torch_dtype] * 3
    parts = [
        from_bhsd(_strided(x.to(dtype), cls), p.layout)
        for x, dtype, cls in zip((q, k, v), dtypes, p.strides, strict=True)
    ]
    grad = None
    if p.needs_grad:
        for x in parts:
            x.requires_grad_()
        if isinstance(mask, Tensor) and p.mask_grad:
            mask.requires_grad_()
        grad = _repeated(g, (p.batch, p.q_heads, p.q_len, p.head_dim_v), p.torch_dtype)
        grad = from_bhsd(_strided(grad, p.strides[0]), p.layout)
    q, k, v = parts
    return Sample(p, q, k, v, mask, grad)


def _normal(g: torch.Generator, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Gaussian numbers with more digits than `dtype` keeps, or with all of float64's: what rounds them is seen to do so."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    return torch.randn(shape, generator=g, dtype=wide, device=g.device)


DRAWN = 2**20 - 3  # numbers: a prime, so that no two rows or heads are the same


def _repeated(g: torch.Generator, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Gaussian numbers over and over: drawing each of a large cache's would take longer than timing with it."""
    return _tiled(_normal(g, _drawn(shape), dtype).to(dtype), shape)


def _drawn(shape: Sequence[int]) -> tuple[int]:
    return (min(math.prod(shape), DRAWN),)


def _tiled(drawn: Tensor, shape: Sequence[int]) -> Tensor:
    size = math.prod(shape)
    return drawn.repeat(-(-size // max(1, drawn.numel())))[:size].view(*shape)


def _strided(x: Tensor, cls: str) -> Tensor:
    """The same values, (b, h, s, d), in memory of that stride class; `expanded` repeats the first head."""
    if cls in ("contiguous", ""):
        return x.contiguous()
    if cls == "expanded":
        return x[:, :1].contiguous().expand(x.shape)
    return x.new_empty_strided(x.shape, strides_of_class(x.shape, cls)).copy_(x)
