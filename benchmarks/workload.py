"""The problems of workload.toml, and their tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import masks

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

PATH = Path(__file__).with_name("workload.toml")
SMALL = ("clip-text", "bert-60-padded", "mqa-4-on-2000", "tiny")  # of a smoke run


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem of the workload in one dtype, forward or training."""

    name: str
    family: str
    dtype: str
    is_training: bool
    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    head_dim_v: int = 0  # 0: head_dim
    causal: bool = False
    mask: str = ""  # "bool b11k", "float 1hqk", or one of fastattn.masks
    cache: bool = False
    layout: str = "bhsd"
    share: float = 1.0

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of attention(), plan() and explain()."""
        found: dict[str, Any] = {"layout": self.layout} if self.layout != "bhsd" else {}
        return found | ({"is_causal": True} if self.causal else {})


def cases(path: Path = PATH) -> list[Case]:
    """Every problem in every dtype, forward ones first."""
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    return [c for is_training in (False, True) for dtype in data["dtypes"] for c in _of(data, dtype, is_training)]


def _of(data: dict[str, Any], dtype: str, is_training: bool) -> Iterator[Case]:
    for row in data["problem"]:
        row = dict(row)
        heads = row.pop("heads")
        q_heads, kv_heads = heads if isinstance(heads, list) else (heads, heads)
        row.setdefault("kv_len", row["q_len"])
        if row.pop("training", False) or not is_training:
            yield Case(dtype=dtype, is_training=is_training, q_heads=q_heads, kv_heads=kv_heads, **row)


@dataclass(frozen=True)
class Inputs:
    """The tensors of a Case in its layout, and what runs on them."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | masks.Mask | None
    grad: Tensor | None

    def run(self, call: Callable[[Tensor, Tensor, Tensor, Any], Tensor]) -> Callable[[], Any]:
        """call(q, k, v, mask), followed by its backward in training."""
        q, k, v, mask, grad = self.q, self.k, self.v, self.mask, self.grad
        if grad is None:
            return lambda: call(q, k, v, mask)
        return lambda: torch.autograd.grad(call(q, k, v, mask), (q, k, v), grad)

    def sdpa(self) -> Callable[[Tensor, Tensor, Tensor, Any], Tensor]:
        """What the user would write without fastattn; a mask with a meaning is a dense one there, made before."""
        c = self.case
        dense = self.mask
        if isinstance(dense, masks.Mask):
            dense = dense.dense(c.batch, c.q_len, c.kv_len, self.q.device)
        options = ({"is_causal": True} if c.causal else {}) | ({"enable_gqa": True} if c.q_heads != c.kv_heads else {})
        if c.layout == "bhsd":
            return lambda q, k, v, _: F.scaled_dot_product_attention(q, k, v, dense, **options)

        def run(q: Tensor, k: Tensor, v: Tensor, _: Any) -> Tensor:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            return F.scaled_dot_product_attention(q, k, v, dense, **options).transpose(1, 2)

        return run


def inputs(c: Case, device: str = "cpu") -> Inputs:
    """Gaussian tensors with a seed of their own; padding hides up to half of the keys, never all."""
    g = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, c.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=device).to(dtype)

    def laid(heads: int, length: int, room: int, head_dim: int) -> Tensor:
        if c.layout == "bshd":
            return normal(c.batch, room, heads, head_dim)[:, :length]
        return normal(c.batch, heads, room, head_dim)[:, :, :length]

    room = c.kv_len + c.kv_len // 4 if c.cache else c.kv_len
    q = laid(c.q_heads, c.q_len, c.q_len, c.head_dim)
    k, v = (laid(c.kv_heads, c.kv_len, room, d) for d in (c.head_dim, c.head_dim_v or c.head_dim))
    mask: Any = None
    if "(" in c.mask:
        mask = masks.parse(c.mask).of_lengths(c.q_len, c.kv_len, torch.device(device))
    elif c.mask:
        kind, letters = c.mask.split()
        sizes = {"b": c.batch, "h": c.q_heads, "q": c.q_len, "k": c.kv_len}
        shape = [sizes[letter] if letter in letters else 1 for letter in "bhqk"]
        if kind == "bool":
            kept = torch.randint(c.kv_len // 2, c.kv_len + 1, (*shape[:3], 1), generator=g, device=device)
            mask = (torch.arange(c.kv_len, device=device) < kept).expand(shape).contiguous()
        else:
            mask = normal(*shape)
    grad = None
    if c.is_training:
        grad = normal(*q.shape[:3], v.shape[3])
        for x in (q, k, v):
            x.requires_grad_()
    return Inputs(c, q, k, v, mask, grad)
