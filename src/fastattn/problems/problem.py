"""Problem: one kind of call, frozen, without tensors. It alone names the Verdict and the file that holds it."""

import hashlib
import json
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fastattn.environment.settings import check_accuracy
from fastattn.problems import bands, length_buckets, masks

if TYPE_CHECKING:
    from fastattn.problems.packing import Filling, Packing


def default_scale(head_dim: int) -> float:
    """What scale=None means: 1 / sqrt(head_dim), as F.scaled_dot_product_attention takes it."""
    return head_dim**-0.5 if head_dim else 1.0


class Problem(NamedTuple):
    """What a decision may depend on. Lengths are tokens, strides are classes (layouts.py), dtypes are torch's names.

    `lengths` says how q_len, kv_len and batch are meant: "exact", "kv" (kv_len stands for its bucket) or "all" (each
    stands for its bucket). `cast_from` is the caller's dtypes where autocast changes them.
    What belongs to one call alone is CallFacts.
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
    structure: str = ""  # of a Mask that is more than a triangle and a window: the Mask that stands for those like it
    causal: str | None = None  # the corner
    scale: str = "positive"
    needs_grad: bool = False
    deterministic: bool = False
    switches: tuple[str, ...] = ()  # torch's switches that are not as torch starts (environment/torch_switches.py)
    accuracy: str | float = "exact"
    layout: str = "bhsd"
    threads: int = 0
    flash_impl: str = ""
    cast_from: tuple[str, ...] = ()
    window: bands.Sides | None = None  # (left, right) keys around the corner's diagonal, -1 is no limit
    softcap: float = 0.0
    dropout: bool = False
    lse: bool = False
    score_mod: bool = False
    kept: bool = False  # k and v are a KVCache's, which keeps them in the order of a kernel's own as well
    compiled: bool = False  # inside a region of torch.compile, where Inductor changes what a kernel costs

    @property
    def is_banded(self) -> bool:
        """Whether a triangle or a window hides keys."""
        return self.causal is not None or self.window is not None

    @property
    def is_square(self) -> bool:
        """Whether there are as many queries as keys."""
        return self.q_len == self.kv_len

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
    def told_mask(self) -> "masks.Mask | None":
        """The Mask that the problem is told by: its structure, or its triangle and window."""
        if self.structure:
            return masks.parse(self.structure).for_heads(self.q_heads)
        own = [masks.Causal(self.causal)] if self.causal is not None else []
        own += [masks.Window(*self.window)] if self.window is not None else []
        return masks.all_of(own) if own else None

    @property
    def packing(self) -> "Packing | None":
        """How sequences are packed, where that is all that hides keys."""
        if not self.structure or self.batch > 1:
            return None
        from fastattn.problems.packing import packing_of  # here, as no other call needs it

        return packing_of(self.structure, self.q_len, self.kv_len)

    @property
    def filling(self) -> "Filling | None":
        """How a cache is filled, where that is all that hides keys."""
        if "Filled" not in self.structure:
            return None
        from fastattn.problems.packing import filling_of

        return filling_of(self.structure)

    @property
    def page_size(self) -> int:
        """Tokens in a page of a cache in pages, else 0."""
        filling = self.filling
        return filling.page if filling is not None else 0

    @property
    def is_packed(self) -> bool:
        """Whether all that hides keys is where sequences end, and a triangle or a window within each."""
        return self.packing is not None

    @property
    def is_self_packed(self) -> bool:
        """Whether it is packed, and each sequence has as many queries as keys."""
        return self.packing is not None and self.packing.are_same

    @property
    def any_window(self) -> bands.Sides | None:
        """The window: of the whole, or of each packed sequence."""
        return self.window if self.packing is None else self.packing.window

    @property
    def is_unread(self) -> bool:
        """Whether its mask holds lengths that nobody reads: no tile can be made of it."""
        return "Unread(" in self.structure

    @property
    def has_unread_keys(self) -> bool:
        """Whether some hidden keys may hold anything, NaN too: a kernel must not read them."""
        return "Filled(" in self.structure

    @property
    def dense_mask_bytes(self) -> int:
        """Bytes of the structure, triangle or window as a dense mask, bool and as it is added."""
        copies = (self.batch if "b" in self.mask_shape else 1) * (self.q_heads if "h" in self.mask_shape else 1)
        return copies * self.q_len * self.kv_len * (1 + self.torch_dtype.itemsize)

    @property
    def scores(self) -> int:
        """Elements of the score matrix."""
        return self.batch * self.q_heads * self.q_len * self.kv_len

    @property
    def unfused_bytes(self) -> int:
        """Temporary bytes of an unfused kernel: the scores, masked and normalised, in float32."""
        return 3 * 4 * self.scores

    def bucketed(self, lengths: str) -> "Problem":
        """The problem that stands for this one's bucket: its lengths are canonical (fastattn.problems.length_buckets)."""
        if lengths == "exact":
            return self
        kv_len = length_buckets.canonical_length(self.kv_len)
        if lengths == "kv":
            return self._replace(kv_len=kv_len, lengths="kv")
        q_len = length_buckets.canonical_length(self.q_len)
        if q_len == kv_len and self.q_len < self.kv_len:  # one bucket, yet not square: the causal corner still matters
            q_len = max(1, q_len - 1)
        elif q_len == kv_len and self.q_len > self.kv_len:
            kv_len = max(1, kv_len - 1)
        batch = length_buckets.canonical_batch(self.batch)
        return self._replace(q_len=q_len, kv_len=kv_len, batch=batch, lengths="all")

    def as_in_training(self) -> "Problem":
        """The problem of the same call where its inputs ask for a gradient; a float mask may then be one that learns."""
        return self if self.is_custom else self._replace(needs_grad=True, mask_grad=self.mask not in (None, "bool"))

    def replace(self, **changes: Any) -> "Problem":
        """The same problem but for some fields."""
        return self._replace(**changes)

    def family(self) -> "Problem":
        """All but the lengths and the batch: within a family, many different lengths mean churn."""
        return self._replace(q_len=0, kv_len=0, batch=0)

    def to_json(self) -> dict[str, Any]:
        """The fields that name the problem."""
        return {name: getattr(self, name) for name in _JSON_FIELDS}

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Problem":
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
        from fastattn.problems.spelling import in_words

        return in_words(self)


_KINDS: dict[Any, Any] = {
    str: str, int: int, bool: bool, float: (int, float), str | None: (str, type(None)), str | float: (str, int, float),
    tuple[str, ...]: tuple, tuple[str, str, str]: tuple, bands.Sides | None: (tuple, type(None)),
}  # fmt: skip
_JSON_FIELDS = {name: _KINDS[kind] for name, kind in Problem.__annotations__.items()}
