"""Fault 96: what one torch does and the next does not. These tests say what this torch does, and pass on each from 2.11 on.

F.sdpa on the CPU refuses a mask together with is_causal up to some torch, takes it in 2.11 to 2.13, and refuses it again from
2.14 on. The gradient of clamp where a value equals its edge is 1 up to 2.13 and 0 from 2.14 on.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from building import expect
from fakes import FAST, Clock, add, honest, made_up, turn

import fastattn
from fastattn import sdpa
from fastattn.dispatch import drop_in, four_dims, passed_on
from fastattn.kernels import Arguments, registry
from fastattn.kernels.libraries import availability
from fastattn.planning import binding

F_sdpa = F.scaled_dot_product_attention
SOURCE = Path(fastattn.__file__).parent
r = torch.randn


def outcome(call, *given, **options):
    try:
        return call(*given, **options)
    except Exception as error:
        return type(error)


def qkv(*shape, dtype=torch.float32, kv_heads=None, grad=False):
    b, h, s, d = shape
    return [r(b, n, s, d).to(dtype).requires_grad_(grad) for n in (h, kv_heads or h, kv_heads or h)]


SEEN = r(6, 6) < 0.7
SEEN.fill_diagonal_(True)
BOTH = {
    "bool": (qkv(1, 2, 6, 8), {"attn_mask": SEEN}),
    "float": (qkv(1, 2, 6, 8), {"attn_mask": r(6, 6)}),
    "bfloat16": (qkv(1, 2, 6, 8, dtype=torch.bfloat16), {"attn_mask": SEEN}),
    "GQA": (qkv(1, 4, 6, 8, kv_heads=2), {"attn_mask": SEEN, "enable_gqa": True}),
    "training": (qkv(1, 2, 6, 8, grad=True), {"attn_mask": SEEN}),
    "3-D": ([x[0] for x in qkv(1, 2, 6, 8)], {"attn_mask": SEEN}),
    "a 3-D mask": (qkv(1, 2, 6, 8), {"attn_mask": SEEN.expand(2, 6, 6)}),
}


@pytest.mark.parametrize("door", ["sdpa", "patched", "traced"])
@pytest.mark.parametrize("name", BOTH)
def test_fault_96_a_mask_with_is_causal_is_what_this_torch_makes_of_it(name, door, untuned):
    """sdpa() takes a mask together with is_causal where this torch's F.sdpa does, and raises what that raises elsewhere."""
    (q, k, v), options = BOTH[name]
    theirs = outcome(F_sdpa, q, k, v, **options, is_causal=True)
    if door == "traced":
        compiled = torch.compile(lambda *x, **o: sdpa(*x, **o), backend="eager")
        ours = outcome(compiled, q, k, v, **options, is_causal=True)
        assert isinstance(ours, type) == isinstance(theirs, type)  # Dynamo wraps what F.sdpa raises
        return
    for _ in range(3):
        if door == "patched":
            with fastattn.patch():
                ours = outcome(F.scaled_dot_product_attention, q, k, v, **options, is_causal=True)
        else:
            ours = outcome(sdpa, q, k, v, **options, is_causal=True)
        assert ours is theirs if isinstance(theirs, type) else torch.equal(ours, theirs)


@pytest.fixture(autouse=True)
def counted_anew():
    fastattn.stats.reset()


@pytest.fixture(params=["takes", "refuses"])
def f_sdpa(request, monkeypatch):
    """Whatever this torch does, F.sdpa now takes, or refuses, a mask together with is_causal; the calls that had both."""
    calls = []

    def stand_in(q, k, v, mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
        if mask is not None and is_causal:
            calls.append(mask)  # a first one of 1 x 1 asks what F.sdpa does
            if request.param == "refuses":
                raise RuntimeError("Explicit attn_mask should not be set when is_causal=True")
            drawn = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
            mask = mask & drawn if mask.dtype is torch.bool else mask.masked_fill(~drawn, float("-inf"))
        return F_sdpa(q, k, v, mask, dropout_p, is_causal and mask is None, scale=scale, enable_gqa=enable_gqa)

    for module in (binding, drop_in, passed_on, four_dims):
        monkeypatch.setattr(module, "sdpa" if module is binding else "stock_sdpa", stand_in)
    monkeypatch.setattr(four_dims, "_answers", {})
    monkeypatch.setattr(availability, "load_kernel", lambda kernel, real=availability.load_kernel: (
        (lambda q, k, v, m, a: stand_in(q, k, v, m, a.dropout_p, a.upper is not None, scale=a.scale,
                                        enable_gqa=q.shape[1] != k.shape[1]))
        if kernel.name == "default" else real(kernel)
    ))  # fmt: skip
    return request.param, calls


@pytest.mark.parametrize("mode", ["auto", "cached", "off"])
@pytest.mark.parametrize("mask", ["bool", "float", "GQA", "training", "bfloat16"])
def test_fault_96_attention_takes_both_on_every_torch(mask, mode, f_sdpa, monkeypatch):
    """attention() documents their intersection: it is right whether or not F.sdpa takes both, as it never passes both on."""
    turn(monkeypatch, Clock(other=4e-3))
    (q, k, v), options = BOTH[mask]
    want = expect(q, k, v, options["attn_mask"], corners=("top_left",))
    with fastattn.options.scope(mode=mode):
        for _ in range(2):
            assert want.forward(fastattn.attention(q, k, v, options["attn_mask"], is_causal=True)) <= 1.0
    assert not f_sdpa[1], "F.sdpa was given both"


@pytest.mark.parametrize("name", BOTH)
def test_fault_96_sdpa_follows_either_torch(name, f_sdpa, monkeypatch):
    add(monkeypatch, made_up("quick", honest))
    turn(monkeypatch, Clock({"default": 4e-3, "quick": FAST}))
    (q, k, v), options = BOTH[name]
    what, calls = f_sdpa
    if what == "refuses":
        for _ in range(2):
            with pytest.raises(RuntimeError, match="Explicit attn_mask"):
                sdpa(q, k, v, **options, is_causal=True)
        assert [mask.shape[-1] for mask in calls if mask.shape[-1] > 1] == [6, 6]
        return
    drawn = torch.ones(6, 6, dtype=torch.bool).tril()
    mask = options["attn_mask"]
    drawn = mask & drawn if mask.dtype is torch.bool else mask.masked_fill(~drawn, float("-inf"))
    is_served = (
        q.dim() == 4 and mask.dim() == 2
    )  # what F.sdpa's math would answer it refuses, whatever its fused kernel does
    want = expect(q, k, v, drawn) if is_served else None
    for _ in range(2):
        out = sdpa(q, k, v, **options, is_causal=True)
        if want is None:
            assert torch.equal(out, F_sdpa(q, k, v, **{**options, "attn_mask": drawn}))
        else:
            assert want.forward(out) <= 1.0
        if want is not None and q.requires_grad:
            assert want.backward(*torch.autograd.grad(out, (q, k, v), want.grad)) <= 1.0
    assert len([mask for mask in calls if mask.shape[-1] > 1]) == (0 if is_served else 2)
    assert fastattn.stats()["served_by"] == ({"quick": 2} if is_served else {})


def test_fault_96_both_are_refused_again_where_torchs_fused_kernel_is_switched_off(f_sdpa, monkeypatch):
    """A winner that serves a mask with is_causal serves it only while F.sdpa would."""
    add(monkeypatch, made_up("quick", honest))
    turn(monkeypatch, Clock({"default": 4e-3, "quick": FAST}))
    (q, k, v), options = BOTH["bool"]
    if f_sdpa[0] == "takes":
        sdpa(q, k, v, **options, is_causal=True)
        torch.backends.cuda.enable_flash_sdp(False)
        try:
            sdpa(q, k, v, **options, is_causal=True)
        finally:
            torch.backends.cuda.enable_flash_sdp(True)
        found = fastattn.stats()
        assert found["served_by"] == {"quick": 1} and found["passed_on"] == {four_dims.MASK_AND_CAUSAL: 1}


def test_fault_96_a_kernel_that_refuses_both_one_day_is_not_chosen(monkeypatch):
    """torch's fused CPU kernel takes both below F.sdpa, in 2.14 too; if it ever refuses, the tuning finds that out."""

    def refusing(q, k, v, mask, a):
        if mask is not None and a.upper is not None:
            raise RuntimeError("Explicit attn_mask should not be set when is_causal=True")
        return honest(q, k, v, mask, a)

    add(monkeypatch, made_up("refusing", refusing))
    turn(monkeypatch, Clock({"default": 4e-3, "refusing": FAST}))
    (q, k, v), options = BOTH["bool"]
    want = expect(q, k, v, options["attn_mask"], corners=("top_left",))
    assert want.forward(fastattn.attention(q, k, v, options["attn_mask"], is_causal=True)) <= 1.0
    found = fastattn.explain(q, k, v, options["attn_mask"], is_causal=True)
    assert found.served_by != "refusing"
    assert any(t.candidate == "refusing" and "Explicit attn_mask" in (t.reason or "") for t in found.rows)


# --- clamp


def clamps(source):
    """Names of the functions in a source that call one whose gradient at an edge is another torch's affair."""
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef):
            calls = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
            names = {node.attr for node in calls if isinstance(node, ast.Attribute)}
            if names & {
                "clamp",
                "clamp_",
                "clamp_min",
                "clamp_max",
                "clamp_min_",
                "clamp_max_",
                "clip",
                "clip_",
                "hardtanh",
            }:
                yield function.name


def test_fault_96_no_gradient_of_ours_goes_through_a_clamp():
    """Nothing that a gradient flows through clamps: probes are data, and SageAttention's kernels have no backward."""
    found = {path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py") if any(clamps(path.read_text()))}
    assert found == {"tuning/accuracy/probes.py", "kernels/adapters/sageattention.py"}
    rows = [kernel for kernel in registry.rows() if kernel.name.startswith("sage")]
    assert rows and not any(kernel.grad for kernel in rows)


def test_fault_96_the_gradient_at_a_clamps_edge_is_one_of_the_two():
    x = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0], requires_grad=True)
    x.clamp(0.0, 1.0).sum().backward()
    assert x.grad is not None and x.grad.tolist() in ([0, 1, 1, 1, 0], [0, 0, 1, 0, 0])


@pytest.mark.parametrize("bound", ["bias", "queries"])
def test_fault_96_a_callers_clamp_in_front_of_attention_has_this_torchs_gradient(bound, untuned):
    """Values that lie on the edge, as a clamped ALiBi or clipped queries have: the edge's share is torch's own."""
    (q, k, v), _ = BOTH["training"]
    x = (r(1, 2, 6, 6) if bound == "bias" else r(1, 2, 6, 8)).round().requires_grad_()

    def gradient(attend):
        edge = x.clamp(-1.0, 1.0)
        out = attend(q, k, v, edge) if bound == "bias" else attend(edge, k, v, None)
        return torch.autograd.grad(out.square().sum(), x)[0]

    assert torch.equal(gradient(fastattn.attention), gradient(F_sdpa))
    assert gradient(F_sdpa).any()


# --- an entry point that is younger than the oldest torch


@pytest.mark.parametrize("lacking", ["window_size", "return_aux", "nothing"])
def test_fault_96_a_varlen_of_another_torch_is_refused_by_the_name_of_what_it_lacks(lacking, monkeypatch):
    """varlen_attn of torch 2.10 takes no window_size: that is a reason of that kernel, and no error of anybody's call."""
    names = ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "return_aux", "scale", "window_size"]
    kinds = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names if name != lacking]

    def varlen_attn(**given):
        return given["query"]

    varlen_attn.__signature__ = inspect.Signature(kinds)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    run = registry.row_for("torch_varlen", "cuda").load()
    q, k, v = (r(1, 4, 2, 8) for _ in range(3))
    if lacking == "nothing":
        assert run(q, k, v, None, Arguments(1.0)).shape == q.shape
    else:
        with pytest.raises(ImportError, match=f"its varlen_attn takes no {lacking}"):
            run(q, k, v, None, Arguments(1.0))
