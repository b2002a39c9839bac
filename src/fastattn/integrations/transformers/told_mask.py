"""ToldMask: a mask with a meaning that travels through a model as a tensor, though it has no memory.

Models ask masks for their shape, dtype and device, hand them to other functions and keep them in dicts: this answers all of it.
Whatever computes with it (slices it, adds to it, moves it) gets the dense mask, made for it then; only fastattn reads what
it was told.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.environment import torch_private
from fastattn.problems.masks import Mask

READ_ONLY = "a ToldMask cannot be written into; its clone() is a plain tensor"


class Told(NamedTuple):
    """Which keys are seen. keys: (first, last + 1) of those that some query may see; mask: of these, None where all are seen.

    The mask speaks of positions as attention() on the keys that are left does; of one query it may be a tensor
    [batch, 1, 1, keys].
    """

    keys: tuple[int, int]
    mask: Mask | Tensor | None


class ToldMask(Tensor):
    """A bool tensor [batch, 1, q_len, kv_len] of which nothing is stored but what was told."""

    told: Told
    lengths: tuple[
        int, int
    ]  # (q_len, kv_len) once more: Dynamo reads attributes of a tensor it cannot trace, not its sizes

    @staticmethod
    def __new__(cls: Any, told: Told, batch: int, q_len: int, kv_len: int, device: Any) -> ToldMask:
        assert torch_private.wrapper_subclass is not None
        made = torch_private.wrapper_subclass(cls, (batch, 1, q_len, kv_len), dtype=torch.bool, device=device)
        made.told, made.lengths = told, (q_len, kv_len)
        return made

    __torch_function__ = torch_private.no_torch_function  # operators come to __torch_dispatch__, attributes to nobody

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default:  # checkpointing detaches whatever a layer is given
            return args[0]._on(args[0].device)
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") in (
            None,
            torch.bool,
        ):  # layers on several devices
            return args[0]._on(kwargs.get("device") or args[0].device)
        if func._schema.is_mutable:
            raise NotImplementedError(READ_ONLY)
        return func(*as_plain(args), **as_plain(kwargs))

    def _on(self, device: Any) -> ToldMask:
        """The same on a device."""
        mask = self.told.mask.to(device) if isinstance(self.told.mask, Tensor) else self.told.mask
        return ToldMask(Told(self.told.keys, mask), self.shape[0], self.shape[2], self.shape[3], device)

    def dense(self) -> Tensor:
        """The same as a plain tensor, made now."""
        (first, last), mask = self.told
        batch, _, q_len, kv_len = self.shape
        if mask is None:
            seen = torch.ones((), dtype=torch.bool, device=self.device)
        else:
            seen = mask if isinstance(mask, Tensor) else mask.dense(batch, q_len, last - first, self.device)
        dense = torch.zeros(batch, 1, q_len, kv_len, dtype=torch.bool, device=self.device)
        dense[..., first:last] = seen
        return dense

    def __setitem__(self, at: Any, values: Any) -> None:
        raise NotImplementedError(READ_ONLY)  # into a view it would be written, which is one of a copy

    def __deepcopy__(self, memo: object) -> ToldMask:
        return self._on(self.device)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"ToldMask({list(self.shape)}, keys {self.told.keys}, {self.told.mask!r})"


def as_plain(x: Any) -> Any:
    """A ToldMask as the dense tensor, in lists and dicts too; everything else as it is."""
    if isinstance(x, (tuple, list)):
        return type(x)(map(as_plain, x))
    if isinstance(x, dict):
        return {name: as_plain(value) for name, value in x.items()}
    return x.dense() if isinstance(x, ToldMask) else x


CAN_BE_MADE = torch_private.wrapper_subclass is not None and torch_private.no_torch_function is not None
