"""The grid of calls through the real Python of FlashAttention 2, xFormers, MSLK and Transformer Engine, and vLLM whole: no GPU.

A stub says what its author read. Here the library's own checks, classes of biases and autograd functions run, and only what is
compiled has a stand-in, which computes as its C++ does. Each library has a process of its own, as what torch says of CUDA is
replaced there. None of them is a dependency; docs/results/loading.md says how each was installed:

    pytest tests/test_real_layers.py
"""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ContextDecorator
from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import children
import library_grid
import pytest
import stubs
import torch
from stubs import INF, attend, band, check_half, flash_attn_3, for_each_sequence, torch_lower
from stubs.flash_attn_2 import flash_attn_func
from stubs.flash_attn_2 import forward as flash_2_forward
from torch.overrides import TorchFunctionMode

from fastattn.kernels.libraries import catalogue, operator_files

# --- what is compiled


def gradients(function, given, grad, *saved):
    """By autograd of the forward; what that saved for the backward has to come back as it was."""
    given = [x.detach().requires_grad_() for x in given]
    with ThreadPoolExecutor(1) as elsewhere:  # below the dispatcher nothing is recorded
        found = elsewhere.submit(function, *given).result()
    same = (torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, saved, strict=True))  # NaN: not written
    assert all(same), "other outputs than the forward gave"
    return torch.autograd.grad(found[0], given, grad)


def flash_2(q, k, v, p, scale, causal, left, right, softcap=0.0):
    """(out, lse) of csrc/flash_attn/flash_api.cpp, whose forward and backward read a window alike."""
    asked = {"dropout_p": p, "softmax_scale": scale, "causal": causal, "window_size": (left, right), "softcap": softcap}
    return flash_attn_func(q=q, k=k, v=v, **asked, return_attn_probs=True)[:2]


def extension_fwd(q, k, v, out, alibi_slopes, p, scale, causal, left, right, softcap, return_softmax, generator):
    """flash_attn_2_cuda.fwd"""
    assert out is alibi_slopes is generator is None and not return_softmax
    return *flash_2(q, k, v, p, scale, causal, left, right, softcap), torch.empty(0), torch.zeros(2, dtype=torch.int64)


def extension_bwd(grad, q, k, v, out, lse, dq, dk, dv, alibi_slopes, *asked):
    """flash_attn_2_cuda.bwd, which writes into dq, dk and dv."""
    *asked, deterministic, generator, rng_state = asked
    assert alibi_slopes is generator is None and type(deterministic) is bool and rng_state is not None
    found = gradients(lambda *x: flash_2(*x, *asked), (q, k, v), grad, out, lse)
    return *(into.copy_(x) for into, x in zip((dq, dk, dv), found, strict=True)), torch.empty(0)


def flash_2_varlen(q, k, v, cu_q, cu_kv, max_q, max_kv, p, scale, causal, left, right):
    """The same, or with cu_seqlens (out, lse) of the sequences that (tokens, h, d) are."""
    if cu_q is None:
        return flash_2(q, k, v, p, scale, causal, left, right)
    one = partial(flash_2_forward, scale=scale, causal=causal, window_size=(left, right), softcap=0.0, longest=max_kv)
    return for_each_sequence(q, k, v, cu_q, cu_kv, max_q, max_kv, one)


def flash_fwd(
    q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_k, max_q, max_k, *asked, window_left, window_right, **others
):
    assert seqused_k is None and not any(others.values())
    told = (cu_seqlens_q, cu_seqlens_k, max_q, max_k, *asked, window_left, window_right)
    return *flash_2_varlen(q, k, v, *told), None


def flash_bwd(share, grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_q, max_k, *asked, window_left, window_right,
              rng_state):  # fmt: skip
    told = (cu_seqlens_q, cu_seqlens_k, max_q, max_k, *asked, window_left, window_right)
    return gradients(lambda *x: flash_2_varlen(*x, *told), (q, k, v), grad, out, lse)


def flash_3_fwd(
    q, k, v, *, softmax_scale, is_causal, window_left, window_right, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=0,
    max_seqlen_k=0, **others,
):  # fmt: skip
    """(out, lse) of hopper/flash_api.cpp."""
    assert not any(others.values())
    asked = {"softmax_scale": softmax_scale, "causal": is_causal, "window_size": (window_left, window_right)}
    longest = None if cu_seqlens_q is None else (max_seqlen_q, max_seqlen_k)
    one = partial(flash_attn_3.forward, **asked, softcap=0.0, num_splits=1, longest=longest)
    if longest is None:
        return one(q, k, v)
    return for_each_sequence(q, k, v, cu_seqlens_q, cu_seqlens_k, *longest, one)


def flash_3_bwd(share, grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_q, max_k, **asked):
    assert min(q.shape[-1], v.shape[-1]) >= 64
    told = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "max_seqlen_q": max_q, "max_seqlen_k": max_k}
    lse = lse if cu_seqlens_q is None else lse[0]  # it comes with a batch of one, and only its address is read
    return gradients(partial(flash_3_fwd, **asked, **told), (q, k, v), grad, out, lse)


def efficient_fwd(*, query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **asked):
    """Of packed sequences it gives a log-sum-exp for each, padded to the longest."""
    none = {"cu_seqlens_q": None, "cu_seqlens_k": None, "max_seqlen_q": -1, "max_seqlen_k": -1}
    if cu_seqlens_q is None:
        return torch_lower.efficient(query=query, key=key, value=value, **none, **asked)
    ends = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    lse = torch.full((len(cu_seqlens_q) - 1, query.shape[2], -(-max_seqlen_q // 32) * 32), INF)

    def one(q, k, v):
        assert q.shape[1] == k.shape[1], "nobody says what it does with a sequence without keys"
        out, lse, *_ = torch_lower.efficient(query=q, key=k, value=v, **none, **asked)
        return out, lse[..., : q.shape[1]] if asked["compute_log_sumexp"] else q.new_zeros(1, q.shape[2], q.shape[1])

    out, of_tokens = for_each_sequence(query[0], key[0], value[0], *ends, one)
    for n, (first, last) in enumerate(pairwise(cu_seqlens_q.tolist())):
        lse[n, :, : last - first] = of_tokens[:, first:last]
    return out[None], lse.detach(), None, None, max_seqlen_q, max_seqlen_k


@stubs.signed("torch", "backward", keywords_only=False, real=stubs.of_operator("_efficient_attention_backward"))
def efficient_bwd(grad_out_, query, key, value, bias, out, logsumexp, philox_seed, philox_offset, bias_requires_grad,
                  num_splits_key, shared_storage_dqdkdv, **asked):  # fmt: skip
    def forward(query, key, value, bias=bias):
        return efficient_fwd(query=query, key=key, value=value, bias=bias, compute_log_sumexp=True, **asked)[:2]

    given = (query, key, value, bias) if bias_requires_grad else (query, key, value)
    return (*gradients(forward, given, grad_out_, out, logsumexp), None)[:4]


def blackwell_fwd(*, q, k, v, softmax_scale, causal, window_left, window_right, bottom_right, **others):
    """dispatch_fmha_fwd of blackwell_fmha_fwd.cu, and its template."""
    check_half(q, k, v)
    assert not any(others.values()) and softmax_scale > 0, "0 is its word for the default"
    assert k.stride()[:2] == v.stride()[:2] and q.shape[3] == v.shape[3] in (64, 128) and q.shape[1] <= k.shape[1]
    left, right = None, 0 if causal else None
    if max(window_left, window_right) >= 0:
        left, right = window_left, 0 if causal else window_right
        assert min(left, right) >= 0, "window size is negative but max_seq_len_k is not provided"
    visible = band(q.shape[1], k.shape[1], left, right, k.shape[1] - q.shape[1] if bottom_right else 0)
    out, lse = attend(*(x.transpose(1, 2) for x in (q, k, v)), scale=softmax_scale, visible=visible)
    return out.transpose(1, 2).contiguous(), lse


OPERATORS = {
    ("flash", "FwOp"): flash_fwd,
    ("flash", "BwOp"): flash_bwd,
    ("flash3", "FwOp"): flash_3_fwd,
    ("flash3", "BwOp"): flash_3_bwd,
    ("cutlass", "FwOp"): efficient_fwd,
    ("cutlass", "BwOp"): efficient_bwd,
    ("cutlass_blackwell", "FwOp"): blackwell_fwd,
}

# --- what torch says of CUDA


class OnCuda(TorchFunctionMode, ContextDecorator):
    """Tensors say that they are on a GPU, and what is asked for there is made here."""

    ANSWERS = {torch.Tensor.is_cuda.__get__: True, torch.Tensor.device.__get__: torch.device("cuda")}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        here = {"device": "cpu"} if kwargs and kwargs.get("device") is not None else {}
        return self.ANSWERS[func] if func in self.ANSWERS else func(*args, **{**(kwargs or {}), **here})


def pretend(capability: int) -> None:
    major, minor = divmod(capability, 10)
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda *_: (major, minor)
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(major=major, minor=minor)


# --- the libraries


def with_flash_attn() -> None:
    extension = {"fwd": extension_fwd, "bwd": extension_bwd, "varlen_fwd": None, "varlen_bwd": None}
    sys.modules["flash_attn_2_cuda"] = stubs.module("flash_attn_2_cuda", **extension)
    real = torch.library.custom_op
    torch.library.custom_op = lambda *given, device_types=None, **named: real(
        *given, **named
    )  # theirs are for CUDA alone


def with_operators(module: str) -> None:
    for (name, side), operator in OPERATORS.items():
        getattr(getattr(import_module(module), name), side).OPERATOR = operator


XFORMERS, MSLK = (partial(with_operators, module) for module in ("xformers.ops.fmha", "mslk.attention.fmha"))
# file -> what goes before the import, its kernels
LIBRARIES = {
    "flash_attn_2": (with_flash_attn, ("flash_attn_2",)),
    "xformers": (XFORMERS, ("xformers_flash", "xformers_flash3", "xformers_cutlass")),
    "mslk": (MSLK, ("mslk_flash", "mslk_flash3", "mslk_cutlass", "mslk_blackwell")),
    "transformer_engine": (with_flash_attn, ("te_flash", "te_unfused")),
    "vllm_cpu": (lambda: None, ("vllm_cpu",)),
    "zentorch": (lambda: None, ("zentorch",)),
}
ALSO_NEEDED = {"te_flash": "flash-attn"}
EACH = [pytest.param(file, name, id=name) for file, (_, names) in LIBRARIES.items() for name in names]


def main(file: str) -> None:
    """Print what became of each call of each kernel: "" where its numbers are right, else that it was refused, or why."""
    prepare, names = LIBRARIES[file]
    prepare()
    stub = import_module(f"stubs.{file}").STUB
    real = replace(
        stub,
        version=catalogue.installed_distribution(catalogue.library_of(stub.library))[1],
        modules=dict,
        patch=lambda _: None,
    )
    with pytest.MonkeyPatch.context() as patch, library_grid.installed(real, patch):
        print(json.dumps({name: outcomes(library_grid.row_of(stub, name), real, patch) for name in names}))


def outcomes(kernel, stub, patch) -> dict[str, str]:
    pretend(stub.capabilities.get(kernel.name, stub.capability))
    is_on_cpu = kernel.devices == ("cpu",)
    calls = library_grid.calls_of(stub, kernel) if is_on_cpu else {**library_grid.GRID, **stub.cases}
    calls |= {f"causal {dtype}": {"is_causal": True, "dtype": getattr(torch, dtype)} for dtype in kernel.dtypes}

    told = kernel
    if not is_on_cpu:
        told = kernel.replace(load=lambda: OnCuda()(kernel.load()), load_packed=None, load_cached=None, load_paged=None)
    if stub.file in ("xformers", "mslk") and kernel.load_packed:
        calls |= library_grid.PACKED
        told = told.replace(load_packed=lambda: OnCuda()(kernel.load_packed()))
    return {case: outcome(told, stub, call) for case, call in calls.items()}


def outcome(kernel, stub, call) -> str:
    try:
        return "refused" if library_grid.run(kernel, stub, call) else ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@cache
def found(file: str) -> dict[str, dict[str, str]]:
    told = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    told["NVTE_FUSED_ATTN"] = "0"  # compiled code would ask cuDNN
    child = children.run(Path(__file__), file, env=told, timeout=600)
    assert child.returncode == 0, child.stderr[-2000:]
    return json.loads(child.stdout.splitlines()[-1])


@pytest.mark.parametrize("file, name", EACH)
def test_every_call_of_the_grid_is_right_or_refused_as_listed(file, name):
    stub = import_module(f"stubs.{file}").STUB
    for needed in filter(None, (stub.library, ALSO_NEEDED.get(name))):
        library = catalogue.library_of(needed)
        if not catalogue.installed_distribution(library):
            pytest.skip(f"{needed} is not installed")
        if why := operator_files.why_not_this_cpu(library):
            pytest.skip(f"{needed} {why}")
    listed = stub.refuses[name].split()
    wrong = {case: what for case, what in found(file)[name].items() if what != ("refused" if case in listed else "")}
    assert not wrong


if __name__ == "__main__":
    main(sys.argv[1])
