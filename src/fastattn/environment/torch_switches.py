"""Every switch of torch that changes the numbers or the speed of attention: one table.

What the table names is part of a Problem (`Problem.switches` names those that are not as torch starts), so that no Verdict
is used under other switches than it was made under. Switches that have a field of their own (threads, determinism, autocast,
grad mode, the flash implementation, the SDPA backends) are in torch_state.py. tests/environment/test_torch_switches.py
compares the table with what torch lets one set.
"""

import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from fastattn.environment import torch_private

HALF = ("float16", "bfloat16")


class Switch(NamedTuple):
    """One row. usual: what torch starts with, in all ways it may say so."""

    name: str
    device: str
    usual: tuple[Any, ...]
    read: Callable[[], Any]  # a guard calls it, so it is torch's own function where there is one
    asked_by: str = "products"  # who depends on it: torch's own products, its "math" backend, or nobody's plan ("")
    # dtypes in which F.sdpa itself may lose so much by it that another candidate would have won
    decides_default: tuple[str, ...] = ()


def _public(path: str, usual: Any) -> Callable[[], Any]:
    """A reader of an attribute under torch.backends, or of a function's answer; what a torch does not have is as usual."""
    *modules, name = path.split(".")

    def read() -> Any:
        try:
            found: Any = torch.backends
            for part in modules:
                found = getattr(found, part)
            found = getattr(found, name)
            return found() if callable(found) else found
        except AttributeError:
            return usual
        except RuntimeError:  # torch's older and newer settings were mixed
            return "unknown"

    return read


def _of_cuda(path: str, usual: bool, asked_by: str = "products") -> Switch:
    return Switch(path, "cuda", (usual,), _public(path, usual), asked_by)


def _library(path: str) -> Switch:
    """A function that names the preferred library where it is called without one."""
    read = _public(path, None)
    return Switch(path, "cuda", ("Default", "Cublas", None), lambda: getattr(read(), "name", None))


_MATH_REDUCTION = "cuda.fp16_bf16_reduction_math_sdp"

TABLE: tuple[Switch, ...] = (
    Switch("mkldnn.enabled", "cpu", (True,), torch_private.mkldnn_enabled, decides_default=HALF),
    Switch("mkldnn.deterministic", "cpu", (False,), torch_private.mkldnn_deterministic),
    Switch("mkldnn.matmul.fp32_precision", "cpu", ("ieee", "none"), torch_private.cpu_precision),
    # oneDNN's older name for it; torch keeps it for Intel's GPUs alone, and says so where it is set
    Switch("mkldnn.allow_tf32", "cpu", (False, None), torch_private.mkldnn_allow_tf32, asked_by=""),
    Switch("cpu.fp16_reduction", "cpu", (False,), torch_private.cpu_fp16_reduction, asked_by=""),  # on ARM
    Switch("flush_denormal", "cpu", (False,), lambda: _SMALLEST_NORMAL * 0.5 == 0, asked_by=""),
    Switch(_MATH_REDUCTION, "cpu", (False,), torch_private.math_reduction, asked_by="math"),
    Switch(_MATH_REDUCTION, "cuda", (False,), torch_private.math_reduction, asked_by="math"),
    Switch("cuda.matmul.fp32_precision", "cuda", ("ieee", "none"), torch_private.cuda_precision),
    _of_cuda("cuda.matmul.allow_fp16_reduced_precision_reduction", True),
    _of_cuda("cuda.matmul.allow_fp16_reduced_precision_reduction_split_k", True),
    _of_cuda("cuda.matmul.allow_bf16_reduced_precision_reduction", True),
    _of_cuda("cuda.matmul.allow_bf16_reduced_precision_reduction_split_k", True),
    _of_cuda("cuda.matmul.allow_fp16_accumulation", False),
    _library("cuda.preferred_blas_library"),
    _library("cuda.preferred_rocm_fa_library"),
    _of_cuda("cudnn.enabled", True, asked_by=""),
    _of_cuda("cudnn.deterministic", False, asked_by=""),
    Switch("sdp_priority", "cuda", (None,), torch_private.sdp_priority, asked_by=""),
)
_SMALLEST_NORMAL = 2.2250738585072014e-308  # half of it is a denormal, 0 where the processor flushes those

# Read by torch, oneDNN, MKL or CUDA at their first use: the same for the whole life of a process.
AT_START: dict[str, tuple[str, ...]] = {
    "cpu": (
        "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_CPU_ISA_HINTS", "DNNL_CPU_ISA_HINTS",
        "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE",
        "TORCH_MKLDNN_MATMUL_MIN_DIM", "TORCH_MKLDNN_MATMUL_MIN_SIZE",
        "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "MKL_DISABLE_FAST_MM", "MKL_NUM_THREADS", "MKL_DOMAIN_NUM_THREADS",
        "MKL_DYNAMIC", "OPENBLAS_CORETYPE", "OPENBLAS_NUM_THREADS", "BLIS_NUM_THREADS",
    ),
    "cuda": (
        "NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE", "DISABLE_ADDMM_CUDA_LT",
        "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL",  # TORCH_CUDNN_SDPA_* stands with torch's version in every Trial
        "CUDA_LAUNCH_BLOCKING", "PYTORCH_NO_CUDA_MEMORY_CACHING",
    ),
}  # fmt: skip

OF_DEVICE: dict[str, tuple[Switch, ...]] = {
    device: tuple(switch for switch in TABLE if switch.device == device) for device in AT_START
}


@lru_cache(8)
def at_start(device_type: str) -> tuple[str, ...]:
    """The environment's variables that are set for `device_type`, as NAME=value; asked once a process, as libraries do."""
    names = AT_START.get(device_type, ())
    return tuple(f"{name}={value}" for name in names if (value := os.environ.get(name, "")))


def unusual(device_type: str) -> tuple[str, ...]:
    """The switches that are not as torch starts, as name=value."""
    changed = [f"{s.name}={value}" for s in OF_DEVICE.get(device_type, ()) if (value := s.read()) not in s.usual]
    return (*changed, *at_start(device_type))


def read_by(device_type: str, dtype: str, asks: tuple[str, ...], *, is_default: bool) -> list[str]:
    """Names of the switches that the guard of a Call must compare: those its plan depends on, and any that is unusual now."""
    return [
        f"{device_type}:{s.name}"
        for s in OF_DEVICE.get(device_type, ())
        if (dtype in s.decides_default if is_default else s.asked_by in asks) or s.read() not in s.usual
    ]


READERS: dict[str, Callable[[], Any]] = {f"{switch.device}:{switch.name}": switch.read for switch in TABLE}
