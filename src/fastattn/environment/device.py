"""The device as a value: what the silicon is, and the software that decides torch's own answers on it."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from dataclasses import dataclass
from functools import lru_cache

import torch


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
    def torch_version(self) -> tuple[int, int]:
        """(2, 13) of torch 2.13.0."""
        major, minor = re.findall(r"\d+", self.torch)[:2]
        return int(major), int(minor)

    @property
    def prefers_cudnn(self) -> bool:
        """Whether F.sdpa tries cuDNN's kernel first here: sdp_utils.cpp, check_prefer_cudnn_attention."""
        if os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED") == "1":
            return False
        is_known = self.capability in (90, 100, 103)  # to a torch built for CUDA 12
        is_for_13 = self.cuda.split(".")[0].isdigit() and int(self.cuda.split(".")[0]) >= 13
        return self.cudnn > 91500 and (is_known or (is_for_13 and self.capability // 10 in (9, 10)))

    @property
    def slug(self) -> str:
        """A directory name: readable, and exact by a digest of every field."""
        return _slug(self)


@lru_cache(64)
def _slug(device: Device) -> str:
    digest = hashlib.sha256(repr(device).encode()).hexdigest()[:10]
    words = f"torch{device.torch}-{device.name}"
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
