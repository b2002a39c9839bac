"""The real Triton kernels of SageAttention 1.0.6 on the CPU, by Triton's interpreter: its traps, its stub and its adapter.

In a process of its own, as TRITON_INTERPRET must be set before triton is imported. Neither package is a dependency:

    pip install --no-deps --target SOMEWHERE triton sageattention==1.0.6
    PYTHONPATH=SOMEWHERE pytest tests/test_sage_triton.py
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys

import children
import pytest

VERSION = "1.0.6"

CHILD = """
import json
import torch
from sageattention import sageattn
from stubs import sage_1
from torch.nn.functional import scaled_dot_product_attention as sdpa
from fastattn.kernels import Arguments
from fastattn.kernels.adapters.sageattention import load_1


class OnCuda(torch.Tensor):
    is_cuda = True  # the library asserts it of q


def made(q_len, kv_len, d=64, hq=4, hkv=2, dtype=torch.float16):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, n, d).to(dtype) for h, n in ((hq, q_len), (hkv, kv_len), (hkv, kv_len)))
    return q, k, v + 1  # with a mean that is not 0, so that a ratio means something


def plain(x):
    return x.as_subclass(torch.Tensor).float()


def library(q, k, v, **options):
    return plain(sageattn(q=q.as_subclass(OnCuda), k=k, v=v, sm_scale=0.125, **options))


def adapter(q, k, v, causal=False):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    a = Arguments(0.125, upper=0 if causal else None)
    return plain(load_1()(q.as_subclass(OnCuda), k, v, None, a)).transpose(1, 2)


def exact(q, k, v, causal=False):
    return sdpa(q.float(), k.float(), v.float(), is_causal=causal, scale=0.125, enable_gqa=True)


def error(found, want):
    return float((found - want).abs().max())


found = {}
for kv_len in (64, 65, 100, 128):
    q, k, v = made(32, kv_len)
    out, want = library(q, k.clone(), v), exact(q, k, v)
    stub = sage_1.sageattn(q=q, k=k.clone(), v=v, sm_scale=0.125).float()
    ratio = float((out * want).sum() / want.square().sum())
    found[f"library {kv_len}"] = {"ratio": ratio, "error": error(out, want), "beside the stub": error(out, stub)}
for n in (65, 128, 130):
    q, k, v = made(n, n)
    found[f"causal {n}"] = error(library(q, k.clone(), v, is_causal=True), exact(q, k, v, True))
q, k, v = made(32, 64)
changed = k.clone()
library(q, changed, v, smooth_k=True)
found["smooth_k took"] = error(k.float() - changed.float(), k.float().mean(2, keepdim=True).expand_as(k))
for name, shape, options in (
    ("adapter 64", (32, 64), {}),
    ("adapter 128, d 128", (32, 128, 128), {}),
    ("adapter 128, d 96", (32, 128, 96), {}),
    ("adapter causal 65", (65, 65), {"causal": True}),
    ("adapter float32", (32, 64, 64, 4, 2, torch.float32), {}),
    ("adapter bfloat16", (32, 64, 64, 4, 2, torch.bfloat16), {}),
):
    q, k, v = made(*shape)
    before = [x.clone() for x in (q, k, v)]
    wrong = error(adapter(q, k, v, **options), exact(q, k, v, **options))
    found[name] = {"error": wrong, "left alone": all(torch.equal(x, y) for x, y in zip(before, (q, k, v)))}
q, k, v = made(32, 64)
k[..., ::2] += 30  # as some models' keys have
found["offset"] = {"adapter": error(adapter(q, k, v), exact(q, k, v))}
found["offset"]["smooth_k=False"] = error(library(q, k, v, smooth_k=False), exact(q, k, v))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    for name, version in (("triton", None), ("sageattention", VERSION)):
        try:
            here = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed (how to: the docstring of {os.path.basename(__file__)})")
        if version and here != version:
            pytest.skip(f"{name} {here} is installed, these are the traps of {version}")
    environment = {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    child = children.run(CHILD, env=environment, fresh=True, timeout=600)
    assert child.returncode == 0, child.stderr[-2000:]
    return json.loads(child.stdout)


EXACT = 0.05  # of values of standard deviation 1: what int8 scores cost is 0.01 to 0.03


@pytest.mark.parametrize("kv_len", [64, 128])
def test_whole_blocks_of_keys_are_right(found, kv_len):
    assert found[f"library {kv_len}"]["error"] < EXACT
    assert abs(found[f"library {kv_len}"]["ratio"] - 1) < 0.005


@pytest.mark.parametrize("kv_len", [65, 100])
def test_the_tail_of_the_last_block_takes_its_share(found, kv_len):
    """So the adapter refuses such lengths: not a loss of accuracy, all outputs are too small."""
    assert found[f"library {kv_len}"]["ratio"] < 0.95
    assert found["library 65"]["ratio"] < 0.75


@pytest.mark.parametrize("kv_len", [64, 65, 100, 128])
def test_the_stub_has_the_library_s_semantics(found, kv_len):
    assert found[f"library {kv_len}"]["beside the stub"] < EXACT


@pytest.mark.parametrize("n", [65, 128, 130])
def test_causal_is_right_at_any_length(found, n):
    assert found[f"causal {n}"] < EXACT


def test_smooth_k_changes_the_caller_s_k(found):
    assert found["smooth_k took"] < 0.01  # just the mean of the keys


def test_the_adapter_is_right_and_leaves_its_inputs_alone(found):
    for name in [n for n in found if n.startswith("adapter")]:
        assert found[name]["left alone"], name
        assert found[name]["error"] < EXACT, (name, found[name])


def test_an_offset_of_the_keys_costs_nothing(found):
    """Why the adapter takes their mean away itself, rather than only tell the library to leave k alone."""
    assert found["offset"]["adapter"] < EXACT
    assert found["offset"]["smooth_k=False"] > 4 * found["offset"]["adapter"], found["offset"]
