"""What trials and verdicts are filed under: the libraries that are installed, with all that changes what they do."""

from __future__ import annotations

import os
from functools import cache

from fastattn.kernels.libraries import catalogue

TORCH_ENVIRONMENT = ("TORCH_CUDNN_SDPA_",)  # what F.sdpa itself reads


def tag_of(distribution: str, version: str | None) -> str:
    """What a trial is filed under: the distribution, its version, what came compiled, and the variables that change it."""
    library = catalogue.library_of(distribution)
    prefixes = TORCH_ENVIRONMENT if distribution == "torch" else library.environment if library else ()
    compiled = came_compiled(distribution)
    return " ".join([distribution, str(version), *([f"compiled {compiled}"] if compiled else []), *_told(prefixes)])


@cache
def came_compiled(distribution: str) -> str | None:
    """Version of what brings a library's kernels compiled, None where that is not installed."""
    library = catalogue.library_of(distribution)
    return catalogue.version_of(library.compiled_by) if library is not None and library.compiled_by else None


def installed_for(device_type: str) -> dict[str, str]:
    """The libraries that are installed and may have kernels for such a device: distribution -> tag."""
    of_torch = {"torch": " ".join(_told(TORCH_ENVIRONMENT))} if device_type == "cuda" else {}
    return {**of_torch, **{name: tag_of(name, version) for name, version in distributions_for(device_type)}}


@cache
def distributions_for(device_type: str) -> list[tuple[str, str]]:
    """(distribution, version) of each of them: looked up once, as every stored verdict asks."""
    found = (catalogue.installed_distribution(each) for each in catalogue.LIBRARIES if each.device == device_type)
    return list(filter(None, found))


def _told(prefixes: tuple[str, ...]) -> list[str]:
    """The variables of the environment that begin so."""
    told = sorted(os.environ.items()) if prefixes else ()
    return [f"{name}={value}" for name, value in told if name.startswith(prefixes)]
