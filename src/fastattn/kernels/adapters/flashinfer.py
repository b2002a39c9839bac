"""FlashInfer: prefill over one request (no batch), and over packed requests of equal lengths, planned on the host first.

Forward only, causal from the bottom-right corner, a window to the left alone, the log-sum-exp in base 2. Its masks are bool,
shared by the heads, of fa2 alone, and packed anew in each call; those of packed requests belong to a plan, and are not used.
cutlass is for packed requests on sm100 and sm110, where 0.7's `auto` takes it before fa2; it drops a window and a softcap.
What must be known:
  - Hidden scores are -5e4 before the scale, up to 0.6.18 (flashinfer#4450, #4451, #4452): a row that sees nothing gets a mean
    of v, or fa2 raises (causal, q_len > kv_len); a row whose every product is below -5e4 gives zeros.
  - A row's maximum is taken before the scale: positive ones alone.
  - fa3 of one request reads lengths and heads as NHD whatever kv_layout says.
  - plan() takes float16 unless told otherwise, copies from the host (cutlass's reads the device, and counts no tile that its
    lists have no room for), and cannot be captured. A plan belongs to its lengths: where they churn it is no candidate. Each
    has 8 MiB on the device and on the host; those of a stream share 128 MiB. A CUDA graph takes over the plans of the stream
    that warmed up.
  - Kernels are compiled by nvcc for each dtype, head_dim, window and softcap.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from fastattn.kernels import (
    NOT_EMPTY,
    PLANNED,
    Arguments,
    Kernel,
    OneOf,
    Range,
    RefuseWhen,
    Run,
    Tensor,
    is_before,
    remembered,
    require_keywords,
)

LIBRARY = "flashinfer-python"
INF = float("inf")
WORKSPACE_BYTES = 128 * 2**20
PLANS = 32  # kept at once
TOLD = ("causal", "window_left", "logits_soft_cap", "sm_scale")


def load_single(backend: str) -> Run:
    from flashinfer import single_prefill_with_kv_cache  # type: ignore[attr-defined]

    attend = require_keywords(
        single_prefill_with_kv_cache, "q", "k", "v", "custom_mask", "kv_layout", "backend", "return_lse", *TOLD
    )

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        q3, k3, v3 = (x.detach()[0] for x in (q, k, v))  # DLPack takes nothing that requires a gradient
        seen = None if mask is None else mask.reshape(mask.shape[-2:]).expand(q.shape[1], k.shape[1])
        found = attend(
            q=q3, k=k3, v=v3, custom_mask=seen, kv_layout="NHD", backend=backend, return_lse=a.lse, **told(q, k, a)
        )  # fmt: skip
        found = batched(found, 1)
        if seen is None:
            return found
        empty = seen.any(-1).logical_not()  # they get a mean of v
        out, lse = found if a.lse else (found, None)
        out = out.masked_fill(empty[:, None, None], 0.0)
        return out if lse is None else (out, lse.masked_fill(empty, -INF))

    return run


def load_ragged(backend: str) -> Run:
    import torch
    from flashinfer import BatchPrefillWithRaggedKVCacheWrapper as Wrapper  # type: ignore[attr-defined]

    require_keywords(Wrapper, "float_workspace_buffer", "kv_layout", "backend")
    sizes = ("qo_indptr", "kv_indptr", "num_qo_heads", "num_kv_heads", "head_dim_qk", "head_dim_vo", "q_data_type")
    require_keywords(Wrapper.plan, *sizes, *TOLD)
    require_keywords(Wrapper.run, "q", "k", "v", "return_lse")
    here = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()) if backend == "cutlass")
    if len({gpu.multi_processor_count for gpu in here}) > 1:
        raise ImportError("its cutlass kernel counts the multiprocessors of the first GPU, and these differ")
    plans: dict[Any, Any] = {}
    captured: dict[Any, Any] = {}  # a graph goes on to read a plan's memory

    def take_over(device: Any, stream: int, told: tuple[Any, ...]) -> Any:
        """The plan of the stream that warmed up, for the one that captures: with all that share its workspace."""
        other = next((key[1] for key in reversed(plans) if (key[0], *key[2:]) == (device, *told)), None)
        if other is None:
            raise RuntimeError("FlashInfer plans on the host, which a CUDA graph cannot capture")
        for key in [key for key in plans if key[:2] == (device, other)]:
            plans[(device, stream, *key[2:])] = plans.pop(key)
        WORKSPACES.setdefault(
            (device, stream), WORKSPACES.pop((device, other))
        )  # what runs there next has one of its own
        return plans[(device, stream, *told)]

    def planned(q: Tensor, k: Tensor, v: Tensor, a: Arguments) -> Any:
        more = told(q, k, a)
        stream = torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else 0
        kind = (q.dtype, q.shape, k.shape, v.shape, *more.values())
        key = (q.device, stream, *kind)
        found, is_capturing = plans.get(key), q.is_cuda and torch.cuda.is_current_stream_capturing()
        if found is None and is_capturing:  # torch captures on a stream of its own
            found = take_over(q.device, stream, kind)
        elif found is None:
            if len(plans) >= PLANS:
                plans.pop(next(iter(plans), None), None)
            with torch.inference_mode(False):
                found = Wrapper(float_workspace_buffer=workspace(q.device, stream), kv_layout="NHD", backend=backend)
                where = q.device if backend == "cutlass" else "cpu"  # where it is wanted
                starts = torch.arange(q.shape[0] + 1, dtype=torch.int32, device=where)
                lengths = starts * q.shape[1], starts * k.shape[1]
                values = (*lengths, q.shape[2], k.shape[2], q.shape[3], v.shape[3], q.dtype)
                found.plan(**dict(zip(sizes, values, strict=True)), **more)
            plans[key] = found
        if is_capturing:
            captured[key] = found
        return found

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        wrapper = planned(q, k, v, a)
        q3, k3, v3 = (x.detach().flatten(0, 1) for x in (q, k, v))  # a view wherever the batch lies outside the rows
        return batched(wrapper.run(q=q3, k=k3, v=v3, return_lse=a.lse), q.shape[0])

    return run


def is_built(what: str, backend: str, p: Any) -> bool:
    """Whether flashinfer-jit-cache brings what a problem needs.

    Of what was compiled here before, ninja alone knows whether it still holds: that is no promise.
    """
    if (what, backend) == ("ragged", "fa2") and not is_before(LIBRARY, "0.7"):
        return False  # it runs a module that nothing public makes
    windows = (False,) if p.window is None else (False, True)  # without one as well, as it may come as a mask
    return _came_compiled(what, backend, p.torch_dtype, (p.head_dim, p.head_dim_v), bool(p.softcap), windows)


@remembered(64)  # to ask writes the modules' sources
def _came_compiled(
    what: str, backend: str, dtype: Any, dims: tuple[int, int], is_capped: bool, windows: tuple[bool, ...]
) -> bool:
    import torch
    from flashinfer import jit  # type: ignore[attr-defined]

    given = {**dict.fromkeys(("dtype_q", "dtype_kv", "dtype_o"), dtype), "head_dim_qk": dims[0], "head_dim_vo": dims[1]}
    given |= {"use_logits_soft_cap": is_capped, "pos_encoding_mode": 0}
    given |= {"dtype_idx": torch.int32} if what == "ragged" else {}
    if backend == "cutlass":
        make = jit.gen_fmha_cutlass_sm100a_module
    else:
        make = jit.gen_single_prefill_module if what == "single" else jit.gen_batch_prefill_module
        given |= {"backend": backend, "use_fp16_qk_reduction": False}
    return all(_can_be_loaded(make(**given, use_sliding_window=window)) for window in windows)


def _can_be_loaded(module: Any) -> bool:
    """From 0.6.16 on a file that came compiled and cannot be loaded is compiled anew; before, that raises."""
    return module.is_aot and (not hasattr(module, "try_load") or module.try_load() is not None)


def told(q: Tensor, k: Tensor, a: Arguments) -> dict[str, Any]:
    left, right = a.window_sides(q.shape[1], k.shape[1])
    return dict(zip(TOLD, (right == 0, -1 if left is None else left, a.softcap, a.scale), strict=True))


def batched(found: Any, batch: int) -> Any:
    """(tokens, h, d), and a log-sum-exp in base 2 (tokens, h), as (b, s, h, d) and (b, h, s)."""
    if not isinstance(found, tuple):
        return found.unflatten(0, (batch, -1))
    out, lse = found
    return out.unflatten(0, (batch, -1)), lse.unflatten(0, (batch, -1)).transpose(1, 2) * math.log(2)


WORKSPACES: dict[tuple[Any, int], Tensor] = {}  # (device, stream) -> what partial results lie in


def workspace(device: Any, stream: int) -> Tensor:
    """That of one stream alone, as what runs beside it would write there too."""
    import torch

    if (device, stream) not in WORKSPACES:
        WORKSPACES[device, stream] = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    return WORKSPACES[device, stream]


NEEDS = (
    *NOT_EMPTY,
    Range("q_heads", min=1, max=65535),
    Range("extent", max=2**31 - 1),  # 32-bit offsets
    RefuseWhen(
        "head_dim {p.head_dim} with head_dim_v {p.head_dim_v}: it has 192 with 128, and the others with the same",
        lambda p, _: p.head_dim_v != (128 if p.head_dim == 192 else p.head_dim),
    ),
    OneOf("scale", ("positive",)),
    RefuseWhen(
        "causal bottom_right with q_len {p.q_len} > kv_len {p.kv_len}: rows that see nothing (flashinfer#4452)",
        lambda p, _: p.causal == "bottom_right" and p.q_len > p.kv_len,
    ),
)
FA = (
    OneOf("head_dim", (64, 128, 192, 256)),
    RefuseWhen("a window that ends to the right {p.window}", lambda p, _: p.window is not None and p.window[1] > 0),
)
CUTLASS = (
    OneOf("head_dim", (64, 128, 192)),
    RefuseWhen(
        "batch {p.batch}, q_heads {p.q_heads}, q_len {p.q_len}: its plan has room for 131072 tiles of 256 queries",
        lambda p, _: p.batch * p.q_heads * -(-p.q_len // 256) > 131072,
    ),
)
ONE = (OneOf("batch", (1,)),)
MASK = RefuseWhen("a mask {p.mask_shape} that differs by head: it has one for all", lambda p, _: "h" in p.mask_shape)
MANY = (Range("batch", min=1, max=65535), PLANNED)
GPUS = {
    "fa2": Range("capability", min=80, max=121),
    "fa3": OneOf("capability", (90,)),
    "cutlass": OneOf("capability", (100, 103, 110)),
}

KERNELS = tuple(
    Kernel(
        name=f"flashinfer_{what}_{backend}",
        summary=f"FlashInfer's {backend}: {summary}",
        load=partial(load, backend),
        library=LIBRARY,
        devices=("cuda",),
        dtypes=("float16", "bfloat16"),
        layout="bshd",
        corner="bottom_right",
        masks=("bool",) if MASK in more else (),
        window=FA[0] in more,
        softcap=FA[0] in more,
        lse=True,
        grad=False,
        dense_last_dim=True,
        aligned=True,
        compiles="once",
        is_built=partial(is_built, what, backend),
        versions=("0.6", ""),
        needs=(*NEEDS, *more, GPUS[backend]),
    )
    for what, backend, summary, load, more in (
        ("single", "fa3", "one request", load_single, (*FA, *ONE)),
        ("single", "fa2", "one request", load_single, (*FA, *ONE, MASK)),
        ("ragged", "fa3", "packed requests, planned", load_ragged, (*FA, *MANY)),
        ("ragged", "fa2", "packed requests, planned", load_ragged, (*FA, *MANY)),
        ("ragged", "cutlass", "packed requests, planned", load_ragged, (*CUTLASS, *MANY)),
    )
)
