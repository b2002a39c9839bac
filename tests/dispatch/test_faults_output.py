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
