"""cuDNN's own front end for Python, package nvidia-cudnn-frontend: `cudnn.sdpa_torch`, from 1.32 on.

Both corners; a left bound counts the query's own key, and 0 is refused; no masks. A graph is built for each shape and stride
and the last 128 are kept. The limits are those its graph validation names; before cuDNN 9.10.2 it names faults as well.
"""

from __future__ import annotations

from typing import Any

from fastattn.kernels import GRID, Arguments, Device, Kernel, OneOf, Range, RefuseWhen, Run, Tensor, require_keywords

FIRST = 91002  # 9.10.2


def load() -> Run:
    import cudnn  # pyright: ignore[reportMissingImports]

    attend = require_keywords(
        cudnn.sdpa_torch, "query", "key", "value", "scale", "is_causal", "causal_bottom_right", "window_left",
        "window_right", "return_lse",
    )  # fmt: skip

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Any:
        corner = k.shape[2] - q.shape[2]
        is_bottom_right = corner != 0 and a.upper == corner
        origin = corner if is_bottom_right else 0
        right = -1 if a.upper is None else a.upper - origin
        found = attend(
            query=q,
            key=k,
            value=v,
            scale=a.scale,
            is_causal=right == 0,
            causal_bottom_right=is_bottom_right,
            window_left=-1 if a.lower is None else origin - a.lower + 1,
            window_right=right,
            return_lse=a.lse or a.needs_grad,  # the backward needs it
        )
        if not (a.lse or a.needs_grad):
            return found
        out, lse = found
        return (out, lse.detach().squeeze(-1)) if a.lse else out

    return run


def takes(head_dim: int, head_dim_v: int, needs_grad: bool, device: Device) -> bool:
    """Whether it takes head dims of which one is over 128."""
    if device.capability != 90 and not 100 <= device.capability < 110:
        return False
    both = (head_dim, head_dim_v)
    return not needs_grad or both == (192, 128) or (device.capability == 90 and head_dim == head_dim_v)


KERNELS = (
    Kernel(
        name="cudnn_frontend",
        summary="cuDNN's fused kernels through its own front end",
        load=load,
        library="nvidia-cudnn-frontend",
        versions=("1.32.0", "2"),
        devices=("cuda",),
        dtypes=("float16", "bfloat16"),
        corner="any",
        causal_scales=("positive",),
        window=True,
        lse=True,
        head_dim_multiple=8,
        dense_last_dim=True,
        aligned=True,
        compiles="each_length",
        needs=(
            Range("capability", min=80, max=121),
            RefuseWhen(f"cuDNN {{device.cudnn}} < {FIRST}", lambda _, device: device.cudnn < FIRST),
            Range("head_dim", min=1, max=256),
            Range("head_dim_v", min=1, max=256),
            RefuseWhen(
                "head dims {p.head_dim} and {p.head_dim_v} > 128 on sm{device.capability}: sm90 and sm100 to 110 take up to"
                " 256, backward 192 and 128, or equal ones on sm90",
                lambda p, device: (
                    max(p.head_dim, p.head_dim_v) > 128 and not takes(p.head_dim, p.head_dim_v, p.needs_grad, device)
                ),
            ),
            *GRID,
            Range("q_len", min=1),
            Range("kv_len", min=2),
            OneOf("scale", ("positive",)),
            RefuseWhen(
                "causal bottom_right with q_len {p.q_len} > kv_len {p.kv_len}",
                lambda p, _: p.causal == "bottom_right" and p.q_len > p.kv_len,
            ),
            RefuseWhen(
                "a window {p.window} with q_len {p.q_len} > kv_len {p.kv_len}",
                lambda p, _: bool(p.window and p.q_len > p.kv_len),
            ),
            RefuseWhen(
                "a window {p.window} with a limit to the left alone: it wants one to the right too",
                lambda p, _: bool(p.window and p.causal is None and p.window[1] < 0),
            ),
            RefuseWhen(
                "deterministic training with cuDNN {device.cudnn} < 91800 on sm{device.capability}",
                lambda p, device: (
                    p.deterministic and p.needs_grad and device.capability >= 100 and device.cudnn < 91800
                ),
            ),
        ),
    ),
)
