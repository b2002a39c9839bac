"""Builds of FlashAttention 2, 3, 4 and SageAttention from the Hugging Face hub, where the local cache has them already.

The library `kernels` brings no kernel of its own; what its repositories hold is called as the library itself would be. Nothing
is downloaded: its get_kernel would, and so would get_local_kernel for a build that depends on other kernels, which is refused.
The newest version in the cache with a build for this system is taken. Considered only where it is named.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fastattn.kernels import Kernel, OneOf, Run, require_keywords
from fastattn.kernels.adapters import flash_attn_2, flash_attn_3, flash_attn_4, sageattention

WHERE = (
    ("KERNELS_CACHE", ""),
    ("HF_HUB_CACHE", ""),
    ("HUGGINGFACE_HUB_CACHE", ""),
    ("HF_HOME", "hub"),
    ("XDG_CACHE_HOME", "huggingface/hub"),
)


def load(repository: str, of: Callable[[Any], Run]) -> Run:
    """of: what makes a run of the kernel's module."""
    from kernels import get_local_kernel  # pyright: ignore[reportMissingImports]

    get = require_keywords(get_local_kernel, "repo_path")
    cache = _cache()
    reasons = []
    for snapshot in snapshots(repository, cache):
        if _depends_on_others(snapshot):
            reasons.append(f"{snapshot.name[:12]} depends on other kernels, which `kernels` would download")
            continue
        try:
            return of(get(repo_path=snapshot))
        except Exception as error:
            reasons.append(f"{snapshot.name[:12]}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    raise FileNotFoundError(f"no build of {repository} in {cache} can be used: {'; '.join(reasons) or 'none is there'}")


def _cache() -> Path:
    """Where huggingface_hub keeps its cache, or `kernels` its own."""
    for name, below in WHERE:
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser() / below
    return Path("~/.cache/huggingface/hub").expanduser()


def snapshots(repository: str, cache: Path) -> list[Path]:
    """What LOCAL_KERNELS names, then what the cache has: the highest version first, then the newest."""
    named = (entry.partition("=") for entry in os.environ.get("LOCAL_KERNELS", "").split(":"))
    found = [Path(path) for name, _, path in named if name == repository and path]
    for kind in ("kernels", "models"):  # repositories of kernels were models until 2026
        folder = cache / f"{kind}--{repository.replace('/', '--')}"
        refs = [ref for ref in (folder / "refs").glob("v*") if ref.name[1:].isdigit()]
        versions = {ref.read_text(encoding="utf-8").strip(): int(ref.name[1:]) for ref in refs}
        here = sorted((folder / "snapshots").glob("*"), key=lambda s: (versions.get(s.name, -1), s.stat().st_mtime))
        found += here[::-1]
    return found


def _depends_on_others(snapshot: Path) -> bool:
    told = [*snapshot.glob("build/*/metadata.json"), *snapshot.glob("*/metadata.json"), *snapshot.glob("metadata.json")]
    return any(json.loads(path.read_text(encoding="utf-8")).get("kernel-depends") for path in told)


def _row(base: Kernel, name: str, what: str, repository: str, of: Callable[[Any], Run], **changes: Any) -> Kernel:
    return base.replace(
        name=name, summary=f"{what} from the Hugging Face hub ({repository}), where it is in the local cache",
        load=partial(load, repository, of), library="kernels", versions=("0.17", ""), opt_in=True,
        **changes,
    )  # fmt: skip


def _flash(base: Kernel, number: int, its: Any, *, pages: bool, **changes: Any) -> Kernel:
    """A row of FlashAttention `number`; its: the adapter of the package. pages: read in each version; the hub tells none."""
    repository = f"{HUB}/flash-attn{number}"
    of_paged = partial(load, repository, lambda module: its.of_paged(module.flash_attn_with_kvcache))
    if base.load_cached is not None:
        changes["load_cached"] = partial(load, repository, lambda module: its.of_cached(module.flash_attn_with_kvcache))
    return _row(
        base, f"hf_flash_attn_{number}", f"FlashAttention {number}", repository, lambda module: its.of(module.flash_attn_func),
        load_packed=partial(load, repository, lambda module: its.of_packed(module.flash_attn_varlen_func)),
        load_paged=of_paged if pages else None, paged_needs=(), **changes,
    )  # fmt: skip


[FLASH_2], [FLASH_3, _], [FLASH_4] = flash_attn_2.KERNELS, flash_attn_3.KERNELS, flash_attn_4.KERNELS
# the hub's FlashAttention 3 is built whole; what flash_attn_config says is of the package
WHOLE = FLASH_3.needs[: -len(flash_attn_3.OPTIONAL)]
NOT_OF_OLD = (flash_attn_4.SOFTCAP_IN_TRAINING, *flash_attn_4.PAGES_ON)
OLD_FLASH_4 = (*(n for n in FLASH_4.needs if n not in NOT_OF_OLD), *flash_attn_4.BEFORE_B34)
SAGE = next(kernel for kernel in sageattention.KERNELS if kernel.name == "sage_2_fp16")
HF_SAGE = (*sageattention.CUDA_2, OneOf("capability", (80, 89, 90, 120)))  # its sageattn chooses by these
HUB = "kernels-community"
KERNELS = (
    _flash(FLASH_2, 2, flash_attn_2, pages=False),
    _flash(FLASH_3, 3, flash_attn_3, pages=True, needs=WHOLE),
    _flash(FLASH_4, 4, flash_attn_4, pages=False, needs=OLD_FLASH_4),
    _row(SAGE, "hf_sage", "SageAttention 2", f"{HUB}/sage-attention",
         lambda module: sageattention.of_2(module, "sageattn"), needs=HF_SAGE),
)  # fmt: skip
