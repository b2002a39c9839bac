"""Problem: one kind of call, frozen, without tensors. It alone names the Verdict and the file that holds it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from fastattn import buckets, config, masks
from fastattn.device import Device
from fastattn.inputs import CallKey, Spec, after_autocast, mask_class
from fastattn.layouts import stride_class

INT32 = 2**31 - 1


def default_scale(head_dim: int) -> float:
    """What scale=None means: 1 / sqrt(head_dim), as F.scaled_dot_product_attention takes it."""
    return head_dim**-0.5 if head_dim else 1.0


@dataclass(frozen=True, slots=True)
class Problem:
    """What a decision may depend on. Lengths are tokens, strides are classes (fastattn.layouts), dtypes are torch's names.

    `lengths` says how q_len, kv_len and batch are meant: "exact", "kv" (kv_len stands for its bucket) or "all" (each
    stands for its bucket). `cast_from` is the caller's dtypes where autocast changes them.
    The last fields belong to one call, not to the kind: they take no part in equality, hash or name.
    """

    device: str
    dtype: str
    head_dim: int
    head_dim_v: int
    q_heads: int
    kv_heads: int
    batch: int
    q_len: int
    kv_len: int
    lengths: str = "exact"
    strides: tuple[str, str, str] = ("contiguous", "contiguous", "contiguous")
    mask: str | None = None  # "bool" or a float dtype
    mask_shape: str = ""  # letters of (b, h, q, k) where it is not broadcast
    mask_strides: str = ""
    mask_grad: bool = False
    causal: str | None = None  # the corner
    scale: str = "positive"
    needs_grad: bool = False
    deterministic: bool = False
    precision: str = ""
    accuracy: str | float = "exact"
    layout: str = "bhsd"
    threads: int = 0
    flash_impl: str = ""
    cast_from: tuple[str, ...] = ()
    # options of later issues, kept here so that stored files do not change their meaning
    window: None = None
    softcap: float = 0.0
    dropout: bool = False
    # one call's own
    extent: int = field(default=0, compare=False)  # largest element offset into one of its tensors
    aligned: bool = field(default=True, compare=False)  # every tensor starts at a multiple of 16 bytes
    off: tuple[str, ...] = field(default=(), compare=False)  # torch's backends switched off by the user
    autocast: bool = field(default=False, compare=False)  # made under autocast, whether or not it casts anything
    asks_grad: bool = field(default=False, compare=False)  # an input requires grad, whatever grad mode says

    @staticmethod
    def from_key(key: CallKey, default_accuracy: str | float = "exact") -> Problem:
        """The problem of a call; pure."""
        q, k, v, mask, state = key.q, key.k, key.v, key.mask, key.state
        dtype = after_autocast(q.dtype, state)
        batch, q_heads, q_len, head_dim = q.shape
        kv_heads, kv_len = k.shape[1:3]
        corner = mask.corner if isinstance(mask, masks.Causal) else None
        if key.options.is_causal and (corner != "bottom_right" or kv_len <= q_len):
            # the intersection of the two triangles is the smaller one
            corner = "bottom_right" if corner == "bottom_right" and kv_len < q_len else "top_left"
        elif key.options.is_causal:
            corner = "top_left"
        if corner == "bottom_right" and q_len == kv_len:
            corner = "top_left"
        if corner == "bottom_right" and q_len == 1:
            corner = None  # one query at the bottom right sees every key
        tensors = [s for s in (q, k, v, mask) if isinstance(s, Spec)]
        dense = mask if isinstance(mask, Spec) else None
        shape, mask_strides = mask_class(dense, q, kv_len) if dense else ("", "")
        scale = key.options.scale
        cast = state.autocast is not None and any(s.dtype is not after_autocast(s.dtype, state) for s in tensors)
        return Problem(
            device=Device.of(q.device).type,
            dtype=_name(dtype),
            head_dim=head_dim,
            head_dim_v=v.shape[3],
            q_heads=q_heads,
            kv_heads=kv_heads,
            batch=batch,
            q_len=q_len,
            kv_len=kv_len,
            strides=(
                stride_class(q.shape, q.stride),
                stride_class(k.shape, k.stride),
                stride_class(v.shape, v.stride),
            ),
            mask=_name(after_autocast(dense.dtype, state)) if dense else None,
            mask_shape=shape,
            mask_strides=mask_strides,
            mask_grad=bool(dense and dense.requires_grad and state.grad),
            causal=corner,
            scale="positive" if scale is None or scale > 0 else "zero" if scale == 0 else "negative",
            needs_grad=state.grad and any(s.requires_grad for s in tensors),
            deterministic=state.deterministic,
            precision=state.precision + (",reduced" if state.math_reduction else ""),
            accuracy=key.options.accuracy if key.options.accuracy is not None else default_accuracy,
            layout=key.layout,
            threads=state.threads,
            flash_impl=state.flash_impl,
            cast_from=tuple(_name(s.dtype) for s in tensors) if cast else (),
            extent=max(sum((n - 1) * st for n, st in zip(s.shape, s.stride, strict=True) if n) for s in tensors),
            aligned=all(s.aligned for s in tensors),
            off=state.off,
            autocast=state.autocast is not None,
            asks_grad=any(s.requires_grad for s in tensors),
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def group(self) -> int:
        """Query heads that share a kv head."""
        return self.q_heads // self.kv_heads if self.kv_heads else 1

    @property
    def io_bytes(self) -> int:
        """Bytes of q, k, v and the output."""
        q = self.batch * self.q_heads * self.q_len * (self.head_dim + self.head_dim_v)
        kv = self.batch * self.kv_heads * self.kv_len * (self.head_dim + self.head_dim_v)
        return (q + kv) * self.torch_dtype.itemsize

    @property
    def memory_limit(self) -> int:
        """Bytes a kernel may use beyond its inputs and output: 3 x io_bytes, at least 128 MiB."""
        return max(3 * self.io_bytes, 128 * 2**20)

    @property
    def scores(self) -> int:
        """Elements of the score matrix."""
        return self.batch * self.q_heads * self.q_len * self.kv_len

    @property
    def unfused_bytes(self) -> int:
        """Temporary bytes of an unfused kernel: the scores, masked and normalised, in float32."""
        return 3 * 4 * self.scores

    def bucketed(self, lengths: str) -> Problem:
        """The problem that stands for this one's bucket: its lengths are canonical (fastattn.buckets)."""
        if lengths == "exact":
            return self
        kv_len = buckets.canonical(self.kv_len)
        if lengths == "kv":
            return replace(self, kv_len=kv_len, lengths="kv")
        q_len = buckets.canonical(self.q_len)
        if q_len == kv_len and self.q_len < self.kv_len:  # one bucket, yet not square: the causal corner still matters
            q_len = max(1, q_len - 1)
        elif q_len == kv_len and self.q_len > self.kv_len:
            kv_len = max(1, kv_len - 1)
        batch = buckets.canonical_batch(self.batch)
        return replace(self, q_len=q_len, kv_len=kv_len, batch=batch, lengths="all")

    def replace(self, **changes: Any) -> Problem:
        """The same problem but for some fields."""
        return replace(self, **changes)

    def family(self) -> Problem:
        """All but the lengths and the batch: within a family, many different lengths mean churn."""
        return replace(self, q_len=0, kv_len=0, batch=0)

    def to_json(self) -> dict[str, Any]:
        """The fields that name the problem."""
        return {name: value for name, value in asdict(self).items() if name in _JSON_FIELDS}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Problem:
        """Inverse of to_json. Raises ValueError or TypeError on anything else."""
        known = {name: data[name] for name in _JSON_FIELDS}
        if len(known) != len(data):
            raise ValueError(f"unknown fields {sorted(set(data) - set(known))}")
        for name, value in known.items():
            known[name] = tuple(value) if isinstance(value, list) else value
            if not isinstance(known[name], _JSON_FIELDS[name]):
                raise TypeError(f"{name} is {value!r}")
        problem = Problem(**known)
        config.check_accuracy(problem.accuracy)
        return problem

    @property
    def digest(self) -> str:
        """Names the file: every field takes part."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def __str__(self) -> str:
        heads = f"{self.q_heads}" if self.q_heads == self.kv_heads else f"{self.q_heads}/{self.kv_heads}"
        dims = f"{self.head_dim}" if self.head_dim == self.head_dim_v else f"{self.head_dim}/{self.head_dim_v}"
        about = {"exact": "", "kv": " (kv bucket)", "all": " (bucket)"}[self.lengths]
        words = [
            f"{self.batch} x {heads} heads x {self.q_len} on {self.kv_len}{about} x d{dims}",
            self.dtype,
            f"{self.mask} mask {self.mask_shape}" if self.mask else "",
            f"causal {self.causal}" if self.causal else "",
            "scale " + self.scale if self.scale != "positive" else "",
            "+".join(dict.fromkeys(self.strides)) if set(self.strides) != {"contiguous"} else "",
            "forward + backward" if self.needs_grad else "",
            "deterministic" if self.deterministic else "",
            f"accuracy {self.accuracy}" if self.accuracy != "exact" else "",
            f"autocast from {'/'.join(dict.fromkeys(self.cast_from))}" if self.cast_from else "",
        ]
        return ", ".join(word for word in words if word)


_KINDS: dict[str, Any] = {
    "str": str, "int": int, "bool": bool, "float": (int, float), "None": type(None), "str | None": (str, type(None)),
    "str | float": (str, int, float), "tuple[str, ...]": tuple, "tuple[str, str, str]": tuple,
}  # fmt: skip
_JSON_FIELDS = {n: _KINDS[str(f.type)] for n, f in Problem.__dataclass_fields__.items() if f.compare}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
