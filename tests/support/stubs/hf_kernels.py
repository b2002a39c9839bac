"""The library `kernels` 0.17.2 and a cache with a snapshot of each repository: their modules are what the libraries bring."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path

from stubs import Stub, flash_attn_2, flash_attn_3, flash_attn_4, module, sage_2, signed

COMMIT = "0123456789abcdef"
SHARED = (
    "top_left_wide top_left_tall scale_zero scale_negative bool_mask bool_mask_keys float_mask mask_and_causal mask_grad"
    " float32 packed_top_left packed_scale_negative packed_float32 unread_top_left"
)


@signed("hf_kernels", "sageattn")
def sageattn(q, k, v, tensor_layout, is_causal, sm_scale, return_lse, kwargs):
    return sage_2.fp16_cuda(
        q=q,
        k=k,
        v=v,
        tensor_layout=tensor_layout,
        is_causal=is_causal,
        sm_scale=sm_scale,
        return_lse=return_lse,
        **kwargs,
    )


MODULES = {
    "flash-attn2": module(
        "flash_attn2",
        flash_attn_func=flash_attn_2.flash_attn_func,
        flash_attn_varlen_func=flash_attn_2.flash_attn_varlen_func,
        flash_attn_with_kvcache=flash_attn_2.flash_attn_with_kvcache,
    ),
    "flash-attn3": module(
        "flash_attn3",
        flash_attn_func=flash_attn_3.flash_attn_func,
        flash_attn_varlen_func=flash_attn_3.flash_attn_varlen_func,
        flash_attn_with_kvcache=flash_attn_3.flash_attn_with_kvcache,
    ),
    "flash-attn4": module(
        "flash_attn4",
        flash_attn_func=flash_attn_4.flash_attn_func,
        flash_attn_varlen_func=flash_attn_4.flash_attn_varlen_func,
    ),
    "sage-attention": module("sage_attention", sageattn=sageattn),
}


@signed("hf_kernels", "get_local_kernel")
def get_local_kernel(repo_path, backend, trust_remote_code, user_agent):
    """As it is: it raises where no variant fits, and takes what a variant depends on from the network."""
    [variant, *_] = [*repo_path.glob("build/*-cuda"), None]
    if variant is None:
        raise FileNotFoundError(f"Cannot find a build variant for this system in {repo_path}:\n\n")
    assert not json.loads((variant / "metadata.json").read_text()).get("kernel-depends"), "downloaded"
    _, _, name = repo_path.parents[1].name.split("--")
    return MODULES[name]


def put(
    cache: Path, repository: str, commit: str, version: int | None, variant="torch-cuda", kind="kernels", **more
) -> Path:
    """A snapshot in a cache of the hub."""
    folder = cache / f"{kind}--{repository.replace('/', '--')}"
    build = folder / "snapshots" / commit / "build" / variant
    build.mkdir(parents=True)
    (build / "metadata.json").write_text(json.dumps({"id": "_x", "version": version, **more}))
    if version is not None:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / f"v{version}").write_text(commit)
    return folder / "snapshots" / commit


@cache
def _cache() -> tempfile.TemporaryDirectory:
    made = tempfile.TemporaryDirectory(prefix="hub-")
    for name in MODULES:
        put(Path(made.name), f"kernels-community/{name}", COMMIT, 1)
    return made


def _patch(monkeypatch):
    monkeypatch.setenv("KERNELS_CACHE", _cache().name)
    monkeypatch.delenv("LOCAL_KERNELS", raising=False)


STUB = Stub(
    file="hf_kernels",
    library="kernels",
    version="0.17.2",
    modules=lambda: {"kernels": module("kernels", get_local_kernel=get_local_kernel)},
    patch=_patch,
    sizes={"d": 64},
    refuses={
        "hf_flash_attn_2": f"{SHARED} filled_scale_negative filled_grad filled_float32 filled_causal"
        " paged_scale_negative paged_grad paged_float32",
        "hf_flash_attn_3": flash_attn_3.REFUSES,
        "hf_flash_attn_4": SHARED,
        "hf_sage": sage_2.STUB.refuses["sage_2_fp16"].replace(" float_mask_hides_64", ""),
    },
    mutations=(
        ("_flash(FLASH_2, 2, flash_attn_2", "_flash(FLASH_2, 2, flash_attn_4"),
        ("_flash(FLASH_4, 4, flash_attn_4", "_flash(FLASH_4, 4, flash_attn_2"),
        ("_flash(FLASH_3, 3, flash_attn_3", "_flash(FLASH_3, 3, flash_attn_4"),
        ("_flash(FLASH_3, 3, flash_attn_3", "_flash(FLASH_3, 2, flash_attn_3"),
        ("its.of_packed(module.flash_attn_varlen_func)", "its.of(module.flash_attn_func)"),
        ("[: -len(flash_attn_3.OPTIONAL)]", ""),
        ("needs=HF_SAGE", "needs=()"),
        ('f"{kind}--', 'f"{kind}-'),
    ),
)  # fmt: skip
