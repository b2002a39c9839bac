"""ffpa-attn 0.2.4, its Triton kernels: at least 512 keys, and as many queries, or up to 7."""

from __future__ import annotations

from fastattn.problems.masks import Causal
from stubs import Stub
from stubs.ffpa_cute import DECODE, FEWEST, REFUSED, modules

LONG = {"b": 1, "hq": 1, "hkv": 1, "sq": FEWEST, "skv": FEWEST, "d": 264}
SHORT = " wide tall one_key bottom_right_wide decode gqa_decode bshd sbhd"  # lengths of the grid's own
STUB = Stub(
    file="ffpa",
    library="ffpa-attn",
    version="0.2.4",
    modules=modules,
    kernels=("ffpa_triton",),
    sizes=LONG,
    cases={
        "long_decode": {"sq": DECODE, "skv": 600, "mask": Causal("bottom_right")},
        "long_wide": {"skv": 600},
        "few_queries": {"sq": 100},
        "head_dim_268": {"d": 268},
        "long_grad": {"hq": 4, "hkv": 2, "grad": True},
    },
    refuses={"ffpa_triton": REFUSED + SHORT + " few_queries"},
    mutations=(
        ("ffpa_attn.TritonBackend, \"forward\")(forward=True)", "ffpa_attn.CuTeDSLBackend, \"forward\")(forward=True)"),
        ("(backward=True, **storage)", "(backward=True)"),
        ("head_dim_multiple=8, deterministic=False", "head_dim_multiple=4, deterministic=False"),
        ("DECODE < p.q_len < FEWEST", "False"),
        ('Range("kv_len", min=FEWEST)', 'Range("kv_len", min=1)'),
    ),
)  # fmt: skip
