"""Faults 77 and 79 of reference/faults2.md: how an output lies in memory, and what autograd knows of it."""

from __future__ import annotations

import itertools

import pytest
import torch
from building import MEMORY, accepted, back, qkv, to

import fastattn
from fastattn.planning.conversions import blocks
from fastattn.problems.layouts import dense_strides, order_in_memory

F_sdpa = torch.nn.functional.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of a few rows: the candidates with loops run them."""
    monkeypatch.setattr(blocks, "CHUNK_BYTES", 2048)
    monkeypatch.setattr(blocks, "CAST_BYTES", 256)


# --- fault 79: strides and storage


def lies(x):
    """Strides where they have a say, bytes of the storage, and the place in it."""
    strides = tuple(st for n, st in zip(x.shape, x.stride(), strict=True) if n > 1)
    return strides, x.untyped_storage().nbytes(), x.storage_offset()


def heads_first(b, h, s, d):
    return torch.randn(h, b, s, d).transpose(0, 1)


def dims_before_heads(b, h, s, d):
    return torch.randn(b, s, h, 2 * d).transpose(1, 2)[..., ::2]


FORMS = {**MEMORY, "heads_first": heads_first, "every_second_dim": dims_before_heads}
CASES = {
    "plain": {},
    "narrow v": {"dv": 8},
    "wide v": {"dv": 24},
    "GQA": {"hkv": 2},
    "GQA, narrow v": {"hkv": 2, "dv": 8},
    "one query": {"sq": 1},
    "GQA, one query": {"hkv": 2, "sq": 1, "dv": 8},
    "one of all": {"b": 1, "hq": 1, "sq": 1, "dv": 8},
}


def hold_to_default(q, k, v, mask=None, layout="bhsd", flex=False, **options):
    """Every candidate's output lies as F.sdpa's; flex takes long, and is asked only where it is wanted."""
    views = [back(layout, x) for x in (q, k, v)]
    want = lies(to(layout, F_sdpa(*views, mask, enable_gqa=True, **options)))
    names = [n for n in accepted(q, k, v, mask, layout, **options) if n != "flex" or flex]
    assert len(names) > 3
    found = {name: fastattn.attention(q, k, v, mask, layout, kernel=name, **options) for name in names}
    assert {name: lies(out) for name, out in found.items()} == dict.fromkeys(names, want)


@pytest.fixture
def made(monkeypatch):
    """made(form, **sizes): q, k, v of that form of memory."""
    monkeypatch.setattr("building.MEMORY", FORMS)
    return lambda form, **sizes: qkv(skv=23, memory=form, **sizes)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", FORMS)
def test_fault_79_every_candidate_lies_as_the_default(form, case, made):
    """An output lies in memory as F.sdpa's would, in strides and in storage, whatever kernel and conversions made it."""
    hold_to_default(*made(form, **CASES[case]), flex=case == "plain")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_fault_79_in_other_dtypes_and_in_training(form, dtype, made):
    hold_to_default(*made(form, dtype=dtype, dv=8, hkv=2))
    hold_to_default(*made(form, dtype=dtype, grad=True))
    hold_to_default(*made(form, dtype=dtype, grad=True, dv=24))


@pytest.mark.parametrize("other", FORMS)
@pytest.mark.parametrize("form", ["contiguous", "transposed", "seq_first"])
def test_fault_79_where_keys_or_values_lie_otherwise(form, other, made):
    hold_to_default(*made((form, other, form)))
    hold_to_default(*made((form, form, other), grad=True))


@pytest.mark.parametrize("form", ["transposed", "packed", "heads_first"])
def test_fault_79_where_the_default_is_its_math_for_other_reasons(form, made):
    q, k, v = made(form)
    bias = torch.randn(19, 23, requires_grad=True)
    hold_to_default(q, k, v, bias)
    with torch.no_grad():
        hold_to_default(q, k, v, bias)
    hold_to_default(q, k, v, torch.rand(19, 23) > 0.3)
    hold_to_default(q, k, v, is_causal=True)


def test_fault_79_where_the_fused_kernel_is_switched_off(made):
    q, k, v = made("transposed")
    names = [name for name in accepted(q, k, v) if not name.startswith("torch_flash")]
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        want = lies(F_sdpa(q, k, v))
        found = {name: lies(fastattn.attention(q, k, v, kernel=name)) for name in names}
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
    assert want == lies(q.contiguous()) and found == dict.fromkeys(names, want)


@pytest.mark.parametrize("form", FORMS)
def test_fault_79_under_autocast(form, made):
    q, k, v = made(form)
    with torch.autocast("cpu", torch.bfloat16):
        hold_to_default(q, k, v)
        hold_to_default(*made(form, dv=8))
    assert q.dtype is torch.float32


VIEWS = {
    "bhsd": lambda out: out.transpose(1, 2).view(*out.transpose(1, 2).shape[:2], -1),
    "bshd": lambda out: out.view(*out.shape[:2], -1),
    "sbhd": lambda out: out.view(*out.shape[:2], -1),
}


@pytest.mark.parametrize("layout", VIEWS)
@pytest.mark.parametrize("form", FORMS)
def test_fault_79_heads_can_be_joined_where_the_default_lets_them(form, layout, made):
    for dv in (16, 8, 24):
        q, k, v = made(form, dv=dv, layout=layout)
        hold_to_default(q, k, v, layout=layout)
        plain = to(layout, F_sdpa(*(back(layout, x) for x in (q, k, v))))
        for name in accepted(q, k, v, layout=layout):
            out = fastattn.attention(q, k, v, layout=layout, kernel=name)
            for view in (VIEWS[layout], lambda x: x.view(-1), lambda x: x.view(*x.shape[:2], -1)):
                try:
                    view(plain)
                except RuntimeError:
                    continue
                view(out)


@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"window": (3, 3)}, {"return_lse": True}], ids=str)
@pytest.mark.parametrize("form", ["contiguous", "transposed", "packed", "expanded_heads"])
def test_fault_79_with_options_that_the_default_lacks(form, options, made):
    q, k, v = made(form)
    want = lies(torch.empty_like(q))
    for name in accepted(q, k, v, **options):
        found = fastattn.attention(q, k, v, kernel=name, **options)
        assert lies(found[0] if "return_lse" in options else found) == want, name


def test_fault_79_the_drop_in_gives_what_a_caller_may_view(made):
    q, k, v = made("contiguous", dv=8)
    for serve in ("torch_flash", "matmul", "torch_math"):
        with fastattn.options(kernels=[serve]):
            for _ in range(2):
                assert fastattn.sdpa(q, k, v).view(-1, 19 * 8).untyped_storage().nbytes() == 2 * 4 * 19 * 8 * 4


def test_fault_79_the_order_is_that_of_empty_like():
    for order in itertools.permutations(range(4)):
        for room, repeated, one in itertools.product([None, 0, 1, 2, 3], [None, 0, 1, 2, 3], [None, 0, 1, 2]):
            sizes = [1 if dim == one else size for dim, size in enumerate((2, 4, 5, 8))]
            memory = torch.empty([sizes[dim] + 3 * (place == room) for place, dim in enumerate(order)])
            x = memory[tuple(slice(sizes[dim]) for dim in order)].permute([order.index(dim) for dim in range(4)])
            if repeated is not None:
                x = x.narrow(repeated, 0, 1).expand(sizes)
            like = torch.empty_like(x)
            found = dense_strides(x.shape, order_in_memory(x.shape, x.stride()))
            same = [a == b for a, b, n in zip(like.stride(), found, x.shape, strict=True) if n > 1]
            assert all(same), (x.shape, x.stride())


# --- fault 77: what autograd knows of an output


def set_rows(out, x):
    out[:, :, ::2] = x[:, :, ::2]


def through_a_view(out, x):
    out.transpose(1, 2).flatten(2).mul_(2) if out.transpose(1, 2).is_contiguous() else out.mul_(2)


CHANGES = {
    "mul_ by a gate": lambda out, x: out.mul_(x),
    "add_": lambda out, x: out.add_(x),
    "set rows": set_rows,
    "relu_": lambda out, x: out.relu_(),
    "masked_fill_": lambda out, x: out.masked_fill_(x > 0, 0.0),
    "copy_": lambda out, x: out.copy_(x),
    "through a view": through_a_view,
    "detach_": lambda out, x: out.detach_(),
    "untyped": lambda out, x: out.unsqueeze_(0).squeeze_(0).mul_(x),
}
GRAPHS = {
    "fused": {},
    "fused, GQA": {"hkv": 2},
    "narrow v": {"dv": 8},
    "wide v": {"dv": 24, "hkv": 2},
    "keys by dims": {"memory": ("transposed", "dims_before_rows", "contiguous")},
}


def outcome(call, change, tensors, x):
    """What a change in place, and the backward behind it, come to: gradients of the tensors, or the error's type."""
    x = x.clone().requires_grad_()
    out = call()
    flags = out.is_leaf, out.requires_grad, out.grad_fn is None
    assert flags == (False, True, False)
    try:
        change(out, x)
        if not out.requires_grad:
            return "detached"
        (out * 3).sum().backward(inputs=[*tensors, x])
    except RuntimeError as error:
        return type(error)
    found = [None if t.grad is None else t.grad.clone() for t in (*tensors, x)]
    for t in tensors:
        t.grad = None
    return found


def same(found, want):
    if isinstance(found, list) and isinstance(want, list):
        zeros = [torch.zeros(()) if g is None else g for g in found]
        return all(
            torch.allclose(a, torch.zeros(()) if b is None else b, atol=1e-4) for a, b in zip(zeros, want, strict=True)
        )
    return found == want


def hold_changes_to_default(change, q, k, v, mask=None, **options):
    tensors = [q, k, v, *([mask] if mask is not None and mask.requires_grad else [])]
    x = torch.randn(*q.shape[:3], v.shape[3])
    want = outcome(lambda: F_sdpa(q, k, v, mask, enable_gqa=True), change, tensors, x)
    for name in accepted(q, k, v, mask, **options):
        found = outcome(lambda name=name: fastattn.attention(q, k, v, mask, kernel=name, **options), change, tensors, x)
        # where F.sdpa's fused kernel raises, as its backward reads the output, another one may know better
        is_view = (
            want == "detached" and "gqa_fold" in name
        )  # of what the backward reads: no view can be detached in place
        assert same(found, want) or want is RuntimeError or is_view, (name, found, want)
    return want


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("form", ["contiguous", "transposed"])
def test_fault_77_an_output_may_be_changed_in_place_after_a_mask_gradient(change, form):
    """An output may be changed in place in training wherever F.sdpa's own may, with the same gradients."""
    q, k, v = qkv(memory=form, grad=True)
    bias = torch.randn(1, 4, 19, 19, requires_grad=True)
    assert hold_changes_to_default(CHANGES[change], q, k, v, bias) is not RuntimeError


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("graph", GRAPHS)
def test_fault_77_whatever_kernel_and_conversions_made_it(change, graph):
    hold_changes_to_default(CHANGES[change], *qkv(grad=True, **GRAPHS[graph]))


def test_fault_77_with_dropout_and_several_blocks():
    q, k, v = qkv(grad=True, dv=8)
    for name in accepted(q, k, v, dropout_p=0.3):
        torch.manual_seed(1)
        plain = fastattn.attention(q, k, v, kernel=name, dropout_p=0.3)
        want = torch.autograd.grad((plain * 2).sum(), [q, k, v])
        torch.manual_seed(1)
        out = fastattn.attention(q, k, v, kernel=name, dropout_p=0.3)
        out.mul_(2)
        found = torch.autograd.grad(out.sum(), [q, k, v])
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, want, strict=True)), name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["contiguous", "transposed", "packed", "last_stride_2", "expanded_heads"])
def test_fault_77_an_output_made_without_gradients_may_be_changed_with_them(form, case, made):
    q, k, v = made(form, **CASES[case])
    assert not F_sdpa(q, k, v, enable_gqa=True)._is_view()
    for name in accepted(q, k, v):
        with torch.no_grad():
            out = fastattn.attention(q, k, v, kernel=name)
        gate = torch.full_like(out, 2.0, requires_grad=True)
        out.mul_(gate).sum().backward()
        assert gate.grad is not None and out.requires_grad
        fastattn.attention(q, k, v, kernel=name).detach_().requires_grad_()


@pytest.mark.parametrize("graph", GRAPHS)
def test_fault_77_gradients_and_hooks_of_the_output(graph):
    q, k, v = qkv(grad=True, **GRAPHS[graph])
    for name in accepted(q, k, v):
        out = fastattn.attention(q, k, v, kernel=name)
        seen = []
        out.register_hook(lambda g, seen=seen: seen.append(g) or g * 2)
        out.retain_grad()
        out.sum().backward()
        twice, q.grad = q.grad, None
        assert len(seen) == 1 and torch.equal(out.grad, torch.full_like(out, 2.0)), name
        fastattn.attention(q, k, v, kernel=name).sum().backward()
        assert torch.allclose(twice, 2 * q.grad, atol=1e-4), name
        q.grad = k.grad = v.grad = None


def test_fault_77_a_tuned_call_too():
    """The row's own example: training with a mask gradient, and a gate on the output, through what wins."""
    q, k, v = qkv(grad=True)
    bias = torch.randn(19, 19, requires_grad=True)
    for kernels in (["matmul"], ["sdpa_math"], ["torch_math"]):
        with fastattn.options(kernels=kernels):
            for _ in range(2):
                out = fastattn.sdpa(q, k, v, bias)
                out.mul_(torch.sigmoid(torch.randn(19, 16, requires_grad=True)))
                out += 1
                out.sum().backward()
                assert fastattn.explain(q, k, v, bias, tune=True).problem.mask_grad and bias.grad is not None
                bias.grad = None
