"""The words that decisions are made of: layouts, stride classes, masks, buckets, Problem, Need."""

from __future__ import annotations

import json

import pytest
import torch
from building import CPU, facts_of, problem_of, qkv

from fastattn.kernels.limits import Forbid, OneOf, Range, RefuseWhen
from fastattn.problems import bands, call_key, call_options, dense_masks, layouts, length_buckets, masks
from fastattn.problems.call_facts import CallFacts
from fastattn.problems.classify import classify
from fastattn.problems.problem import Problem
from fastattn.tuning.accuracy.probes import _strided

BASE = Problem("cpu", "float32", 16, 16, 4, 4, 2, 37, 37)

# --- layouts


@pytest.mark.parametrize("layout", ["bhsd", "bshd", "sbhd"])
def test_layouts_are_views_and_round_trip(layout):
    x = torch.randn(2, 3, 5, 7)
    there = layouts.from_bhsd(x, layout)
    assert there.shape == tuple({"b": 2, "h": 3, "s": 5, "d": 7}[n] for n in layout)
    assert there.data_ptr() == x.data_ptr() and torch.equal(layouts.to_bhsd(there, layout), x)
    assert layouts.to_bhsd(there, layout).stride() == x.stride()


@pytest.mark.parametrize("cls", layouts.STRIDE_CLASSES)
def test_every_stride_class_is_recognised(cls):
    x = _strided(torch.randn(2, 3, 5, 7), cls)
    assert x.shape == (2, 3, 5, 7) and layouts.stride_class(x.shape, x.stride()) == cls


# Dimensions of size 1 have no say, so classes coincide: what each class becomes where (b, h, s, d) has ones.
ONES = {
    (1, 3, 5, 7): {"seq_first": "transposed"},
    (2, 1, 5, 7): {"transposed": "contiguous", "cache": "cache_bshd", "expanded": "contiguous"},
    (1, 1, 5, 7): {"transposed": "contiguous", "seq_first": "contiguous", "cache": "contiguous", "cache_bshd": "contiguous",
                   "expanded": "contiguous"},
    (2, 3, 1, 7): {"transposed": "contiguous", "seq_first": "contiguous"},
    (1, 3, 1, 7): {"transposed": "contiguous", "seq_first": "contiguous", "cache_bshd": "contiguous", "packed": "contiguous"},
    (1, 1, 1, 7): {},
}  # fmt: skip


@pytest.mark.parametrize("shape", ONES)
@pytest.mark.parametrize("cls", layouts.STRIDE_CLASSES)
def test_strides_of_dimensions_of_one_have_no_say(shape, cls):
    x = _strided(torch.randn(shape), cls)
    found = layouts.stride_class(x.shape, x.stride())
    # whatever stands in the stride of a dimension of size 1, the class is the same
    for dim, n in enumerate(shape):
        for odd in (0, 1, 12345):
            stride = [odd if n == 1 and i == dim else st for i, st in enumerate(x.stride())]
            assert layouts.stride_class(shape, stride) == found
    if shape == (1, 1, 1, 7) and cls != "other":
        assert found == "contiguous"
    if x.is_contiguous():
        assert found == "contiguous"
    if cls in ONES[shape]:
        assert found == ONES[shape][cls]


@pytest.mark.parametrize("cls", ["contiguous", "transposed", "seq_first", "cache", "cache_bshd", "packed"])
def test_order_in_memory_is_f_sdpas_for_that_query(cls):
    q = _strided(torch.randn(2, 3, 5, 8), cls)
    out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    order = layouts.order_in_memory(q.shape, q.stride())
    assert layouts.is_dense(out, order)
    assert layouts.empty_in_order(q, out.shape, order).stride() == out.stride()


# --- masks


@pytest.mark.parametrize("q_len, kv_len", [(3, 5), (5, 3), (4, 4), (1, 4), (4, 1)])
def test_triangles(q_len, kv_len):
    like = torch.zeros(())
    for corner, shift in (("top_left", 0), ("bottom_right", kv_len - q_len)):
        drawn = bands.visible(like, q_len, kv_len, *bands.band(corner, None, q_len, kv_len))
        assert drawn.tolist() == [[j <= i + shift for j in range(kv_len)] for i in range(q_len)]
    assert bands.visible(like, q_len, kv_len, *bands.band("bottom_right", None, q_len, kv_len))[-1].all()


def test_additive_and_intersect():
    mask = torch.tensor([[True, False, True], [True, True, True]])
    inf = float("inf")
    assert dense_masks.additive(mask, torch.zeros(1)).tolist() == [[0, -inf, 0], [0, 0, 0]]
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for seen in (mask, mask.T, mask.expand(2, 2, 3), mask[:, ::2], mask[:0]):
            found = dense_masks.additive(seen, torch.zeros(1, dtype=dtype))
            assert found.dtype is dtype and found.is_contiguous() and not found.signbit()[seen].any()
            assert torch.equal(found, torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -inf))
    assert dense_masks.intersect(mask, bands.visible(mask, 2, 3, None, 0)).tolist() == [
        [True, False, False],
        [True, True, False],
    ]
    assert dense_masks.intersect(None, bands.visible(mask, 2, 3, None, 1)).tolist() == [
        [True, True, False],
        [True, True, True],
    ]
    bias = torch.tensor([[1.0, 2.0, 3.0]])
    assert dense_masks.intersect(bias, bands.visible(mask, 2, 3, None, 0)).tolist() == [[1, -inf, -inf], [1, 2, -inf]]


def test_causal_values_are_equal_by_value():
    assert masks.Causal() == masks.Causal("top_left") != masks.Causal("bottom_right")
    assert len({masks.Causal(), masks.Causal("top_left")}) == 1


# --- buckets


def test_bucket_edges():
    edges = sorted({length_buckets.bucket_bounds(n)[1] for n in range(1, 5000)})
    assert edges[:13] == [1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 176, 256, 368]
    assert all(edge % 16 == 0 for edge in edges[4:])


def test_buckets_tile_the_lengths():
    end = 0
    while end < 10**6:
        low, high = length_buckets.bucket_bounds(end + 1)
        assert low == end + 1 <= high and length_buckets.bucket_bounds(low) == length_buckets.bucket_bounds(high) == (
            low,
            high,
        )
        if low > 16:
            assert high <= 1.6 * low + 16  # half a power of two wide
        end = high


def test_a_canonical_length_lies_in_its_own_bucket_off_the_tile_grid():
    lengths = range(1, 20000)
    canonical = [length_buckets.canonical_length(n) for n in lengths]
    assert canonical == sorted(canonical)
    for n, c in zip(lengths, canonical, strict=True):
        assert (
            length_buckets.bucket_bounds(c) == length_buckets.bucket_bounds(n)
            and length_buckets.canonical_length(c) == c
        )
        assert c <= 16 or c % 16 == 15
    assert length_buckets.bucket_bounds(0) == (0, 0) and length_buckets.canonical_length(0) == 0


def test_batch_buckets_are_powers_of_two():
    assert [length_buckets.canonical_batch(n) for n in (1, 2, 3, 4, 5, 8, 9, 64, 65)] == [1, 2, 4, 4, 8, 8, 16, 64, 128]


# --- Problem


def test_from_key_is_pure():
    q, k, v = qkv(hkv=2, grad=True)
    key = call_key.call_key(q, k, v, None, "bhsd", call_options.parse_options({"is_causal": True}))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        inside = classify(key)[0]
    assert inside == classify(key)[0] and inside.needs_grad and inside.dtype == "float32"


def test_from_key_sees_each_thing_that_matters():
    q, k, v = qkv(hkv=2)
    mask = torch.ones(2, 1, 1, 19, dtype=torch.bool)
    seen = [
        problem_of(q, k, v),
        problem_of(q, k, v, is_causal=True),
        problem_of(q, k, v, scale=0.0),
        problem_of(q, k, v, scale=-1.0),
        problem_of(q, k, v, mask),
        problem_of(q, k, v, mask.expand(2, 4, 19, 19)),
        problem_of(q, k, v, mask.float()),
        problem_of(q, k, v, accuracy="dtype"),
        problem_of(q, k, v, accuracy=0.01),
        problem_of(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), layout="bshd"),
        problem_of(q.transpose(1, 2).contiguous().transpose(1, 2), k, v),
        problem_of(q.clone().requires_grad_(), k, v),
        problem_of(q.half(), k.half(), v.half()),
    ]
    assert len(set(seen)) == len({p.digest for p in seen}) == len(seen)
    assert seen[4].mask_shape == "b11k" and seen[3].scale == "negative" and seen[9].strides == ("contiguous",) * 3
    assert problem_of(q, k, v, scale=0.3) == seen[0] == problem_of(q, k, v, scale=None)


@pytest.mark.parametrize(
    "q_len, kv_len, corner, is_causal, drawn",
    [
        (5, 5, "bottom_right", False, "top_left"), (5, 9, "bottom_right", False, "bottom_right"),
        (9, 5, "bottom_right", False, "bottom_right"), (1, 9, "bottom_right", False, None),
        (1, 9, "top_left", False, "top_left"),
        (5, 9, "bottom_right", True, "top_left"), (9, 5, "bottom_right", True, "bottom_right"),
        (5, 5, "bottom_right", True, "top_left"), (5, 9, "top_left", True, "top_left"), (5, 9, None, True, "top_left"),
        (5, 9, None, False, None),
    ],
)  # fmt: skip
def test_corners_are_normalised(q_len, kv_len, corner, is_causal, drawn):
    q, k, v = qkv(sq=q_len, skv=kv_len)
    assert problem_of(q, k, v, masks.Causal(corner) if corner else None, is_causal=is_causal).causal == drawn


@pytest.mark.parametrize("memory", ["contiguous", "packed", "expanded_heads", "last_stride_2"])
def test_extent_is_the_largest_offset(memory):
    q, k, v = qkv(memory=memory, skv=50)
    offsets = [torch.arange(n) * st for x in (q, k, v) for n, st in zip(x.shape, x.stride(), strict=True)]
    largest = max(sum(int(o[-1]) for o in offsets[i : i + 4]) for i in (0, 4, 8))
    assert facts_of(q, k, v).extent == largest > 0


OTHER = {
    "device": "cuda", "dtype": "float16", "lengths": "kv", "strides": ("packed",) * 3, "mask": "bool", "mask_shape": "11qk",
    "mask_strides": "expanded", "causal": "top_left", "scale": "zero", "switches": ("mkldnn.enabled=False",), "accuracy": 0.5,
    "layout": "bshd", "flash_impl": "FA3", "cast_from": ("float32",), "softcap": 1.0, "window": (1, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", Problem._fields)
def test_every_field_changes_the_digest(name):
    value = getattr(BASE, name)
    other = OTHER.get(name, not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else None)
    changed = BASE.replace(**{name: other})
    assert changed != BASE and changed.digest != BASE.digest


def test_what_is_one_calls_own_is_no_part_of_the_problem():
    assert not set(CallFacts._fields) & set(Problem._fields)


def test_json_round_trip():
    for p in (
        BASE,
        BASE.replace(strides=("packed", "cache", "other"), accuracy=0.25, mask="bool", cast_from=("float32",) * 3),
    ):
        assert Problem.from_json(json.loads(json.dumps(p.to_json()))) == p


@pytest.mark.parametrize(
    "broken", [{"q_len": "37"}, {"dtype": 1}, {"strides": "packed"}, {"more": 1}, {"accuracy": "best"}, {"q_len": None}]
)
def test_json_that_is_no_problem_is_refused(broken):
    with pytest.raises((ValueError, TypeError)):
        Problem.from_json({**BASE.to_json(), **broken})
    with pytest.raises((ValueError, TypeError, KeyError)):
        Problem.from_json(
            {name: x for name, x in BASE.to_json().items() if name not in broken} if "more" not in broken else {}
        )


def test_bucketed_keeps_what_is_not_a_length():
    p = BASE.replace(q_len=40, kv_len=41, batch=3)
    assert p.bucketed("exact") is p
    assert p.bucketed("kv") == p.replace(kv_len=47, lengths="kv")
    assert p.bucketed("all") == p.replace(q_len=46, kv_len=47, batch=4, lengths="all")  # one bucket, yet not square
    assert p.replace(q_len=41).bucketed("all") == p.replace(q_len=47, kv_len=47, batch=4, lengths="all")


# --- Need

RANGES = [Range("head_dim", min=8, max=256, multiple_of=8), Range("kv_len", min=2), Range("batch", max=65535)]


@pytest.mark.parametrize("need", RANGES, ids=str)
def test_a_range_accepts_its_edges_and_names_both_numbers(need):
    inside, outside = need.edges()
    assert inside and outside
    for value in inside:
        assert need.why_not(*_with(need.field, value)) is None
    for value in outside:
        why = need.why_not(*_with(need.field, value))
        assert why and need.field in why and str(value) in why
        assert any(str(limit) in why.replace(str(value), "", 1) for limit in (need.min, need.max, need.multiple_of))


def _with(field, value):
    from dataclasses import replace

    return (BASE, replace(CPU, capability=value)) if field == "capability" else (BASE.replace(**{field: value}), CPU)


def test_other_needs_name_both_sides():
    one_of = OneOf("scale", ("positive", "zero"))
    assert one_of.why_not(BASE, CPU) is None
    assert one_of.why_not(BASE.replace(scale="negative"), CPU) == "scale negative is not one of positive, zero"
    forbid = Forbid("mask", "a mask")
    assert forbid.why_not(BASE, CPU) is None
    assert forbid.why_not(BASE.replace(mask="bool"), CPU) == "a mask is not supported (mask bool)"
    assert Forbid("dropout", "dropout").why_not(BASE.replace(dropout=True), CPU) == "dropout is not supported"
    when = RefuseWhen("q_len {p.q_len} > kv_len {p.kv_len} on {device.type}", lambda p, _: p.q_len > p.kv_len)
    assert when.why_not(BASE, CPU) is None
    assert when.why_not(BASE.replace(kv_len=30), CPU) == "q_len 37 > kv_len 30 on cpu"
    assert all(need.describe() for need in (one_of, forbid, when, *RANGES))
