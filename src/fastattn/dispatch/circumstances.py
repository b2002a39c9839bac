"""When a miss may be tuned, when only what is stored may serve, and when fastattn keeps out of the way: one table."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.environment import torch_private
from fastattn.environment.settings import Settings

# What a miss may do.
TUNE = "tune"  # look in the store, else tune
STORED = "stored"  # serve what is stored where it is exact and safe, else the default; record the miss
PASS = "pass"  # F.sdpa, nothing learnt and nothing remembered


class Circumstances(NamedTuple):
    """The circumstances of one call; all False is an ordinary eager call."""

    off: bool = False
    foreign: bool = False
    other_device: bool = False
    function_mode: bool = False
    dispatch_mode: bool = False
    functorch: bool = False
    forward_ad: bool = False
    jit_tracing: bool = False
    in_graph: bool = False
    restricted: bool = False
    empty: bool = False
    capturing: bool = False
    deterministic: bool = False
    distributed: bool = False
    switched_off: bool = False
    cached: bool = False
    spent: bool = False


# The first row that holds decides.
RULES: tuple[tuple[str, str, str], ...] = (
    ("off", PASS, "mode is off"),
    ("foreign", PASS, "an input is not a plain strided Tensor or Parameter"),
    ("other_device", PASS, "only cpu and cuda are served; other devices, meta and fake tensors go to F.sdpa"),
    ("function_mode", PASS, "a torch function mode is active"),
    ("dispatch_mode", PASS, "a torch dispatch mode is active"),
    ("functorch", PASS, "inside a torch.func transform"),
    ("forward_ad", PASS, "forward-mode differentiation is active"),
    ("jit_tracing", PASS, "torch.jit is tracing"),
    ("restricted", PASS, "inside sdpa_kernel(...): F.sdpa obeys it"),
    ("empty", PASS, "a dimension is 0"),
    ("in_graph", STORED, "torch.compile is tracing: nothing may be timed"),
    ("capturing", STORED, "a CUDA graph is being captured: nothing may be timed"),
    ("deterministic", STORED, "torch.use_deterministic_algorithms is on: nothing may be chosen by timing"),
    (
        "distributed",
        STORED,
        "a process group of several ranks: all must choose alike (FASTATTN_MANIFEST, fastattn.sync)",
    ),
    ("switched_off", STORED, "a backend of F.sdpa is switched off: it is not what it usually is, so nothing is timed"),
    ("cached", STORED, "mode is cached: nothing is tuned"),
    ("spent", STORED, "the process's tuning budget is spent"),
)


# The switches of torch.backends.cuda.enable_*_sdp that F.sdpa asks on a device (sdp_utils_cpp.cpp and sdp_utils.cpp).
ASKED_BY_SDPA = {"cpu": ("flash", "math"), "cuda": ("flash", "efficient", "math", "cudnn")}

PRIORITY = "cuda:sdp_priority"  # sdpa_kernel([...], set_priority=True): of guard.READERS


@lru_cache(256)
def what_is_allowed(circumstances: Circumstances) -> tuple[str, str]:
    """(what a miss may do, why)."""
    for name, action, reason in RULES:
        if getattr(circumstances, name):
            return action, reason
    return TUNE, "an ordinary call"


def may_remember(circumstances: Circumstances) -> bool:
    """Whether the Call may be published: it must not outlive a passing circumstance that no guard sees."""
    is_passed = what_is_allowed(circumstances)[0] == PASS
    return not (is_passed or circumstances.capturing or circumstances.in_graph)


# Rows that pass a call on for a reason that a guard can see: the Settings, the device, the sizes, or the state that it reads.
SEEN_BY_GUARDS: dict[str, tuple[str, ...]] = {
    "off": (),
    "other_device": (),
    "empty": (),
    "restricted": ("unrestricted", *torch_private.BACKEND_SWITCHES, PRIORITY),
}


def what_passes_on(circumstances: Circumstances) -> str:
    """Name of the row that decides."""
    return next(name for name, *_ in RULES if getattr(circumstances, name))


_PLAIN = (Tensor, torch.nn.Parameter)


def _has_storage(x: Tensor) -> bool:
    """Where torch does not tell about torch.func, its wrapped tensors still have no memory of their own."""
    try:
        x.data_ptr()
    except RuntimeError:
        return False
    return True


def read_circumstances(tensors: list[Any], settings: Settings, spent: bool) -> Circumstances:
    """The Circumstances of a call on these tensors, read now. Reads nothing through a mode's own hooks."""
    plain = all(type(x) in _PLAIN for x in tensors)
    if torch_private.has_torch_function(*tensors) and not (plain and torch_private.only_default_device()):
        return Circumstances(off=settings.mode == "off", foreign=not plain, function_mode=plain)
    foreign = any(type(x) not in _PLAIN or x.is_nested or x.layout is not torch.strided for x in tensors)
    foreign = foreign or (not torch_private.KNOWS_FUNCTORCH and not all(map(_has_storage, tensors)))
    kind = "" if foreign else tensors[0].device.type
    switched_off = any(not torch_private.BACKEND_SWITCHES[name]() for name in ASKED_BY_SDPA.get(kind, ()))
    return Circumstances(
        off=settings.mode == "off",
        foreign=foreign,
        other_device=not foreign and kind not in ("cpu", "cuda"),
        dispatch_mode=bool(torch_private.dispatch_modes()),
        functorch=torch_private.functorch_level() is not None,
        forward_ad=torch_private.forward_ad._current_level >= 0,
        jit_tracing=torch.jit.is_tracing(),
        in_graph=torch.compiler.is_compiling(),
        restricted=is_restricted(kind, switched_off),
        empty=not foreign and any(0 in x.shape for x in tensors),
        capturing=kind == "cuda" and torch.cuda.is_current_stream_capturing(),
        deterministic=torch_private.deterministic(),
        distributed=ranks() > 1,
        switched_off=switched_off,
        cached=settings.mode == "cached",
        spent=spent,
    )


def is_inside_sdpa_kernel() -> bool:
    """Whether the call stands in a scope that names its backends."""
    return not torch_private.not_inside_sdpa_kernel()


def is_restricted(device_type: str, switched_off: bool) -> bool:
    """Whether the scope leaves a backend of the device out, or says in which order they are asked; CPUs ask for no order."""
    has_order = device_type == "cuda" and torch_private.sdp_priority() is not None
    return is_inside_sdpa_kernel() and (switched_off or has_order)


def ranks() -> int:
    """How many ranks the default process group has; 1 without one."""
    dist = torch.distributed
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


assert {name for name, _, _ in RULES} == set(Circumstances._fields)
