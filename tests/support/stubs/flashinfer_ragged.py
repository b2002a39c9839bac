"""FlashInfer's prefill of packed requests, 0.6.13: planned for their lengths and for a dtype, float16 where none is said."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import torch

from fastattn.environment import remembered
from fastattn.kernels.libraries import catalogue, tags
from stubs import Stub, module, signed
from stubs.flashinfer_single import CASES, MUTATIONS, REFUSES, one_request

CLASS = "BatchPrefillWithRaggedKVCacheWrapper"


def method(name):
    return signed("flashinfer", f"{CLASS}.{name}", keywords_only=False)


class BatchPrefillWithRaggedKVCacheWrapper:
    @method("__init__")
    def __init__(self, float_workspace_buffer, kv_layout, backend, use_cuda_graph, **more):
        assert float_workspace_buffer.dtype is torch.uint8 and float_workspace_buffer.numel() >= 128 * 2**20
        assert kv_layout == "NHD" and backend in ("fa2", "fa3", "cutlass") and not use_cuda_graph
        self.backend, self.planned = backend, None

    @method("plan")
    def plan(self, qo_indptr, kv_indptr, custom_mask, pos_encoding_mode, use_fp16_qk_reduction, **more):
        assert custom_mask is None and pos_encoding_mode == "NONE" and not use_fp16_qk_reduction
        if self.backend == "cutlass":  # its run is told of neither
            more |= {"window_left": -1, "logits_soft_cap": 0.0}
            assert more["num_qo_heads"] * int((qo_indptr.diff() / 256).ceil().sum()) <= 131072, (
                "written past the end of the lists"
            )
        assert qo_indptr.dtype is kv_indptr.dtype is torch.int32 and len(qo_indptr) == len(kv_indptr)
        self.q_at, self.kv_at, self.planned = qo_indptr.tolist(), kv_indptr.tolist(), more

    @method("run")
    def run(self, q, k, v, return_lse, **more):
        told = self.planned
        dtype = (
            told["q_data_type"] if isinstance(told["q_data_type"], torch.dtype) else getattr(torch, told["q_data_type"])
        )
        if q.dtype is not dtype:
            raise ValueError(
                f"The dtype of q {q.dtype} does not match the q_data_type {dtype} specified in plan function."
            )
        assert q.shape == (self.q_at[-1], told["num_qo_heads"], told["head_dim_qk"]), (
            "q.shape[0] does not match qo_indptr[-1]"
        )
        assert v.shape == (self.kv_at[-1], told["num_kv_heads"], told["head_dim_vo"] or told["head_dim_qk"])
        found = [
            one_request(
                q[q0:q1], k[k0:k1], v[k0:k1], self.backend, told["causal"], told["window_left"], told["logits_soft_cap"],
                told["sm_scale"],
            )
            for q0, q1, k0, k1 in zip(self.q_at, self.q_at[1:], self.kv_at, self.kv_at[1:], strict=False)
        ]  # fmt: skip
        out, lse = (torch.cat(parts) for parts in zip(*found, strict=True))
        return (out, lse) if return_lse else out


def jit(came, asked=None, loaded=None):
    """flashinfer.jit of 0.6.13. came(told): whether flashinfer-jit-cache brings such a module; asked: what was asked for.

    loaded: its try_load() of 0.6.16.
    """

    def made(name):
        @signed("flashinfer", name)
        def make(**told):
            if asked is not None:
                asked.append(told)
            return SimpleNamespace(is_aot=came(told), **({"try_load": loaded} if loaded else {}))

        return make

    names = ("gen_single_prefill_module", "gen_batch_prefill_module", "gen_fmha_cutlass_sm100a_module")
    return module("flashinfer.jit", **{name: made(name) for name in names})


def bring(monkeypatch, came, asked=None, loaded=None, version="0.6.13+cu129"):
    """flashinfer-jit-cache is installed, beside the stub."""
    real = catalogue.version_of
    monkeypatch.setattr(catalogue, "version_of", lambda name: version if name == "flashinfer-jit-cache" else real(name))
    monkeypatch.setattr(sys.modules["flashinfer"], "jit", jit(came, asked, loaded), raising=False)
    tags.came_compiled.cache_clear()
    remembered.forget()


STUB = Stub(
    file="flashinfer",
    library="flashinfer-python",
    version="0.6.13",
    modules=lambda: {"flashinfer": module("flashinfer", **{CLASS: BatchPrefillWithRaggedKVCacheWrapper})},
    kernels=("flashinfer_ragged_fa3", "flashinfer_ragged_fa2", "flashinfer_ragged_cutlass"),
    capabilities={"flashinfer_ragged_cutlass": 100},
    refuses={
        **dict.fromkeys(("flashinfer_ragged_fa3", "flashinfer_ragged_fa2"), REFUSES),
        "flashinfer_ragged_cutlass": f"{REFUSES} softcap lse_softcap_window window_left window_self window_causal window_wide"
        " head_dim_256 many_tiles",
    },
    cases={
        **CASES,
        "one_last_stride_2": {"b": 1, "memory": "last_stride_2"},
        "many_tiles": {"b": 300, "hq": 450, "hkv": 450, "sq": 1, "skv": 1},
    },
    mutations=(
        *MUTATIONS,
        ("softcap=FA[0] in more", "softcap=True"),
        ("window=FA[0] in more", "window=True"),
        ("> 131072", "> 2**20"),
        ('OneOf("head_dim", (64, 128, 192)),', 'OneOf("head_dim", (64, 128, 192, 256)),'),
        ('OneOf("head_dim", (64, 128, 192)),', 'OneOf("head_dim", (64, 128)),'),
        ("starts * q.shape[1], starts * k.shape[1]", "starts * k.shape[1], starts * q.shape[1]"),
        ("q.shape[3], v.shape[3], q.dtype", "q.shape[3], None, q.dtype"),
        ("q.shape[2], k.shape[2], q.shape[3]", "k.shape[2], q.shape[2], q.shape[3]"),
        ("128 * 2**20", "2**20"),
        ("unflatten(0, (batch, -1)), lse", "unflatten(0, (-1, batch)), lse"),
    ),
)
