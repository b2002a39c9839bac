"""The environment as a value: what the silicon and the software are, and what torch's switches say now.

Private names of torch are reached only from here, each with a public or plain stand-in: without all of them fastattn
still works, slower (a test removes them).
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional

PRIVATE = {
    "sdpa": "torch._C._nn.scaled_dot_product_attention",  # F's own, even where F was patched before us
    "cpu_flash": "torch._scaled_dot_product_flash_attention_for_cpu",
    "cuda_flash": "torch._scaled_dot_product_flash_attention",
    "cuda_efficient": "torch._scaled_dot_product_efficient_attention",
    "cuda_cudnn": "torch._scaled_dot_product_cudnn_attention",
    "cuda_flash_forward": "torch.ops.aten._flash_attention_forward.default",
    "cuda_efficient_forward": "torch.ops.aten._efficient_attention_forward.default",
    "math": "torch._scaled_dot_product_attention_math",
    "tensor_guards": "torch._C._dynamo.guards.TensorGuards",
    "has_torch_function": "torch._C._has_torch_function_variadic",
    "function_modes": "torch.overrides._get_current_function_mode_stack",
    "dispatch_modes": "torch._C._len_torch_dispatch_stack",
    "functorch_level": "torch._C._functorch.maybe_current_level",
    "is_batched": "torch._C._functorch.is_legacy_batchedtensor",
    "forward_ad": "torch.autograd.forward_ad",
    "deterministic": "torch._C._get_deterministic_algorithms",
    "precision": "torch._C._get_fp32_precision_getter",
    "flash_on": "torch._C._get_flash_sdp_enabled",
    "efficient_on": "torch._C._get_mem_efficient_sdp_enabled",
    "math_on": "torch._C._get_math_sdp_enabled",
    "cudnn_on": "torch._C._get_cudnn_sdp_enabled",
    "overrideable_on": "torch._C._get_overrideable_sdp_enabled",
    "math_reduction": "torch._C._get_math_sdp_allow_fp16_bf16_reduction",
}


def _find(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        try:
            return getattr(import_module(module), name)
        except ModuleNotFoundError:
            return getattr(_find(module), name)
    except Exception:
        return None


def private(name: str) -> Any:
    """The private torch object of that row of PRIVATE, or None where this torch has it not."""
    return _find(PRIVATE[name])


def _or(name: str, stand_in: Any) -> Any:
    found = private(name)
    return stand_in if found is None else found


class _NoForwardAD:
    _current_level = -1


sdpa: Callable[..., torch.Tensor] = _or("sdpa", torch.nn.functional.scaled_dot_product_attention)
has_torch_function: Callable[..., bool] = _or("has_torch_function", lambda *ts: torch.overrides.has_torch_function(ts))
_function_modes: Callable[[], list[Any]] = _or("function_modes", list)
dispatch_modes: Callable[[], int] = _or("dispatch_modes", lambda: 0)
functorch_level: Callable[[], int | None] = _or("functorch_level", lambda: None)
is_batched: Callable[[torch.Tensor], bool] = _or(
    "is_batched", lambda x: False
)  # torch.autograd.grad(is_grads_batched=True)
KNOWS_FUNCTORCH = private("functorch_level") is not None
forward_ad: Any = _or("forward_ad", _NoForwardAD)
deterministic: Callable[[], bool] = _or("deterministic", torch.are_deterministic_algorithms_enabled)
# The four switches of torch.backends.cuda.enable_*_sdp, which hold on the CPU too.
BACKEND_SWITCHES: dict[str, Callable[[], bool]] = {
    "flash": _or("flash_on", torch.backends.cuda.flash_sdp_enabled),
    "efficient": _or("efficient_on", torch.backends.cuda.mem_efficient_sdp_enabled),
    "math": _or("math_on", torch.backends.cuda.math_sdp_enabled),
    "cudnn": _or("cudnn_on", torch.backends.cuda.cudnn_sdp_enabled),
}
# No public call touches this fifth switch but sdpa_kernel(), which turns off whatever it was not given: it tells an
# sdpa_kernel(...) scope from enable_*_sdp(False).
unrestricted: Callable[[], bool] = _or("overrideable_on", lambda: True)
math_reduction: Callable[[], bool] = _or("math_reduction", lambda: False)
_precision_getter = private("precision")


def precision() -> str:
    """How float32 products may be rounded now, per library: "ieee" (also where nothing was set), "tf32" or "bf16"."""
    if _precision_getter is None:
        try:
            return torch.get_float32_matmul_precision()
        except RuntimeError:  # raised once the newer fp32_precision settings were used
            return "unknown"
    cuda, mkldnn = _precision_getter("cuda", "matmul"), _precision_getter("mkldnn", "matmul")
    return f"{cuda if cuda != 'none' else 'ieee'},{mkldnn if mkldnn != 'none' else 'ieee'}"


def flash_impl() -> str:
    """Which flash implementation torch.nn.attention.activate_flash_attention_impl chose, "" for its own."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return str(current() or "") if current else ""


def only_default_device() -> bool:
    """Whether torch.set_default_device, or `with torch.device(...)`, is all that stands on the function mode stack."""
    modes = _function_modes()
    return bool(modes) and all(type(mode).__name__ == "DeviceContext" for mode in modes)


class State(NamedTuple):
    """torch's switches that a decision may depend on, read once for a call key."""

    grad: bool
    autocast: torch.dtype | None
    deterministic: bool
    threads: int
    precision: str
    math_reduction: bool
    flash_impl: str
    off: tuple[str, ...]  # backends switched off


def state(device_type: str) -> State:
    """torch's switches now, as they hold for tensors on `device_type`."""
    return State(
        grad=torch.is_grad_enabled(),
        autocast=torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None,
        deterministic=deterministic(),
        threads=torch.get_num_threads() if device_type == "cpu" else 0,
        precision=precision(),
        math_reduction=math_reduction(),
        flash_impl=flash_impl(),
        off=tuple(name for name, is_on in BACKEND_SWITCHES.items() if not is_on()),
    )


@dataclass(frozen=True, slots=True)
class Device:
    """One kind of silicon with the software that decides torch's own answers on it.

    `capability` is the compute capability as one number (90 for sm90), 0 on the CPU.
    """

    type: str
    name: str
    capability: int = 0
    torch: str = torch.__version__
    torch_git: str = ""
    cuda: str = ""
    cudnn: int = 0

    @staticmethod
    def of(device: torch.device) -> Device:
        """The Device that a torch.device stands for on this machine now."""
        return _device(device.type, device.index if device.type == "cuda" else None)

    @property
    def prefers_cudnn(self) -> bool:
        """Whether F.sdpa tries cuDNN's kernel first here: sdp_utils.cpp, check_prefer_cudnn_attention."""
        is_told = os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED") == "1"
        return self.capability in (90, 100, 103) and self.cudnn > 91500 and not is_told

    @property
    def slug(self) -> str:
        """A directory name: readable, and exact by a digest of every field."""
        digest = hashlib.sha256(repr(self).encode()).hexdigest()[:10]
        words = f"torch{self.torch}-{self.name}"
        return re.sub(r"[^a-z0-9.]+", "-", words.lower()).strip("-")[:60] + f"-{digest}"


@lru_cache(64)
def _device(type: str, index: int | None) -> Device:
    git = str(getattr(torch.version, "git_version", "") or "")
    if type == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
        return Device(
            "cuda",
            f"{properties.name} {properties.multi_processor_count}sm",
            10 * properties.major + properties.minor,
            torch_git=git,
            cuda=str(torch.version.cuda or torch.version.hip or ""),
            cudnn=int(torch.backends.cudnn.version() or 0),
        )
    return Device(type, _cpu_name() if type == "cpu" else type, torch_git=git)


def _cpu_name() -> str:
    """Vendor, family and the instruction sets kernels choose by. Model names of virtual machines say too little."""
    fields: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                if not key.strip():
                    break
                fields[key.strip()] = value.strip()
    except OSError:
        fields["model name"] = platform.processor() or platform.machine()
    flags = set(fields.get("flags", "").split())
    sets = sorted(flags & {"avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "amx_int8"})
    family = "-".join(fields[k] for k in ("cpu family", "model") if k in fields)
    name = fields.get("model name") or platform.machine()
    return " ".join([name, family, torch.backends.cpu.get_cpu_capability(), *sets, f"{os.cpu_count()}cpu"]).strip()
