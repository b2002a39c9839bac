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
    with Causal("bottom_right") only where q_len is kv_len. It is remembered until
    fastattn.clear(). Raises TypeError for what is no bool tensor, ValueError for other shapes, and under FakeTensorMode, where
    nothing can be read.
    """

    seen: Tensor = field(compare=False)  # [batch or 1, q_len, kv_len] on the CPU
    digest: bytes  # of what it says: by this values are compared
    alike: Window = field(compare=False)  # what stands for it
    copies: dict[Any, Tensor] = field(compare=False)  # of `seen`, one on each device that asked

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
                "Static is made of [q_len, kv_len] or [batch or 1, 1, q_len, kv_len]; where heads differ pass the tensor"
                f" itself. Got shape {tuple(tensor.shape)}"
            )
        with torch.inference_mode(False):
            seen = torch.empty(shape[0], *shape[2:], dtype=torch.bool, device="cpu")
            if tensor.is_meta or _is_fake(tensor) or _is_fake(seen):
                raise ValueError(
                    "Static is read when it is made, and a meta tensor, or any under FakeTensorMode, holds nothing to read."
                    f" Make it before that mode is entered. Got shape {tuple(tensor.shape)} on {tensor.device}"
                )
            seen.copy_(tensor.detach().view(shape)[:, 0])
        # a window of w to each side of n keys hides (1 - w / n) squared of all
        side = shape[3] * (1.0 - (1.0 - _share_of_squares(seen)) ** 0.5)
        side = 1 << max(0, round(side) - 1).bit_length()  # the next power of two
        object.__setattr__(self, "seen", seen)
        object.__setattr__(self, "digest", blake2b(repr(shape).encode() + as_bytes(seen)).digest())
        object.__setattr__(self, "alike", Window(side, side))
        object.__setattr__(self, "copies", {seen.device: seen})

    def sees(self, b: Tensor, p: Tensor, j: Tensor, kv_len: int) -> Tensor:
        seen = self._beside(p)
        if p.dim() > 2:
            return seen[b % len(seen), p, j]
        # as part() gives them: b [entries, 1, 1, 1], p [queries, 1], j [keys]
        seen = _taken(_taken(seen, 1, p.flatten()), 2, j)
        return _taken(seen, 0, b.flatten() % len(seen))[:, None]

    def _beside(self, p: Tensor) -> Tensor:
        """The tensor where positions lie."""
        import torch

        if _is_fake(p):
            return torch.ops.aten.lift_fresh_copy(self.seen).to(p.device)  # as a constant: no other tensor may come in
        if p.device not in self.copies:
            with torch.inference_mode(False):
                self.copies[p.device] = self.seen.to(p.device)
        return self.copies[p.device]

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
        return self.alike

    def check(self, batch: int, heads: int, q_len: int, kv_len: int) -> None:
        check_entries(self, len(self.seen), batch)
        if self.seen.shape[1:] != (q_len, kv_len):
            raise ValueError(f"{self!r} is for (q_len, kv_len) {tuple(self.seen.shape[1:])}, got ({q_len}, {kv_len})")

    def __repr__(self) -> str:
        seen = int(self.seen.count_nonzero()) / self.seen.numel()
        return f"Static({'x'.join(map(str, self.seen.shape))}, {seen:.0%} seen)"

    def __reduce__(self) -> Any:
        return Static, (self.seen[:, None],)


def _is_fake(x: Tensor) -> bool:
    """Whether it is made under FakeTensorMode, by its name."""
    return type(x).__name__ == "FakeTensor"


def _taken(x: Tensor, dim: int, at: Tensor) -> Tensor:
    """x at these places along a dimension: a view where they are neighbours, which is looked at where it costs nothing."""
    import torch

    may_look = at.device.type == "cpu" and len(at) > 0 and not (torch.compiler.is_compiling() or _is_fake(at))
    if may_look and bool((at.diff() == 1).all()):
        return x.narrow(dim, int(at[0]), len(at))
    return x.index_select(dim, at)


SQUARE = 128


def _share_of_squares(seen: Tensor) -> float:
    """What share of the mask's squares has a key that is seen: what kernels that skip squares or tiles compute."""
    import torch
    from torch.nn.functional import pad

    rows = [seen[:, at : at + SQUARE].view(torch.uint8).amax(1) for at in range(0, seen.shape[1], SQUARE)]
    some = pad(torch.stack(rows), (0, -seen.shape[2] % SQUARE)).unflatten(-1, (-1, SQUARE)).amax(-1)
    return int(some.count_nonzero()) / some.numel()


def _runs_of(seen: Tensor) -> Runs:
    """Runs of the keys whose byte is not 0."""
    keys = seen.nonzero().flatten()
    if not len(keys):
        return ()
    ends = (keys.diff() > 1).nonzero().flatten()
    firsts, lasts = keys[[0, *(ends + 1).tolist()]], keys[[*ends.tolist(), -1]]
    return tuple((first, last + 1) for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True))
