"""Problem: one kind of call, frozen, without tensors. It alone names the Verdict and the file that holds it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch

from fastattn.environment.device import Device
from fastattn.environment.settings import check_accuracy
from fastattn.problems import length_buckets, masks
from fastattn.problems.call_key import CallKey, TensorSpec, after_autocast, captures_grad, is_block_mask, mask_class
from fastattn.problems.layouts import stride_class

INT32 = 2**31 - 1


def default_scale(head_dim: int) -> float:
    """What scale=None means: 1 / sqrt(head_dim), as F.scaled_dot_product_attention takes it."""
    return head_dim**-0.5 if head_dim else 1.0


@dataclass(frozen=True, slots=True)
class Problem:
    """What a decision may depend on. Lengths are tokens, strides are classes (layouts.py), dtypes are torch's names.

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
    mask: str | None = None  # "bool", a float dtype, or "block" (flex's BlockMask)
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
    window: masks.Window | None = None  # (left, right) keys around the corner's diagonal, -1 is no limit
    softcap: float = 0.0
    dropout: bool = False
    lse: bool = False
    score_mod: bool = False
    # one call's own
    extent: int = field(default=0, compare=False)  # largest element offset into one of its tensors
    aligned: bool = field(default=True, compare=False)  # every tensor starts at a multiple of 16 bytes
    aligned_rows: bool = field(default=True, compare=False)  # q, k and v step from row to row by such multiples
    off: tuple[str, ...] = field(default=(), compare=False)  # torch's backends switched off by the user
    autocast: bool = field(default=False, compare=False)  # made under autocast, whether or not it casts anything
    asks_grad: bool = field(default=False, compare=False)  # an input requires grad, whatever grad mode says
    cut: Cut | None = field(default=None, compare=False)  # one query in a window: k and v stand for the keys it sees

    @staticmethod
    def from_key(key: CallKey, default_accuracy: str | float = "exact") -> Problem:
        """The problem of a call; pure."""
        cut = Cut.of(key)
        key = cut.key(key) if cut else key
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
        window = key.options.window
        if window and corner:
            window = None if window[0] < 0 else (window[0], -1)  # to the right the triangle ends it
        if corner == "bottom_right" and q_len == 1 and window is None:
            corner = None  # one query at the bottom right sees every key
        tensors = [s for s in (q, k, v, mask) if isinstance(s, TensorSpec)]
        dense = mask if isinstance(mask, TensorSpec) else None
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
            mask=_name(after_autocast(dense.dtype, state)) if dense else "block" if is_block_mask(mask) else None,
            mask_shape=shape,
            mask_strides=mask_strides,
            mask_grad=bool(dense and dense.requires_grad and state.grad),
            causal=corner,
            scale="positive" if scale is None or scale > 0 else "zero" if scale == 0 else "negative",
            needs_grad=state.grad and (any(s.requires_grad for s in tensors) or captures_grad(key.options.score_mod)),
            deterministic=state.deterministic,
            precision=state.precision + (",reduced" if state.math_reduction else ""),
            accuracy=key.options.accuracy if key.options.accuracy is not None else default_accuracy,
            layout=key.layout,
            threads=state.threads,
            flash_impl=state.flash_impl,
            cast_from=tuple(_name(s.dtype) for s in tensors) if cast else (),
            window=window,
            softcap=float(key.options.softcap),
            dropout=key.options.dropout_p > 0,
            lse=key.options.return_lse,
            score_mod=key.options.score_mod is not None,
            extent=max(sum((n - 1) * st for n, st in zip(s.shape, s.stride, strict=True) if n) for s in tensors),
            aligned=all(s.aligned for s in tensors),
            aligned_rows=all(_has_aligned_rows(s) for s in (q, k, v)),
            off=state.off,
            autocast=state.autocast is not None,
            asks_grad=any(s.requires_grad for s in tensors),
            cut=cut,
        )

    @property
    def is_banded(self) -> bool:
        """Whether a triangle or a window hides keys."""
        return self.causal is not None or self.window is not None

    @property
    def is_masked(self) -> bool:
        """Whether anything hides or changes scores."""
        return self.is_banded or self.mask is not None

    @property
    def is_custom(self) -> bool:
        """Whether the caller's own function is part of it: its verdict would mean nothing to another process."""
        return self.score_mod or self.mask == "block"

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
        """The problem that stands for this one's bucket: its lengths are canonical (fastattn.problems.length_buckets)."""
        if lengths == "exact":
            return self
        kv_len = length_buckets.canonical_length(self.kv_len)
        if lengths == "kv":
            return replace(self, kv_len=kv_len, lengths="kv")
        q_len = length_buckets.canonical_length(self.q_len)
        if q_len == kv_len and self.q_len < self.kv_len:  # one bucket, yet not square: the causal corner still matters
            q_len = max(1, q_len - 1)
        elif q_len == kv_len and self.q_len > self.kv_len:
            kv_len = max(1, kv_len - 1)
        batch = length_buckets.canonical_batch(self.batch)
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
        if known["window"] is not None and [type(n) for n in known["window"]] != [int, int]:
            raise TypeError(f"window is {known['window']!r}")
        problem = Problem(**known)
        check_accuracy(problem.accuracy)
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
            f"{self.mask} mask {self.mask_shape}".strip() if self.mask else "",
            f"causal {self.causal}" if self.causal else "",
            f"window {self.window[0]}, {self.window[1]}" if self.window else "",
            f"softcap {self.softcap:g}" if self.softcap else "",
            "dropout" if self.dropout else "",
            "with lse" if self.lse else "",
            "score_mod" if self.score_mod else "",
            "scale " + self.scale if self.scale != "positive" else "",
            "+".join(dict.fromkeys(self.strides)) if set(self.strides) != {"contiguous"} else "",
            "forward + backward" if self.needs_grad else "",
            "deterministic" if self.deterministic else "",
            f"accuracy {self.accuracy}" if self.accuracy != "exact" else "",
            f"autocast from {'/'.join(dict.fromkeys(self.cast_from))}" if self.cast_from else "",
        ]
        return ", ".join(word for word in words if word)


class Cut(NamedTuple):
    """One query in a window is a query on a slice of the keys: what decoding with a sliding window comes to."""

    corner: str | None
    window: masks.Window

    @staticmethod
    def of(key: CallKey) -> Cut | None:
        """The cut of a call, None where there is none to make."""
        window, mask = key.options.window, key.mask
        if window is None or key.q.shape[2] != 1 or not (mask is None or isinstance(mask, masks.Causal)):
            return None
        if key.options.score_mod is not None:
            return None  # it is told each key's own number
        corner = "top_left" if key.options.is_causal else mask.corner if mask is not None else None
        cut = Cut(corner, window)
        first, last = cut.keys(key.k.shape[2])
        return cut if first < last else None

    def keys(self, kv_len: int) -> tuple[int, int]:
        """(first, last + 1) visible key."""
        lower, upper = masks.band(self.corner, self.window, 1, kv_len)
        return max(0, lower or 0), kv_len if upper is None else min(kv_len, upper + 1)

    def key(self, key: CallKey) -> CallKey:
        """The call on the keys that are left."""
        first, last = self.keys(key.k.shape[2])
        k, v = (
            s._replace(
                shape=(*s.shape[:2], last - first, s.shape[3]),
                aligned=s.aligned and first * s.stride[2] * s.dtype.itemsize % 16 == 0,
            )
            for s in (key.k, key.v)
        )
        options = replace(key.options, window=None, is_causal=False)
        return key._replace(k=k, v=v, mask=None, options=options)


_KINDS: dict[str, Any] = {
    "str": str, "int": int, "bool": bool, "float": (int, float), "None": type(None), "str | None": (str, type(None)),
    "str | float": (str, int, float), "tuple[str, ...]": tuple, "tuple[str, str, str]": tuple,
    "masks.Window | None": (tuple, type(None)),
}  # fmt: skip
_JSON_FIELDS = {n: _KINDS[str(f.type)] for n, f in Problem.__dataclass_fields__.items() if f.compare}


def _has_aligned_rows(s: TensorSpec) -> bool:
    return all(n == 1 or step * s.dtype.itemsize % 16 == 0 for n, step in zip(s.shape[:3], s.stride[:3], strict=True))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
