"""KVCache: keys and values of past tokens in memory that has room for more, so that a new token copies itself alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastattn.dispatch.attention import attention
from fastattn.dispatch.kv_memory import check_tokens, grown, write_tokens
from fastattn.environment.settings import current_settings
from fastattn.environment.text import dtype_name
from fastattn.environment.torch_private import dispatch_modes
from fastattn.planning.conversions.kept import KeptCopies, is_kept_by_any
from fastattn.problems import masks
from fastattn.problems.call_options import OPTION_DEFAULTS
from fastattn.problems.layouts import TO_BHSD, from_bhsd, to_bhsd
from fastattn.problems.masks.values import whole_numbers

if TYPE_CHECKING:
    from fastattn.dispatch.explain import Explanation
    from fastattn.kernels.kernel import Kernel

_LAST = masks.Causal("bottom_right")
_KNOWN = {"scale", "softcap", "accuracy", "kernel", "return_lse"}  # options that a kept cache goes with


class KVCache:
    """The keys and values of a batch of sequences, which grow; for inference.

        cache = fastattn.KVCache("bshd", capacity=4096)
        cache.append(k, v)      # a prompt, or a token
        out = cache.attend(q)   # q: the last tokens of what is filled

    layout: of what append() and attend() are given, "bhsd", "bshd" or "sbhd"; in memory each head's rows lie together.
    capacity: tokens to make room for at first; where more come it doubles. Dtype and device are those of the first keys.
    A kernel that reads keys in an order of its own (vllm_cpu) may win where that order is kept: the cache then takes its
    memory twice, and a new token is written twice. `fastattn.options(kernels=...)` says which kernels may.
    Raises ValueError for another layout or a capacity below 1.
    """

    def __init__(self, layout: str = "bhsd", capacity: int = 256) -> None:
        if layout not in TO_BHSD:
            raise ValueError(f"KVCache: layout must be one of {', '.join(map(repr, TO_BHSD))}, got {layout!r}")
        if capacity < 1:
            raise ValueError(f"KVCache: capacity must be at least 1 token, got {capacity}")
        self.layout, self._capacity = layout, capacity
        self._k = self._v = None  # (batch, kv_heads, capacity, head_dim or head_dim_v)
        self._filled: list[int] = []
        self._copies = KeptCopies()
        self._is_kept: bool | None = None  # whether a kernel that is installed reads keys in an order of its own
        self._versions: tuple[int, int] | None = None  # of k and v, as they are known to what is kept

    def append(self, k: Tensor, v: Tensor, lengths: Any = None) -> None:
        """Add tokens behind what is filled: k, v [batch, kv_heads, tokens, head_dim] in the cache's layout.

        lengths: how many of the tokens each entry has, where they differ (prompts padded on the right); int [batch]. Raises
        ValueError for tensors that do not go with those before, or that want a gradient while gradients are on.
        """
        if k.dim() != 4 or v.dim() != 4:
            raise ValueError(f"KVCache.append(): k and v must have four dimensions, got {k.dim()} and {v.dim()}")
        k, v = to_bhsd(k, self.layout), to_bhsd(v, self.layout)
        check_tokens((self._k, self._v), k, v)
        batch, _, tokens, _ = k.shape
        filled = self._filled or [0] * batch
        if lengths is None:
            after = [n + tokens for n in filled]
        else:
            new = whole_numbers("KVCache.append(): lengths", lengths, 0)
            if len(new) != batch or not all(0 <= n <= tokens for n in new):
                raise ValueError(
                    f"KVCache.append(): lengths must be {batch} numbers from 0 to {tokens}, got {list(new)}"
                )
            after = [n + more for n, more in zip(filled, new, strict=True)]
        self._see_changes()
        self._make_room(max(after), k, v)
        for store, given in ((self._k, k), (self._v, v)):
            assert store is not None
            write_tokens(store, given, filled, after)
        self._filled, self._versions = after, self._versions_now()

    def attend(self, q: Tensor, mask: Any = None, **options: Any) -> Any:
        """attention() of the last tokens on what is filled: q [batch, q_heads, tokens, head_dim] in the cache's layout.

        mask: None means that the queries are the last of the filled tokens, and see no later ones. Options and errors are those
        of attention(); RuntimeError where nothing is filled yet.
        """
        q, k, v, mask, options = self._call(q, mask, options)
        return attention(q, k, v, mask, self.layout, **options)

    def explain(self, q: Tensor, mask: Any = None, *, tune: bool = False, **options: Any) -> Explanation:
        """Why attend() with these arguments is served as it is: `fastattn.explain` of that call."""
        from fastattn.dispatch.explain import explain  # here, as no call needs it

        q, k, v, mask, options = self._call(q, mask, options)
        return explain(q, k, v, mask, self.layout, tune=tune, **options)

    def _call(
        self, q: Tensor, mask: Any, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor, Any, dict[str, Any]]:
        """(q, k, v, mask, options) of attention()."""
        if told := {"kv_lens", "page_table"} & options.keys():
            raise ValueError(f"KVCache.attend(): {min(told)} is the cache's own to say")
        tokens = q.shape[TO_BHSD[self.layout][2]] if q.dim() == 4 else 1
        filled, corner = self._filled, _LAST if tokens > 1 else None
        are_alike = len(set(filled)) < 2
        is_last = mask is None or (isinstance(mask, masks.Causal) and mask == _LAST)
        if is_last and tokens <= min(filled, default=0) and self._may_be_kept(q, options):
            hides = corner if are_alike else masks.Filled(filled, tokens if tokens > 1 else 0)
            return q, self.k, self.v, masks.Kept(hides, self), options
        mask = corner if mask is None else mask
        if not are_alike:
            options["kv_lens"] = filled
        return q, self.k, self.v, mask, options

    def _may_be_kept(self, q: Tensor, options: dict[str, Any]) -> bool:
        if torch.compiler.is_compiling() or dispatch_modes() or self._k is None or self._v is None or q.dim() != 4:
            return False  # in a graph there is no memory to come back to
        if self._is_kept is None:
            self._is_kept = is_kept_by_any(self._k, self._v, current_settings().named)
        if not self._is_kept or (q.requires_grad and torch.is_grad_enabled()):
            return False
        return all(name in _KNOWN or value == OPTION_DEFAULTS.get(name) for name, value in options.items())

    def kept_for(self, kernel: Kernel) -> tuple[Tensor, ...]:
        """What is filled as a kernel reads it, brought up to date; attend() asks for it where that kernel serves."""
        assert self._k is not None and self._v is not None
        self._see_changes()
        found = self._copies.of(kernel, self._k, self._v, self._filled)
        self._versions = self._versions_now()
        return found

    def _versions_now(self) -> tuple[int, int] | None:
        """How often k and v were written to; None where nothing is kept of them, or a graph is traced, which cannot tell."""
        if torch.compiler.is_compiling() or not self._copies or self._k is None or self._v is None:
            return None
        return self._k._version, self._v._version

    def _see_changes(self) -> None:
        """What is kept of keys and values is made again where somebody wrote through `k` or `v`, or a graph wrote."""
        if (versions := self._versions_now()) != self._versions:
            if versions is not None:
                self._copies.cut([0] * len(self._filled))
            self._versions = versions

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled and copied: what kernels keep is made again."""
        return {**self.__dict__, "_copies": KeptCopies(), "_versions": None}

    @property
    def k(self) -> Tensor:
        """The keys, as far as the longest entry is filled: a view in the cache's layout. Behind a shorter one lies anything."""
        return self._view(self._k)

    @property
    def v(self) -> Tensor:
        """The values, likewise."""
        return self._view(self._v)

    @property
    def lengths(self) -> tuple[int, ...]:
        """How much of each entry is filled: what attention() takes as `kv_lens`."""
        return tuple(self._filled)

    def __len__(self) -> int:
        """Tokens of the longest entry."""
        return max(self._filled, default=0)

    def crop(self, lengths: int | Sequence[int]) -> None:
        """Forget the tokens beyond these lengths, one for all entries or one each: drafts that were rejected."""
        most = (
            (lengths,) * len(self._filled)
            if isinstance(lengths, int)
            else whole_numbers("KVCache.crop(): lengths", lengths, 0)
        )
        if len(most) != len(self._filled) or min(most, default=0) < 0:
            raise ValueError(f"KVCache.crop(): lengths must be {len(self._filled)} numbers from 0 on, got {lengths}")
        self._filled = [min(n, m) for n, m in zip(self._filled, most, strict=True)]
        self._see_changes()
        if self._versions is not None:
            self._copies.cut(self._filled)

    def reorder(self, entries: Tensor | Sequence[int]) -> None:
        """Entry i becomes what entries[i] was: beams, or a batch that loses and gains entries."""
        order = whole_numbers("KVCache.reorder(): entries", entries, 0)
        if not all(0 <= i < len(self._filled) for i in order):
            raise ValueError(f"KVCache.reorder(): entries must be from 0 to {len(self._filled) - 1}, got {list(order)}")
        if self._k is None or self._v is None:
            return
        self._see_changes()
        with torch.inference_mode(False):
            index = torch.tensor(order, dtype=torch.int64, device=self._k.device)
            self._k, self._v = self._k.index_select(0, index), self._v.index_select(0, index)
        self._filled = [self._filled[i] for i in order]
        if self._versions is not None:
            self._copies.reorder(order)
            self._versions = self._versions_now()

    def reset(self) -> None:
        """Forget all tokens, and keep the memory for as many entries."""
        self._filled = [0] * len(self._filled)
        self._copies, self._versions = KeptCopies(), None

    def __repr__(self) -> str:
        if self._k is None:
            return f"KVCache({self.layout!r}, empty)"
        batch, heads, room, head_dim = self._k.shape
        alike = len(set(self._filled)) == 1
        filled = f"{self._filled[0]}" if alike else f"{min(self._filled)} to {max(self._filled)}"
        what = f"{batch} x {heads} heads, d{head_dim}, {dtype_name(self._k.dtype)}"
        return f"KVCache({self.layout!r}, {what}, {filled} of {room} tokens)"

    def _view(self, store: Tensor | None) -> Tensor:
        if store is None:
            raise RuntimeError("KVCache: nothing is filled yet: append() keys and values first")
        return from_bhsd(store.narrow(2, 0, len(self)), self.layout)

    def _make_room(self, tokens: int, k: Tensor, v: Tensor) -> None:
        room = self._capacity if self._k is None else self._k.shape[2]
        if self._k is not None and tokens <= room:
            return
        while room < tokens:
            room *= 2
        self._k, self._v = (grown(x, len(self), given, room) for x, given in ((self._k, k), (self._v, v)))
