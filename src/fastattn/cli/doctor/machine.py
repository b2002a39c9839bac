"""The machine as one value: Python, the system, torch with its CUDA and cuDNN, the devices, threads, the C++ compiler."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import dataclass

import torch

from fastattn.environment.device import Device
from fastattn.environment.text import first_line


@dataclass(frozen=True, slots=True)
class Machine:
    """What fastattn runs on. `why_no_cuda` is None where there is a CUDA device."""

    python: str
    executable: str
    system: str
    torch: str
    cuda: str | None  # the runtime torch was built with
    cudnn: str | None  # the one that was loaded
    why_no_cuda: str | None
    devices: tuple[Device, ...]  # the CPU first
    threads: int
    cpus: int
    compiler: str | None  # for C++: flex_attention on the CPU needs one


def this_machine() -> Machine:
    """This machine, now."""
    cpu = Device.of(torch.device("cpu"))
    return Machine(
        python=platform.python_version(),
        executable=sys.executable,
        system=" ".join([platform.system(), platform.release(), platform.machine(), *platform.libc_ver()]).strip(),
        torch=cpu.torch,
        cuda=torch.version.cuda or torch.version.hip,
        cudnn=_cudnn(),
        why_no_cuda=_why_no_cuda(),
        devices=(cpu, *_cuda_devices()),
        threads=torch.get_num_threads(),
        cpus=os.cpu_count() or 1,
        compiler=_compiler(),
    )


def _cuda_devices() -> list[Device]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [Device.of(torch.device("cuda", index)) for index in range(count)]


def _why_no_cuda() -> str | None:
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        has_driver = shutil.which("nvidia-smi") is not None
        return "this torch is built without it, for a CPU alone" if has_driver else "this machine has none"
    try:
        torch.cuda.init()
    except Exception as error:
        return first_line(error) or type(error).__name__
    return "torch finds no device"


def _cudnn() -> str | None:
    try:
        number = torch.backends.cudnn.version()
    except RuntimeError as error:  # another cuDNN than torch was built with
        return first_line(error) or "unusable"
    if not number:
        return None
    major = 10_000 if number >= 90_000 else 1_000
    return f"{number // major}.{number % major // 100}.{number % 100}"


def _compiler() -> str | None:
    """Where the C++ compiler is that torch's inductor would call."""
    usual = {"Darwin": "clang++", "Windows": "cl"}.get(platform.system(), "g++")
    return shutil.which(os.environ.get("CXX", usual))
