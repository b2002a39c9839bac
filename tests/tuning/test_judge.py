"""The gate: what must pass passes, what must fail fails, and the reference it judges by is right."""

from __future__ import annotations

import pytest
import torch
from building import CPU
from fakes import problem, qkv

from fastattn.environment.settings import current_settings
from fastattn.planning import binding, candidates
from fastattn.tuning.accuracy import probes as samples
from fastattn.tuning.accuracy import reference
from fastattn.tuning.accuracy.judge import ROWS, Judge, judges_of_problem, row_sample, worst_errors
from fastattn.tuning.accuracy.probes import (
    PROBES,
    _hidden_large,
    _wide,
    plain_sample,
    probe_problem,
    probe_sample,
    stand_in_scale,
)
from fastattn.tuning.accuracy.sample import Sample

HOST = torch.device("cpu")


def errors(p, name):
    """What the gate finds for one candidate of a problem."""
    found = candidates.by_name(name, candidates.decisions(p, CPU, current_settings()))
    scale = None if p.scale == "positive" else stand_in_scale(p)
    return worst_errors(judges_of_problem(p, HOST), binding.bind(found[0], probe_problem(p), scale))


PROBLEMS = {
    "square": {},
    "one row": {"q_len": 1, "kv_len": 129},
    "one key": {"q_len": 65, "kv_len": 1},
    "remainder 1": {"q_len": 65, "kv_len": 129},
    "remainder 63": {"q_len": 127, "kv_len": 191},
    "gqa": {"q_heads": 8, "kv_heads": 2, "q_len": 33, "kv_len": 100},
    "mqa decode": {"q_heads": 8, "kv_heads": 1, "q_len": 1, "kv_len": 1000},
    "odd head dim": {"head_dim": 37},
    "head_dim 1": {"head_dim": 1},
    "head_dim_v larger": {"head_dim": 24, "head_dim_v": 56},
    "head_dim_v odd": {"head_dim": 64, "head_dim_v": 33},
    "causal": {"causal": "top_left"},
    "causal, more keys": {"causal": "top_left", "q_len": 65, "kv_len": 129},
    "causal, more rows": {"causal": "top_left", "q_len": 129, "kv_len": 65},
    "causal bottom right, more keys": {"causal": "bottom_right", "q_len": 65, "kv_len": 129},
    "causal bottom right, empty rows": {"causal": "bottom_right", "q_len": 129, "kv_len": 65},
    "bool mask": {"mask": "bool", "mask_shape": "bhqk", "mask_strides": "contiguous", "kv_len": 129},
    "padding mask": {"mask": "bool", "mask_shape": "b11k", "mask_strides": "contiguous", "kv_len": 129},
    "bias": {"mask": "dtype", "mask_shape": "1hqk", "mask_strides": "contiguous", "kv_len": 129},
    "causal and mask": {"causal": "top_left", "mask": "bool", "mask_shape": "11qk", "kv_len": 129},
    "negative scale": {"scale": "negative"},
    "scale 0": {"scale": "zero"},
    "packed": {"strides": ("packed",) * 3},
    "expanded keys": {"strides": ("contiguous", "expanded", "expanded")},
    "bshd": {"layout": "bshd", "strides": ("transposed",) * 3},
}


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("fields", PROBLEMS.values(), ids=PROBLEMS.keys())
def test_the_default_passes_every_probe(fields, dtype, grad):
    if fields.get("mask") == "dtype":
        fields = {**fields, "mask": dtype, "mask_grad": grad}
    found = errors(problem(dtype=dtype, needs_grad=grad, **fields), "default")
    assert found.passed, found
    assert (found.backward is not None) == grad


@pytest.mark.parametrize("head_dim", [64, 128])
def test_plain_bf16_matmul_fails_where_scores_are_wide_and_only_at_rung_exact(head_dim, monkeypatch):
    p = problem(dtype="bfloat16", head_dim=head_dim, q_len=100, kv_len=513)
    assert errors(p.replace(accuracy="dtype"), "matmul").passed
    monkeypatch.setattr(samples, "PROBES", (_wide, _hidden_large))  # the last one needs a mask
    assert errors(p, "matmul").forward > 4
    assert errors(p.replace(accuracy="dtype"), "matmul").passed


def test_every_probe_is_a_head_of_its_own_and_the_last_needs_hidden_keys():
    assert probe_problem(problem()).kv_heads == len(PROBES) - 1
    assert probe_problem(problem(causal="top_left", q_heads=8)).q_heads == 2 * len(PROBES)


def test_a_number_is_the_largest_row_error_over_the_spread():
    p = problem(dtype="bfloat16", q_len=100, kv_len=513)
    worst = errors(p.replace(accuracy=1.0), "matmul").forward
    assert 0 < worst < 1
    assert errors(p.replace(accuracy=worst * 1.01), "matmul").passed
    assert not errors(p.replace(accuracy=worst * 0.99), "matmul").passed


# --- budgets


def judge(**fields):
    p = problem(kv_heads=1, q_heads=2, **fields)
    q, k, v = qkv(p.q_len, p.kv_len, heads=2, kv_heads=1, dtype=p.torch_dtype, grad=p.needs_grad)
    grad = torch.ones_like(q, requires_grad=False) if p.needs_grad else None
    return Judge(Sample(p, q, k, v, None, grad), p.head_dim**-0.5)


@pytest.mark.parametrize("row", [0, 1, 40, 63])
@pytest.mark.parametrize("accuracy", ["exact", "dtype", 0.01])
def test_the_budget_of_each_row_is_where_it_starts_to_fail(row, accuracy):
    judged = judge(accuracy=accuracy, causal="top_left")
    head = judged.heads[0]

    def off_by(budgets):
        out = head.exact.out.clone()
        out[1, row, 5] += budgets * head.rows[1, row]
        return judged.errors(lambda q, k, v, mask: out.float()[None])

    assert off_by(0.75).passed and off_by(-0.75).passed
    assert not off_by(1.25).passed and not off_by(-1.25).passed


def test_a_row_with_small_values_has_a_small_budget():
    p = problem(kv_heads=1, q_heads=1, causal="top_left")
    q, k, v = qkv(64, heads=1)
    v[:, :, 0] *= 1e-3  # row 0 sees nothing else
    judged = Judge(Sample(p, q, k, v, None, None), 32**-0.5)
    assert judged.heads[0].rows[0, 0] < 0.01 * judged.heads[0].rows[0, 1:].min()


@pytest.mark.parametrize("name", ["dq", "dk", "dv"])
def test_the_budget_of_each_gradient_is_where_it_starts_to_fail(name):
    judged = judge(needs_grad=True)
    head = judged.heads[0]

    def off_by(budgets):
        class Attention(torch.autograd.Function):
            @staticmethod
            def forward(ctx, q, k, v):
                return head.exact.out.float()[None]

            @staticmethod
            def backward(ctx, grad):
                found = {n: want.clone() for n, (want, _) in head.gradients.items()}
                found[name].flatten()[7] += budgets * head.gradients[name][1]
                return found["dq"].float()[None], found["dk"].float()[None, None], found["dv"].float()[None, None]

        return judged.errors(lambda q, k, v, mask: Attention.apply(q, k, v))

    assert off_by(0.75).passed
    assert off_by(1.25).forward < 1 and not off_by(1.25).passed


@pytest.mark.parametrize(
    "out",
    [
        lambda q: torch.full_like(q, float("nan")),
        lambda q: torch.full_like(q, float("inf")),
        lambda q: torch.zeros_like(q),
    ],
    ids=["nan", "inf", "zeros"],
)
def test_fault_13_no_number_at_all_is_no_pass(out):
    """NaN, infinity or zeros in the place of numbers never pass."""
    assert not judge().errors(lambda q, k, v, mask: out(q)).passed


@pytest.mark.parametrize(
    "out",
    [lambda q: q.double(), lambda q: q[:, :1], lambda q: q.transpose(1, 2)],
    ids=["dtype", "shape", "layout"],
)
def test_an_output_of_another_form_is_an_error(out):
    with pytest.raises(ValueError, match="its output is"):
        judge().errors(lambda q, k, v, mask: out(q))


# --- rows of long problems


def test_short_problems_are_compared_whole():
    assert row_sample(problem(q_len=1024, kv_len=1024), HOST) is None


@pytest.mark.parametrize("q_len, kv_len", [(1025, 1024), (4096, 4096), (100_000, 77), (193, 21_000)])
def test_the_rows_of_long_problems_include_the_first_and_the_last_tile(q_len, kv_len):
    rows = row_sample(problem(q_len=q_len, kv_len=kv_len), HOST).tolist()
    assert rows[:64] == list(range(64))
    assert rows[-64:] == list(range(q_len - 64, q_len))
    assert len(rows) <= ROWS and rows == sorted(set(rows))
    assert max(b - a for a, b in zip(rows, rows[1:])) <= q_len // 32


def test_on_very_many_keys_fewer_rows_are_looked_at():
    rows = row_sample(problem(q_len=500, kv_len=10**6), HOST).tolist()
    assert rows[:8] == list(range(8)) and rows[-8:] == list(range(492, 500)) and len(rows) <= 24


@pytest.mark.parametrize("row", [0, 63, 1136, -64, -1])
def test_an_error_in_a_looked_at_row_of_a_long_problem_fails(row):
    p = problem(q_len=2200, kv_len=1000, head_dim=8, needs_grad=True)
    row = row if row != 1136 else int(row_sample(probe_problem(p), HOST)[100])
    found = candidates.by_name("default", candidates.decisions(p, CPU, current_settings()))
    call = binding.bind(found[0], probe_problem(p), None)
    judged = judges_of_problem(p, HOST)

    def spoilt(q, k, v, mask):
        out = call(q, k, v, mask).clone()
        out[0, 2, row] *= 1.05
        return out

    assert worst_errors(judged, call).passed
    assert not worst_errors(judged, spoilt).passed


# --- random numbers


@pytest.mark.parametrize("grad", [False, True])
def test_verifying_leaves_torchs_random_numbers_alone(grad):
    before = torch.get_rng_state()
    assert errors(problem(needs_grad=grad, causal="top_left", mask="bool", mask_shape="11qk"), "default").passed
    plain_sample(problem(needs_grad=grad), HOST)
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_are_the_same_every_time():
    one, two = (probe_sample(problem(), HOST) for _ in range(2))
    assert all(torch.equal(getattr(one, n), getattr(two, n)) for n in "qkv")


# --- the reference


def by_einsum(q, k, v, mask, scale, diagonal):
    """One kv head in float64, written another way: weights from exponentials, sums by einsum."""
    scores = torch.einsum("gsd,td->gst", q, k) * scale
    visible = torch.ones(q.shape[1], k.shape[0], dtype=torch.bool)
    if diagonal is not None:
        visible &= torch.arange(k.shape[0])[None] <= torch.arange(q.shape[1])[:, None] + diagonal
    visible = visible.expand_as(scores)
    if mask is not None and mask.dtype is torch.bool:
        visible = visible & mask
    elif mask is not None:
        visible = visible & (mask > float("-inf"))
        scores = scores + mask.masked_fill(mask == float("-inf"), 0)
    top = scores.detach().masked_fill(~visible, -1e300).amax(-1, keepdim=True)
    weights = torch.where(visible, torch.where(visible, scores - top, 0.0).exp(), 0.0)
    total = weights.sum(-1, keepdim=True)
    return torch.einsum("gst,te->gse", weights / total.where(total > 0, 1.0), v)


REFERENCES = {
    "plain": (None, None),
    "causal": (None, 0),
    "causal, empty rows": (None, -5),
    "bottom right": (None, 7),
    "bool mask": ("bool", None),
    "bias and causal": ("float", 3),
}


@pytest.mark.parametrize("kind, diagonal", REFERENCES.values(), ids=REFERENCES.keys())
def test_the_reference_equals_an_einsum_and_autograd(kind, diagonal):
    q, k, v = (torch.randn(*s, dtype=torch.float64).requires_grad_() for s in ((3, 20, 8), (27, 8), (27, 5)))
    mask = None
    if kind:
        mask = torch.rand(3, 20, 27) < 0.6
        mask[:, 4] = False
        mask = mask if kind == "bool" else torch.randn(3, 20, 27, dtype=torch.float64).masked_fill(~mask, -float("inf"))
    grad = torch.randn(3, 20, 5, dtype=torch.float64)
    with torch.no_grad():
        found = reference.attend(q, k, v, mask, scale=0.3, upper=diagonal, grad=grad)
    want = by_einsum(q, k, v, mask, 0.3, diagonal)
    dq, dk, dv = torch.autograd.grad(want, (q, k, v), grad)
    for got, right in ((found.out, want), (found.gradients.dq, dq), (found.gradients.dk, dk), (found.gradients.dv, dv)):
        torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-13)


def test_the_reference_on_chosen_rows_equals_those_of_the_whole():
    q, k, v = (torch.randn(*s, dtype=torch.float64) for s in ((2, 20, 8), (27, 8), (27, 5)))
    rows = torch.tensor([0, 7, 19])
    whole = reference.attend(q, k, v, scale=0.3, upper=2)
    some = reference.attend(q, k, v, scale=0.3, upper=2, rows=rows)
    torch.testing.assert_close(some.out, whole.out[:, rows], rtol=1e-13, atol=1e-14)


def test_a_row_that_sees_nothing_is_zeros_with_zero_gradients():
    q, k, v = (torch.randn(*s, dtype=torch.float64) for s in ((1, 6, 4), (9, 4), (9, 4)))
    mask = torch.ones(1, 6, 9, dtype=torch.bool)
    mask[:, 2] = False
    found = reference.attend(q, k, v, mask, scale=0.5, grad=torch.ones(1, 6, 4))
    assert not found.out[:, 2].any() and not found.gradients.dq[:, 2].any()
    assert found.out[:, 1].any() and found.gradients.dq[:, 1].any()
    without = [x for i, x in enumerate(q[0]) if i != 2]
    rest = reference.attend(torch.stack(without)[None], k, v, scale=0.5, grad=torch.ones(1, 5, 4))
    torch.testing.assert_close(found.gradients.dk, rest.gradients.dk, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(found.gradients.dv, rest.gradients.dv, rtol=1e-13, atol=1e-14)
