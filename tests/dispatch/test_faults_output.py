"""Faults 77, 78 and 79 of reference/faults2.md: how an output lies in memory, and what autograd knows of it."""

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
    """Every candidate's output lies as F.sdpa's; the outputs. flex takes long, and is asked only where it is wanted."""
    views = [back(layout, x) for x in (q, k, v)]
    want = lies(to(layout, F_sdpa(*views, mask, enable_gqa=True, **options)))
    names = [n for n in accepted(q, k, v, mask, layout, **options) if n != "flex" or flex]
    assert len(names) > 3
    found = {name: fastattn.attention(q, k, v, mask, layout, kernel=name, **options) for name in names}
    assert {name: lies(out) for name, out in found.items()} == dict.fromkeys(names, want)
    return found.values()


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
        found = hold_to_default(q, k, v, layout=layout, flex=dv == 8)
        plain = to(layout, F_sdpa(*(back(layout, x) for x in (q, k, v))))
        for out in found:
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
        # some outputs in training are views, which cannot be detached in place
        is_view = want == "detached" and ("gqa_fold" in name or name == "sdpa_math")
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
    names = accepted(q, k, v)
    for name in names[len(form) % 2 :: 2]:  # the next form has the others
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


# --- fault 78: second derivatives

MATH = {
    "keys by dims": {"memory": ("contiguous", "dims_before_rows", "contiguous")},
    "queries by dims": {"memory": ("last_stride_2", "transposed", "contiguous"), "hkv": 2},
    "narrow v": {"dv": 8},
    "wide v": {"dv": 24, "hkv": 2, "memory": "transposed"},
    "one query": {"sq": 1, "skv": 7, "dv": 8},
    "wide v, float64": {"dv": 24, "dtype": torch.float64},
}


def penalty(call, tensors):
    """The gradients of a gradient penalty, as a critic in training has it."""
    out = call()
    first = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)


def all_close(found, want):
    scale = max(float(b.abs().max()) for b in want)
    return all(torch.allclose(a, b, atol=1e-4 * scale) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("case", MATH)
def test_fault_78_a_gradient_penalty_where_the_default_takes_its_math(case, is_causal):
    """Gradients can be differentiated again wherever F.sdpa's can, whatever kernel serves."""
    q, k, v = qkv(grad=True, **MATH[case])
    options = {"is_causal": is_causal}
    want = penalty(lambda: F_sdpa(q, k, v, enable_gqa=True, **options), [q, k, v])
    names = accepted(q, k, v, **options)
    assert {name.split("+")[0] for name in names} >= {"torch_flash", "matmul", "torch_math", "sdpa_math"}
    for name in names:
        assert all_close(penalty(lambda n=name: fastattn.attention(q, k, v, kernel=n, **options), [q, k, v]), want), (
            name
        )


def test_fault_78_with_a_mask_that_learns():
    q, k, v = qkv(grad=True)
    bias = torch.randn(2, 1, 19, 19, requires_grad=True)
    want = penalty(lambda: F_sdpa(q, k, v, bias), [q, k, v, bias])
    for name in accepted(q, k, v, bias):
        assert all_close(penalty(lambda n=name: fastattn.attention(q, k, v, bias, kernel=n), [q, k, v, bias]), want), (
            name
        )


@pytest.mark.parametrize("layout", ["bshd", "sbhd"])
def test_fault_78_in_other_layouts_with_a_mask(layout):
    q, k, v = qkv(grad=True, dv=8, layout=layout)
    mask = torch.rand(2, 1, 1, 19) > 0.3
    mask[..., 0] = True
    want = penalty(lambda: F_sdpa(*(back(layout, x) for x in (q, k, v)), mask), [q, k, v])
    for name in accepted(q, k, v, mask, layout):
        assert all_close(
            penalty(lambda n=name: fastattn.attention(q, k, v, mask, layout, kernel=n), [q, k, v]), want
        ), name


def test_fault_78_a_hessian_and_third_derivatives():
    q, k, v = qkv(1, 1, sq=2, skv=3, d=2, dv=3, dtype=torch.float64, grad=True)
    for name in accepted(q, k, v):
        mine = torch.autograd.functional.hessian(
            lambda q, n=name: fastattn.attention(q, k, v, kernel=n).square().sum(), q
        )
        want = torch.autograd.functional.hessian(lambda q: F_sdpa(q, k, v).square().sum(), q)
        assert torch.allclose(mine, want), name
        many = torch.autograd.functional.jacobian(
            lambda q, n=name: fastattn.attention(q, k, v, kernel=n), q, vectorize=True
        )
        assert torch.allclose(many, torch.autograd.functional.jacobian(lambda q: F_sdpa(q, k, v), q)), name
        assert torch.autograd.gradgradcheck(lambda *given, n=name: fastattn.attention(*given, kernel=n), (q, k, v)), (
            name
        )
        third = []
        for call in (lambda n=name: fastattn.attention(q, k, v, kernel=n), lambda: F_sdpa(q, k, v)):
            x = call().pow(3).sum()
            for _ in range(3):
                [x] = torch.autograd.grad(x.square().sum(), [q], create_graph=True)
            third.append(x)
        assert torch.allclose(*third), name


def test_fault_78_only_some_inputs_learn_and_first_gradients_are_the_kernels_own():
    for learns in itertools.product([False, True], repeat=3):
        if not any(learns):
            continue
        q, k, v = (x.requires_grad_(yes) for x, yes in zip(qkv(dv=8), learns, strict=True))
        tensors = [x for x in (q, k, v) if x.requires_grad]
        want = penalty(lambda q=q, k=k, v=v: F_sdpa(q, k, v), tensors)
        once = torch.autograd.grad(F_sdpa(q, k, v).sum(), tensors)
        for name in accepted(q, k, v):
            assert all_close(
                penalty(lambda q=q, k=k, v=v, n=name: fastattn.attention(q, k, v, kernel=n), tensors), want
            )
            found = torch.autograd.grad(fastattn.attention(q, k, v, kernel=name).sum(), tensors)
            assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, once, strict=True)), name


def test_fault_78_where_the_default_raises_a_fused_kernel_raises_the_same():
    q, k, v = qkv(grad=True)
    with pytest.raises(RuntimeError, match="not implemented") as stock:
        penalty(lambda: F_sdpa(q, k, v), [q, k, v])
    with pytest.raises(RuntimeError) as ours:
        penalty(lambda: fastattn.attention(q, k, v, kernel="torch_flash"), [q, k, v])
    assert str(ours.value) == str(stock.value)


def test_fault_78_through_the_drop_in_under_autocast():
    q, k, v = qkv(grad=True, dv=8)
    with torch.autocast("cpu", torch.bfloat16):
        want = penalty(lambda: F_sdpa(q, k, v).float(), [q, k, v])
        for kernels in (["torch_flash"], ["matmul"], ["torch_math"]):
            with fastattn.options(kernels=kernels):
                found = penalty(lambda: fastattn.sdpa(q, k, v).float(), [q, k, v])
            assert all(torch.allclose(a, b, atol=0.1 * float(b.abs().max())) for a, b in zip(found, want, strict=True))
