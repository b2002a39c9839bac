"""gpu_check.py --rehearse: a made-up GPU on the CPU, with stubs in the place of the libraries, and a clock that is told.

Nothing is learnt of a kernel: what is tried is the plan, on the very path that the real one takes. COSTS_S are what its
steps may take on an H100, on the safe side; they stand for the time that passes.
"""

from __future__ import annotations

import queue
import sys
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

SUPPORT = Path(__file__).resolve().parents[1] / "tests" / "support"
STUBS = (
    "torch_cuda",
    "torch_lower",
    "torch_varlen",
    "flash_attn_3",
    "cudnn_frontend",
    "xformers",
    "sage_1",
)  # what one transfer brings
COSTS_S = {  # of a child until its first answer, a problem of the workload, an answer of a kernel
    "start": 12.0, "workload": 8.0, "verify": 0.05, "special": 1.0,
}  # fmt: skip
_is_on = False


def where(device: str) -> torch.device:
    """Where tensors of that device are made: on the CPU while this is a rehearsal."""
    return torch.device("cpu" if _is_on else device)


def small(case: Any) -> Any:
    """A problem of the workload cut to what a CPU does at once, with its layout, groups and masks."""
    group = case.q_heads // case.kv_heads
    kv_heads = min(case.kv_heads, 2)
    return replace(
        case, batch=min(case.batch, 2), kv_heads=kv_heads, q_heads=group * kv_heads, q_len=min(case.q_len, 40),
        kv_len=min(case.kv_len, 48 if case.q_len != case.kv_len else 40),
    )  # fmt: skip


@contextmanager
def made_up_gpu(is_wanted: bool = True) -> Generator[None]:
    """An H100 with the libraries of STUBS, until the block ends; nothing where it is not wanted."""
    global _is_on
    if not is_wanted:
        yield
        return
    sys.path.insert(0, str(SUPPORT))
    import pytest
    from fakes import Clock, turn
    from library_grid import installed

    from fastattn.environment.device import Device
    from fastattn.problems.rewriting import caches

    h100 = Device("cuda", "made-up H100 132sm", 90, cuda="13.0", cudnn=91900)
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setattr(Device, "of", staticmethod(lambda device: h100))
        patch.setattr(caches, "is_on_gpu", lambda lengths: isinstance(lengths, torch.Tensor))
        patch.setattr(caches, "is_readable", lambda lengths: not isinstance(lengths, torch.Tensor))
        for name in STUBS:
            stack.enter_context(installed(import_module(f"stubs.{name}").STUB, patch))
        turn(patch, Clock({"default": 2e-4}, other=3e-4))  # tuning asks it for times, and spends none
        _is_on = True
        try:
            yield
        finally:
            _is_on = False


class Clock:
    """The time that passes, and waiting for a child's next line."""

    def now(self) -> float:
        return time.monotonic()

    def wait(self, lines: queue.Queue[str | None], seconds: float) -> str | None:
        """The next line, None at the end. Raises queue.Empty after that many seconds."""
        return lines.get(timeout=max(0.0, seconds))

    def tell(self, what: str, share: float, end: float) -> bool:
        """A step of that kind is over; False where it would not have been before `end`."""
        return True


class ToldClock(Clock):
    """Stands but for what it is told: COSTS_S of each step. A child that says nothing for HANGS_S hangs."""

    HANGS_S = 120.0

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def wait(self, lines: queue.Queue[str | None], seconds: float) -> str | None:
        if seconds <= 0:
            raise queue.Empty
        try:
            return lines.get(timeout=self.HANGS_S)
        except queue.Empty:
            self._now += seconds
            raise

    def tell(self, what: str, share: float, end: float) -> bool:
        then = self._now + COSTS_S[what] * share
        self._now = min(then, end)
        return then <= end
