"""Which kernel F.sdpa takes: the filters of torch's own dispatcher, sdp_utils.cpp for CUDA and sdp_utils_cpp.cpp for the CPU.

They are not the limits of our rows, which enter the kernels below it: F.sdpa pads for its flash kernel, and knows nothing of
what a raw operator, a first call or a known fault rules out. The filters are those of torch 2.14; what older ones lack is a
row of SINCE, by the messages that the libraries of torch 2.11 to 2.15 hold.
"""

from __future__ import annotations

from fastattn.environment.device import Device
from fastattn.kernels import registry
from fastattn.planning.conversions import BY_NAME
from fastattn.planning.conversions.conversion import REQUIRED
from fastattn.problems.call_facts import CallFacts
from fastattn.problems.problem import Problem

HALF = ("float16", "bfloat16")
GRID = 65535
SINCE = {  # what torch's filters ask -> the torch that began to
    "cudnn drops by sixteenths": (2, 12),
    "cudnn has a grid": (2, 13),
    "efficient is aligned": (2, 13),  # pytorch#183484
    "cudnn takes 256": (2, 14),  # pytorch#185553, built with cuDNN frontend 1.24
    "efficient takes groups": (2, 14),  # pytorch#191085
}


def kernel_taken(p: Problem, device: Device, facts: CallFacts) -> str:
    """Name of the row of the kernel that F.sdpa takes for this call; torch_math where it would take none."""
    takes = (
        ("torch_cudnn", device.type == "cuda" and device.prefers_cudnn and takes_cudnn(p, device, facts)),
        ("torch_flash", (takes_flash if device.type == "cuda" else takes_cpu_flash)(p, device, facts)),
        ("torch_efficient", device.type == "cuda" and takes_efficient(p, device, facts)),
        ("torch_math", "math" not in facts.switched_off),
        ("torch_cudnn", device.type == "cuda" and takes_cudnn(p, device, facts)),
    )
    return next((name for name, is_taken in takes if is_taken), "torch_math")


def _asks(device: Device, what: str) -> bool:
    return device.torch_version >= SINCE[what]


def is_masked(p: Problem, facts: CallFacts) -> bool:
    """Whether F.sdpa is given a mask: the caller's, or the triangle or window that its is_causal does not mean."""
    default = registry.row_for("default", p.device)
    return p.mask is not None or (default is not None and BY_NAME["mask_dense"].when(default, p, facts) == REQUIRED)


def takes_cpu_flash(p: Problem, device: Device, facts: CallFacts) -> bool:
    """sdp_utils_cpp.cpp, use_flash_attention_cpp."""
    return (
        "flash" not in facts.switched_off
        and not (p.dropout or p.mask_grad or facts.mask_asks_grad)  # a mask that asks, whatever grad mode says
        and p.head_dim == p.head_dim_v
        and facts.dense_last_dims
        and _has_tokens(p)
    )


def takes_flash(p: Problem, device: Device, facts: CallFacts) -> bool:
    """sdp_utils.cpp, can_use_flash_attention. F.sdpa pads head_dim to a multiple of 8 for it."""
    return (
        "flash" not in facts.switched_off
        and p.dtype in HALF
        and 80 <= device.capability <= 121
        and p.head_dim == p.head_dim_v <= 256
        and not is_masked(p, facts)
        and (p.causal is None or p.q_len == p.kv_len)
        and not (p.needs_grad and _trains_no_wide_heads(p, device))
        and facts.dense_last_dims
        and _has_tokens(p)
    )


def _trains_no_wide_heads(p: Problem, device: Device) -> bool:
    """check_requires_grad_and_head_dim_gt192_constraints_on_sm86_89_or_120."""
    is_small = 86 <= device.capability <= 89 or device.capability in (120, 121)
    return is_small and p.head_dim > 192 and (p.dropout or p.head_dim <= 224)


def takes_efficient(p: Problem, device: Device, facts: CallFacts) -> bool:
    """sdp_utils.cpp, can_use_mem_efficient_attention. It has no filter for determinism: its backward is told to be."""
    step = _gemm_alignment(p, device)
    return (
        "efficient" not in facts.switched_off
        and p.dtype in (("float32", "float16", "bfloat16") if device.capability >= 80 else ("float32", "float16"))
        and 50 <= device.capability <= 121
        and p.head_dim > 0 and p.head_dim_v > 0
        and p.head_dim % step == 0 and p.head_dim_v % step == 0
        and (all(facts.aligned) or device.capability < 80 or not _asks(device, "efficient is aligned"))
        and (p.group == 1 or _asks(device, "efficient takes groups"))
        and facts.dense_last_dims and (facts.dense_mask or p.mask is None)
        and _has_tokens(p)
    )  # fmt: skip


def _gemm_alignment(p: Problem, device: Device) -> int:
    """minimum_gemm_alignment: 16 bytes where tensor cores are used."""
    if device.capability >= 80 or (device.capability >= 70 and p.dtype in HALF):
        return 16 // p.torch_dtype.itemsize
    return 1


def takes_cudnn(p: Problem, device: Device, facts: CallFacts) -> bool:
    """sdp_utils.cpp, can_use_cudnn_attention."""
    return (
        "cudnn" not in facts.switched_off
        and p.dtype in HALF
        and 80 <= device.capability <= 121
        and not p.deterministic
        and not (p.dropout and (p.q_len == 1 or 91100 < device.cudnn < 91400))
        and (facts.sixteenths or not p.dropout or not _asks(device, "cudnn drops by sixteenths"))
        and not (p.mask_grad or facts.mask_asks_grad)
        and (max(p.batch, p.q_heads) <= GRID or not _asks(device, "cudnn has a grid"))
        and p.head_dim % 8 == 0 and p.head_dim_v % 8 == 0
        and _cudnn_takes_head_dims(p, device)
        and p.kv_len != 1
        and facts.dense_last_dims and (facts.dense_mask or p.mask is None)
        and _has_tokens(p)
    )  # fmt: skip


def _cudnn_takes_head_dims(p: Problem, device: Device) -> bool:
    """check_cudnn_tensor_shapes and check_cudnn_d256_bprop_head_dim."""
    dims = (p.head_dim, p.head_dim_v)
    if max(dims) <= 128:
        return True
    if device.capability != 90 and not 100 <= device.capability < 110:
        return False
    is_wide = device.cudnn > (92500 if device.capability == 107 else 92200) and _asks(device, "cudnn takes 256")
    if not is_wide:
        return dims == (192, 128) and device.cudnn >= 91100
    return max(dims) <= 256 and (not p.needs_grad or dims in ((192, 128), (256, 256)))


def _has_tokens(p: Problem) -> bool:
    return p.q_len > 0 and p.kv_len > 0
