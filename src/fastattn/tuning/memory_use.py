"""How many bytes a call uses beyond its inputs and output, and keeps for its backward; and how many there are.

On the CPU torch.profiler would tell, but its first use costs 1.6 s and prints; so the tensors that operators make are
followed through a dispatch mode instead (benchmarks/cpu.py compares both). Scratch inside one operator is not seen: for
the CPU's fused kernel that is some hundred KiB a thread.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def free_bytes(device: torch.device) -> float:
    """Bytes that may still be had on a device; infinite where the system does not tell."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return min(_available(), _left_in_cgroup(), _left_of_address_space())


def _available() -> float:
    return _kibibytes("/proc/meminfo", "MemAvailable:")


def _left_in_cgroup() -> float:
    """What the limits of this process's control groups leave: of version 2, each group above it included, or version 1."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return float("inf")
    left = [float("inf")]
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers and "memory" not in controllers.split(","):
            continue
        root = CGROUPS / "memory" if controllers else CGROUPS
        limit, used = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        )
        group = root / path.lstrip("/")
        for folder in (
            group,
            *group.parents,
        ):  # in a container the path may be the host's: then its root is what counts
            if folder in (root.parent, Path("/")):
                break
            left.append(_number(folder / limit) - _number(folder / used, 0.0))
    return max(0.0, min(left))


def _left_of_address_space() -> float:
    """What RLIMIT_AS leaves."""
    try:
        import resource
    except ImportError:  # Windows
        return float("inf")
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return float("inf")
    return max(0.0, limit - _kibibytes("/proc/self/status", "VmSize:"))


def _kibibytes(file: str, name: str) -> float:
    """A line of /proc in bytes; infinite where there is none."""
    try:
        with open(file, encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
    except (OSError, ValueError, StopIteration):
        return float("inf")


def _number(file: Path, otherwise: float = float("inf")) -> float:
    try:
        return float(file.read_text(encoding="ascii"))  # "max" is no number: no limit
    except (OSError, ValueError):
        return otherwise


CGROUPS = Path("/sys/fs/cgroup")


def release_memory(device: torch.device) -> None:
    """Give back what failed attempts left behind, so that it does not stand in the way of the next."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class _Meter(TorchDispatchMode):
    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._seen = {x.untyped_storage().data_ptr() for x in known}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch._dynamo is imported, 1.9 s, to keep it away from a mode that nothing compiles

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._count(x)
        return out

    def _count(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self._seen or not size:
            return
        self._seen.add(place)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, place, size)

    def _free(self, place: int, size: int) -> None:
        self._seen.discard(place)
        self.live -= size


def _profiled(run: Callable[[], Any]) -> tuple[Any, int]:
    """(what it returned, bytes it allocated: no less than its peak)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out = run()
    return out, sum(max(0, event.self_cpu_memory_usage) for event in profile.events() or ())


@contextmanager
def _saved(sizes: dict[int, int], known: set[int]) -> Generator[None]:
    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield


def _raise_peak(device: torch.device, highest: int) -> None:
    """Have the peak again that the caller's statistics knew: what is missing is allocated for a moment."""
    if torch.cuda.max_memory_allocated(device) < highest:
        with suppress(torch.OutOfMemoryError):
            torch.empty(highest - torch.cuda.memory_allocated(device), dtype=torch.uint8, device=device)


def measure_memory(run: Callable[[], Any], inputs: list[Tensor], compiles: bool = False) -> tuple[Any, int, int]:
    """(what it returned, temporary bytes at the peak, bytes saved for backward), inputs and outputs left out of both.

    compiles: what it runs is compiled, which a dispatch mode would switch off.
    """
    known = {x.untyped_storage().data_ptr() for x in inputs}
    sizes: dict[int, int] = {}
    on = inputs[0].device
    if on.type == "cuda":
        torch.cuda.synchronize(on)
        before, highest = torch.cuda.memory_allocated(on), torch.cuda.max_memory_allocated(on)
        torch.cuda.reset_peak_memory_stats(on)
        try:
            with _saved(sizes, known):
                out = run()
            peak = torch.cuda.max_memory_allocated(on) - before
        finally:
            _raise_peak(on, highest)
    elif compiles:
        with _saved(sizes, known):
            out, peak = _profiled(run)
    else:
        meter = _Meter(inputs)
        with _saved(sizes, known), meter:
            out = run()
        peak = meter.peak
    own = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tree_leaves(out)}
    saved = sum(size for place, size in sizes.items() if place not in own)
    return out, max(0, peak - sum(own.values())), saved
