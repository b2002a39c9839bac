"""AMD's attention for the CPU, package zentorch: an operator of torch, forward alone.

It began as torch 2.4's own kernel, with products of AMD's: its triangle has the top-left corner and is drawn before the scale,
and 512 keys in a row that a mask hides make NaN, so it is given no mask. Its log-sum-exp is not always written
(ZENTORCH_USE_ZENDNN_SDPA). It is made for AVX512-BF16; on other CPUs it runs torch's kernel.
"""

from __future__ import annotations

from fastattn.kernels import NOT_EMPTY, Arguments, Kernel, Run, Tensor, load_operators, require_keywords


def load() -> Run:
    attention = require_keywords(
        load_operators("zentorch").zentorch_sdpa.default,
        "query", "key", "value", "dropout_p", "is_causal", "attn_mask", "scale",
    )  # fmt: skip

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, a: Arguments) -> Tensor:
        return attention(
            query=q, key=k, value=v, dropout_p=0.0, is_causal=a.upper is not None, attn_mask=None, scale=a.scale
        )[0]

    return run


KERNELS = (
    Kernel(
        name="zentorch",
        summary="AMD's attention for the CPU (package zentorch)",
        load=load,
        library="zentorch",
        dtypes=("bfloat16", "float32"),  # its own float16 needs AVX512-FP16: without it torch's kernel runs
        causal_scales=("positive",),  # as torch_flash
        gqa=False,
        equal_head_dims=True,
        output_lies="as_query",
        dense_last_dim=True,
        no_broadcast=True,  # a stride of 0 is no leading dimension of a product
        contiguous=True,
        fp32=True,
        grad=False,
        needs=NOT_EMPTY,
    ),
)
