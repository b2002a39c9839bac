"""The last resort: exact math that accepts every problem, whole or in query chunks."""

from __future__ import annotations

from fastattn.kernels import Kernel, sdpa_math

KERNELS = (
    Kernel(
        name="sdpa_math",
        summary="exact math with float32 accumulation, in query chunks where memory is short: accepts every problem",
        load=lambda: sdpa_math,
        devices=("cpu", "cuda"),
        corner="any",
        masks=("bool", "additive"),
        mask_and_causal=True,
        mask_grad=True,
        window=True,
        softcap=True,
        dropout=True,
        lse=True,
        twice_differentiable=True,
        chunks=True,
        products=True,
    ),
)
