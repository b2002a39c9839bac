"""torch's switches that a decision may depend on, read once for a call key."""

from typing import NamedTuple

import torch

from fastattn.environment.torch_private import BACKEND_SWITCHES, deterministic
from fastattn.environment.torch_switches import unusual


def flash_impl() -> str:
    """Which flash implementation torch.nn.attention.activate_flash_attention_impl chose, "" for its own."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return str(current() or "") if current else ""


class TorchState(NamedTuple):
    """torch's switches that a decision may depend on, read once for a call key."""

    grad: bool
    autocast: torch.dtype | None
    deterministic: bool
    threads: int
    switches: tuple[str, ...]  # of torch_switches.py, where they are not as torch starts
    flash_impl: str
    off: tuple[str, ...]  # backends switched off


def torch_state(device_type: str) -> TorchState:
    """torch's switches now, as they hold for tensors on `device_type`."""
    return TorchState(
        grad=torch.is_grad_enabled(),
        autocast=torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None,
        deterministic=deterministic(),
        threads=torch.get_num_threads() if device_type == "cpu" else 0,
        switches=unusual(device_type),
        flash_impl=flash_impl(),
        off=tuple(name for name, is_on in BACKEND_SWITCHES.items() if not is_on()),
    )
