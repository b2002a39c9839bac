"""torch.export, AOTInductor, torch.jit.trace and torch.onnx: what a call of ours becomes in a program that leaves the process.

Of torch's own operators, always: fastattn::attend needs fastattn wherever it runs.
"""

from __future__ import annotations

import importlib.util
import io
import shutil
import warnings

import children
import pytest
import torch
import torch.nn.functional as F
from graphs import exact, qkv, store

import fastattn
from fastattn import attention, masks

pytestmark = pytest.mark.usefixtures("untuned")
WINDOW = masks.Causal() & masks.Window(5, 0)


class Attends(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, q, k, v):
        return self.call(q, k, v)


CALLS = {
    "attention": lambda q, k, v: attention(q, k, v, is_causal=True),
    "window": lambda q, k, v: attention(q, k, v, WINDOW),
    "patched": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
}
OPTIONS = {"window": {"mask": WINDOW}}
STOCK = {"attention": {"is_causal": True}, "patched": {"is_causal": True, "enable_gqa": True}}


def want(name, given):
    return exact(*given, **OPTIONS.get(name, {"is_causal": True}))


def operators(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_an_exported_program_holds_only_operators_of_torch(name, strict):
    torch._dynamo.reset()
    given = qkv()
    store("matmul+chunks", *given, is_causal=True)  # of which fastattn::attend would be made under torch.compile
    with fastattn.patch():
        program = torch.export.export(Attends(CALLS[name]), tuple(given), strict=strict)
    assert all(name.startswith(("aten.", "<built-in")) for name in operators(program)), operators(program)
    kept = io.BytesIO()
    torch.export.save(program, kept)
    kept.seek(0)
    assert torch.allclose(torch.export.load(kept).module()(*given), want(name, given), atol=1e-5)


def test_an_exported_length_is_of_no_bucket():
    """A guard that is narrower than the Dim would be an error."""
    torch._dynamo.reset()
    given = qkv(40)
    store("torch_flash", *given, lengths="all", is_causal=True)
    length = torch.export.Dim("length", min=2, max=4096)
    shapes = {"q": {2: length}, "k": {2: length}, "v": {2: length}}
    program = torch.export.export(Attends(CALLS["attention"]), tuple(given), dynamic_shapes=shapes, strict=True)
    for n in (40, 400):
        given = qkv(n)
        assert torch.allclose(program.module()(*given), want("attention", given), atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_a_traced_module_holds_only_operators_of_torch(name):
    given = qkv()
    with warnings.catch_warnings(), fastattn.patch():
        warnings.simplefilter("ignore")  # of torch.jit itself, and that sizes become constants
        traced = torch.jit.trace(Attends(CALLS[name]), tuple(given))
    assert "fastattn::" not in str(traced.graph)
    assert torch.allclose(traced(*given), want(name, given), atol=1e-5)


def test_a_scripted_caller_of_the_patched_function_calls_torchs():
    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    given = qkv(kv_heads=4)
    with warnings.catch_warnings(), fastattn.patch():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(call)
    assert "aten::scaled_dot_product_attention" in str(scripted.graph)
    assert torch.allclose(scripted(*given), want("attention", given), atol=1e-5)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_a_packaged_program_needs_torch_alone(tmp_path):
    """AOTInductor: the package of all three calls runs in a process that never heard of fastattn."""
    given = qkv()

    class All(torch.nn.Module):
        def forward(self, q, k, v):
            return [call(q, k, v) for call in CALLS.values()]

    with fastattn.patch():
        program = torch.export.export(All(), tuple(given), strict=True)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "all.pt2"))
    torch.save((given, [want(name, given) for name in CALLS]), tmp_path / "data.pt")
    code = (
        "import sys, torch; run = torch._inductor.aoti_load_package(sys.argv[1]); given, want = torch.load(sys.argv[2])\n"
        "assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(run(*given), want, strict=True))\n"
        "assert 'fastattn' not in sys.modules"
    )
    ran = children.run(code, package, str(tmp_path / "data.pt"))
    assert ran.returncode == 0, ran.stderr


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="torch.onnx needs onnx and onnxscript")
@pytest.mark.parametrize("name", CALLS)
def test_onnx_takes_it_as_it_takes_stock(name):
    given = qkv(kv_heads=4)

    def exported(call):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(Attends(call), tuple(given), dynamo=True, verbose=False)
        assert {node.domain for node in program.model.graph} == {""}
        return [node.op_type for node in program.model.graph]

    mask = WINDOW.dense(2, 24, 24)
    stock = exported(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **STOCK.get(name, {"attn_mask": mask})))
    with fastattn.patch():
        assert exported(CALLS[name]) == stock
