"""Static: a bool tensor that is read once, as a mask with a meaning."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from fastattn.environment.text import dtype_name, type_name
from fastattn.problems.dense_masks import as_bytes
from fastattn.problems.masks.band import Window
from fastattn.problems.masks.mask import Mask
from fastattn.problems.masks.runs import Runs
from fastattn.problems.masks.values import check_entries

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, repr=False)
class Static(Mask):
    """A mask of any pattern that will not change: the tensor is copied and read once, when the value is made.

    A plain dense mask could be written into, so it is looked at in every call, and on CUDA in none. tensor: bool
    [q_len, kv_len] or [batch or 1, 1, q_len, kv_len], True where a query sees a key. Row i is of query i, so it goes
    with Causal("bottom_right") only where q_len is kv_len. Raises TypeError for what is no bool tensor, ValueError for
    other shapes.
    """

    seen: Tensor = field(compare=False)  # [batch or 1, q_len, kv_len] on the CPU
    digest: bytes  # of what it says: by this values are compared
    share: float = field(compare=False)  # of all pairs, how many are seen

    def __init__(self, tensor: Any) -> None:
        import torch

        if not isinstance(tensor, torch.Tensor) or tensor.dtype is not torch.bool:
            dtype = f" of {dtype_name(tensor.dtype)}" if isinstance(tensor, torch.Tensor) else ""
            raise TypeError(
                "Static is made of a bool Tensor, True where a query sees a key; what is added to the scores is a Bias."
                f" Got {type_name(tensor)}{dtype}"
            )
        shape = (1, 1, *tensor.shape)[-4:]
        if tensor.dim() not in (2, 4) or shape[1] != 1 or 0 in shape:
            raise ValueError(
                "Static is made of [q_len, kv_len] or [batch or 1, 1, q_len, kv_len]; "
                f" where heads differ pass the tensor itself. Got shape {tuple(tensor.shape)}"
            )
        seen = torch.empty(shape[0], *shape[2:], dtype=torch.bool, device="cpu").copy_(
            tensor.detach().view(shape)[:, 0]
        )
        object.__setattr__(self, "seen", seen)
        object.__setattr__(self, "digest", blake2b(repr(shape).encode() + as_bytes(seen)).digest())
        object.__setattr__(self, "share", float(seen.float().mean()))

    def sees(self, b: Tensor, p: Tensor, j: Tensor, kv_len: int) -> Tensor:
        """Of positions that are given as part() gives them: b [entries, 1, 1, 1], p [queries, 1], j [keys]."""
        seen = self.seen.to(p.device)
        return seen[b.flatten() % len(seen)].index_select(1, p.flatten()).index_select(2, j)[:, None]

    def runs(self, b: int, rows: range, kv_len: int) -> tuple[Runs, Runs]:
        import torch

        part = self.seen[b % len(self.seen), rows.start : rows.stop : rows.step].view(torch.uint8)
        return _runs_of(part.amax(0)), _runs_of(part.amin(0))

    def is_per_batch(self) -> bool:
        return len(self.seen) > 1

    def fixes_corner(self) -> bool:
        _, q_len, kv_len = self.seen.shape
        return q_len != kv_len

    def like(self, kv_len: int) -> Mask:
        """A window that leaves about as much: w to each side of n keys hide (1 - w / n) squared of all pairs."""
        side = 1 << max(0, round(kv_len * (1.0 - (1.0 - self.share) ** 0.5)) - 1).bit_length()  # the next power of two
        return Window(side, side)

    def check(self, batch: int, heads: int, q_len: int, kv_len: int) -> None:
        check_entries(self, len(self.seen), batch)
        if self.seen.shape[1:] != (q_len, kv_len):
            raise ValueError(f"{self!r} is for (q_len, kv_len) {tuple(self.seen.shape[1:])}, got ({q_len}, {kv_len})")

    def __repr__(self) -> str:
        return f"Static({'x'.join(map(str, self.seen.shape))}, {self.share:.0%} seen)"


def _runs_of(seen: Tensor) -> Runs:
    """Runs of the keys whose byte is not 0."""
    keys = seen.nonzero().flatten()
    if not len(keys):
        return ()
    ends = (keys.diff() > 1).nonzero().flatten()
    firsts, lasts = keys[[0, *(ends + 1).tolist()]], keys[[*ends.tolist(), -1]]
    return tuple((first, last + 1) for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True))
