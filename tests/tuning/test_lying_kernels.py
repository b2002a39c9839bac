"""Kernels that lie, each the fastest by a fake clock: they never win, and never reach the caller on a tuned problem."""

from __future__ import annotations

import math

import pytest
import torch
from fakes import FAST, Clock, add, check, honest, made_up, qkv, replace_default, row, turn
from torch.nn.functional import pad

import fastattn
from fastattn.problems import masks
from fastattn.tuning.accuracy import probes as samples
from fastattn.tuning.accuracy.probes import _gaussian, _hidden_large


def two_percent(q, k, v, mask, a):
    return honest(q, k, v, mask, a) * 1.02


def top_left(q, k, v, mask, a):
    return honest(q, k, v, mask, a._replace(upper=a.upper and 0))


def bottom_right(q, k, v, mask, a):
    corner = None if a.upper is None else k.shape[2] - q.shape[2]
    return honest(q, k, v, mask, a._replace(upper=corner))


def no_triangle(q, k, v, mask, a):
    return honest(q, k, v, mask, a._replace(upper=None))


def one_off_the_diagonal(q, k, v, mask, a):
    return honest(q, k, v, mask, a._replace(upper=a.upper and a.upper + 1))


def drops_the_last_keys(q, k, v, mask, a):
    whole = k.shape[2] // 64 * 64 or k.shape[2]
    cut = mask if mask is None or mask.shape[3] == 1 else mask[..., :whole]
    return honest(q, k[:, :, :whole], v[:, :, :whole], cut, a)


def wrong_last_rows(q, k, v, mask, a):
    out = honest(q, k, v, mask, a).clone()
    out[:, :, q.shape[2] // 64 * 64 :] *= 1.02
    return out


def ignores_the_mask(q, k, v, mask, a):
    return honest(q, k, v, None, a)


def one_mask_for_all_heads(q, k, v, mask, a):
    return honest(q, k, v, mask[:, :1], a)


def ignores_the_scale(q, k, v, mask, a):
    return honest(q, k, v, mask, a._replace(scale=q.shape[3] ** -0.5))


def swaps_the_group(q, k, v, mask, a):
    """Query head h on kv head h % kv_heads, not h // group."""
    repeat = q.shape[1] // k.shape[1]
    return honest(q, k.repeat(1, repeat, 1, 1), v.repeat(1, repeat, 1, 1), mask, a)


def a_nan_row(q, k, v, mask, a):
    out = honest(q, k, v, mask, a).clone()
    out[:, -1, 3] = float("nan")
    return out


def scales_the_input(q, k, v, mask, a):
    with torch.no_grad():
        q.mul_(a.scale)
    return honest(q, k, v, mask, a._replace(scale=1.0))


def leaves_rows_unwritten(q, k, v, mask, a):
    right = honest(q, k, v, mask, a)
    out = torch.empty_like(right)
    out[:, :, :-1] = right[:, :, :-1]
    return out


def _over_padding(counts):
    """Keys padded with zeros to a multiple of 64: their scores of 0 take part in the row's maximum; if `counts`, in its sum."""

    def run(q, k, v, mask, a):
        more = -k.shape[2] % 64 or 64
        scores = q.float() @ pad(k.float(), (0, 0, 0, more)).mT * a.scale
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        if not counts:
            weights[..., -more:] = 0
        weights = weights / weights.sum(-1, keepdim=True)
        return (weights @ pad(v.float(), (0, 0, 0, more))).to(q.dtype)

    return run


def hidden_maximum(q, k, v, mask, a):
    """bfloat16 scores, exact near the row's maximum, which is taken over hidden keys too."""
    scores = q.float() @ k.float().mT
    shifted = ((scores - scores.amax(-1, keepdim=True)) * a.scale).to(q.dtype)
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(a.upper + 1)
    return torch.softmax(shifted.masked_fill(hidden, float("-inf")), -1) @ v


class _Backward(torch.autograd.Function):
    """The right output, and gradients multiplied by `factors`."""

    @staticmethod
    def forward(ctx, q, k, v, a, factors):
        ctx.save_for_backward(q, k, v)
        ctx.a, ctx.factors = a, factors
        return honest(q, k, v, None, a)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            found = torch.autograd.grad(honest(*leaves, None, ctx.a), leaves, grad)
        return *(x * f for x, f in zip(found, ctx.factors)), None, None


def wrong_gradient(*factors):
    return lambda q, k, v, mask, a: _Backward.apply(q, k, v, a, factors)


def call(*shape, mask=None, **options):
    """q, k, v, mask and options of one call; `mask` makes it from (b, h, s, kv_len)."""
    names = {n: options.pop(n) for n in ("heads", "kv_heads", "dtype", "grad") if n in options}
    q, k, v = qkv(*shape, **names)
    return q, k, v, (mask(q.shape[1], q.shape[2], k.shape[2]) if callable(mask) else mask), options


def random_mask(h, s, kv_len):
    return torch.rand(1, h, s, kv_len, generator=torch.Generator().manual_seed(0)) < 0.7


BOTTOM = masks.Causal("bottom_right")
WRONG_TRIANGLES = {
    "top-left for bottom-right": (top_left, call(40, 100, mask=BOTTOM)),
    "bottom-right for top-left": (bottom_right, call(40, 100, is_causal=True)),
    "no triangle": (no_triangle, call(64, is_causal=True)),
    "one off the diagonal": (one_off_the_diagonal, call(40, 100, mask=BOTTOM)),
}
DEAF = {
    "mask ignored": (ignores_the_mask, call(64, mask=random_mask)),
    "padding ignored": (ignores_the_mask, call(64, mask=lambda h, s, n: random_mask(1, 1, n))),
    "one mask for all heads": (one_mask_for_all_heads, call(64, mask=random_mask)),
    "scale's sign ignored": (ignores_the_scale, call(64, scale=-0.2)),
}
WRONG_GRADIENTS = {
    "5% in dk": (wrong_gradient(1, 1.05, 1), call(64, grad=True)),
    "5% in dq": (wrong_gradient(1.05, 1, 1), call(64, grad=True)),
    "5% in dv, bf16": (wrong_gradient(1, 1, 1.05), call(64, grad=True, dtype=torch.bfloat16)),
}
A_LITTLE_WRONG = {
    "2%": (two_percent, call(64)),
    "2%, bf16": (two_percent, call(64, dtype=torch.bfloat16)),
    "2%, fp16": (two_percent, call(64, dtype=torch.float16)),
}
WRONG_HEADS = {"kv heads swapped": (swaps_the_group, call(64, heads=8, kv_heads=4))}
NOT_FINITE = {"a NaN row": (a_nan_row, call(64))}
WRONG_TAILS = {
    "the last key dropped": (drops_the_last_keys, call(64, 129)),
    "the last key dropped, bf16": (drops_the_last_keys, call(64, 1025, dtype=torch.bfloat16)),
    "the last 63 keys dropped": (drops_the_last_keys, call(64, 127)),
    "the last row wrong": (wrong_last_rows, call(65)),
    "the last row of a long problem wrong": (wrong_last_rows, call(2049, 600, heads=1)),
}
CARELESS_WITH_MEMORY = {
    "input changed": (scales_the_input, call(64)),
    "rows left unwritten": (leaves_rows_unwritten, call(64)),
    "rows left unwritten, large": (leaves_rows_unwritten, call(700)),
}
WRONG_MAXIMA = {
    "maximum over padding": (_over_padding(False), call(64, 100)),
    "padding in the sum": (_over_padding(True), call(64, 100)),
    "maximum of hidden keys": (hidden_maximum, call(64, dtype=torch.bfloat16, is_causal=True)),
}


@pytest.fixture
def fast(monkeypatch):
    """Add a kernel that is by far the fastest."""

    def add_fast(run, **fields):
        calls = []

        def counted(*args):
            calls.append(len(calls))
            return run(*args)

        add(monkeypatch, made_up("fastest", counted, **fields))
        turn(monkeypatch, Clock({"default": 4e-3, "fastest": FAST}))
        return calls

    return add_fast


def caught(run, given, fast):
    """It was tried, did not win, and never answered the caller."""
    calls = fast(run)
    q, k, v, mask, options = given
    before = [x.detach().clone() for x in (q, k, v)]
    check(q, k, v, mask, **options)
    tried = len(calls)
    assert tried > 0, "it was never tried"
    check(q, k, v, mask, **options)
    assert len(calls) == tried, "it served a call"
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before))
    trial = row("fastest", q, k, v, mask, **options)
    assert fastattn.explain(q, k, v, mask, **options).served_by != "fastest" and trial.time_us is None
    # what lay in the memory that a liar left unwritten may have been right, until the caller's own tensors were looked at
    reason = trial.reason.removeprefix("on the caller's tensors ")
    assert reason.startswith(("inaccurate: ", "ValueError: it changes its inputs")), trial.reason


@pytest.mark.parametrize("run, given", WRONG_TRIANGLES.values(), ids=WRONG_TRIANGLES.keys())
def test_fault_01_a_kernel_that_draws_another_triangle_never_wins(run, given, fast):
    caught(run, given, fast)


@pytest.mark.parametrize("run, given", DEAF.values(), ids=DEAF.keys())
def test_fault_05_a_kernel_that_ignores_the_mask_or_the_scale_never_wins(run, given, fast):
    caught(run, given, fast)


@pytest.mark.parametrize("run, given", WRONG_GRADIENTS.values(), ids=WRONG_GRADIENTS.keys())
def test_fault_10_a_kernel_whose_gradients_are_wrong_never_wins(run, given, fast):
    """A kernel whose output is right and whose gradients are wrong never wins."""
    caught(run, given, fast)


@pytest.mark.parametrize("run, given", A_LITTLE_WRONG.values(), ids=A_LITTLE_WRONG.keys())
def test_fault_11_a_kernel_that_is_two_percent_off_never_wins(run, given, fast):
    """A kernel that is two percent off, in any dtype, never wins and never answers, however fast it is."""
    caught(run, given, fast)


@pytest.mark.parametrize("run, given", WRONG_HEADS.values(), ids=WRONG_HEADS.keys())
def test_fault_12_a_kernel_that_maps_heads_otherwise_never_wins(run, given, fast):
    """Query head h uses kv head h // group, whatever kernel serves: one that maps them otherwise never wins."""
    caught(run, given, fast)


@pytest.mark.parametrize("run, given", NOT_FINITE.values(), ids=NOT_FINITE.keys())
def test_fault_13_a_row_of_nan_never_wins(run, given, fast):
    caught(run, given, fast)


@pytest.mark.parametrize("run, given", WRONG_TAILS.values(), ids=WRONG_TAILS.keys())
def test_fault_17_a_kernel_that_is_wrong_in_the_last_tile_never_wins(run, given, fast):
    caught(run, given, fast)


@pytest.mark.parametrize("run, given", CARELESS_WITH_MEMORY.values(), ids=CARELESS_WITH_MEMORY.keys())
def test_fault_21_a_kernel_that_changes_inputs_or_leaves_rows_unwritten_never_wins(run, given, fast):
    """A kernel that changes its inputs or leaves rows of its output unwritten never wins, whatever lay in that memory."""
    caught(run, given, fast)


@pytest.mark.parametrize("run, given", WRONG_MAXIMA.values(), ids=WRONG_MAXIMA.keys())
def test_fault_65_a_maximum_over_what_is_not_there_never_wins(run, given, fast):
    """Kernels are checked with data that breaks them: a maximum over padding, which Gaussian numbers forgive, fails."""
    caught(run, given, fast)


HONEST = [next(iter(kind.values()))[1] for kind in (A_LITTLE_WRONG, WRONG_TRIANGLES, DEAF, WRONG_GRADIENTS)]
HONEST.append(WRONG_TAILS["the last row of a long problem wrong"][1])


@pytest.mark.parametrize("given", HONEST, ids=["plain", "bottom right", "mask", "gradients", "long"])
def test_the_same_kernel_wins_if_it_does_not_lie(given, fast):
    fast(honest)
    q, k, v, mask, options = given
    fastattn.attention(q, k, v, mask, **options)
    assert fastattn.explain(q, k, v, mask, **options).served_by == "fastest"


def test_fault_65_a_maximum_over_padding_passes_gaussian_data_and_fails_negative_rows(fast, monkeypatch):
    fast(_over_padding(False))
    q, k, v = qkv(64, 100)
    with monkeypatch.context() as only_gaussian:
        only_gaussian.setattr(samples, "PROBES", (_gaussian, _hidden_large))
        fastattn.attention(q, k, v)
        assert fastattn.explain(q, k, v).served_by == "fastest"
    fastattn.clear()
    assert fastattn.explain(q, k, v, tune=True).served_by == "default"


@pytest.mark.parametrize("rows", [slice(0, 1), slice(-1, None), slice(None)], ids=["first", "last", "all"])
@pytest.mark.parametrize("off", [0.02, float("nan")])
def test_fault_66_a_wrong_log_sum_exp_beside_a_right_output_never_wins(rows, off, fast):
    """The log-sum-exp is checked as the output is: a kernel that leaves one row of it wrong never wins."""

    def run(q, k, v, mask, a):
        out, lse = honest(q, k, v, mask, a)
        lse = lse.clone()
        lse[:, -1, rows] += off
        return out, lse

    calls = fast(run, lse=True)
    q, k, v = qkv(48)
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    assert calls and fastattn.explain(q, k, v, return_lse=True).served_by != "fastest"
    scores = (q.double() @ k.double().mT) * q.shape[-1] ** -0.5
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=1e-5, rtol=0)


def test_a_liar_on_the_callers_own_tensors_alone_is_caught_by_the_last_look(fast):
    """It knows the probes, which have no value beyond 1000, and is wrong elsewhere."""
    calls = fast(lambda q, k, v, mask, a: honest(q, k, v, mask, a) * (1.02 if v.max() > 1e6 else 1.0))
    q, k, v = qkv(64)
    v = v * 1e7
    check(q, k, v)
    assert calls and fastattn.explain(q, k, v).served_by == "default"
    assert row("fastest", q, k, v).reason.startswith("on the caller's tensors inaccurate: forward error")


@pytest.mark.parametrize(
    "error, reason",
    [
        (RuntimeError("no such shape\nsecond line"), "RuntimeError: no such shape"),
        (ValueError(""), "ValueError: "),
        (torch.OutOfMemoryError("tried to allocate 3 GiB"), "out of memory: tried to allocate 3 GiB"),
        (AssertionError("head_dim"), "AssertionError: head_dim"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_an_error_becomes_the_reason(error, reason, fast):
    def run(*args):
        raise error

    fast(run)
    q, k, v = qkv(64)
    check(q, k, v)
    assert row("fastest", q, k, v).reason == reason


def test_an_error_of_the_backward_alone_becomes_the_reason(fast):
    def run(q, k, v, mask, a):
        out = honest(q, k, v, mask, a)
        out.register_hook(lambda grad: 1 / 0)
        return out

    fast(run)
    q, k, v = qkv(64, grad=True)
    check(q, k, v)
    assert row("fastest", q, k, v).reason == "ZeroDivisionError: division by zero"


def test_fault_59_a_library_that_cannot_be_imported_becomes_the_reason(monkeypatch):
    def load():
        raise ImportError("libfast.so.3: cannot open shared object file")

    add(monkeypatch, made_up("broken", honest).replace(load=load), made_up("absent", honest, library="no-such-library"))
    rows = {t.candidate: t.reason for t in fastattn.explain(*qkv(64)).rows}
    assert rows["broken"] == "package torch cannot be used: ImportError: libfast.so.3: cannot open shared object file"
    assert rows["absent"] == "package no-such-library is not installed"


# --- the default is on trial too


def test_fault_64_a_wrong_default_does_not_serve_where_another_kernel_passes(monkeypatch):
    """torch's own default is checked as any kernel is: where it is wrong it does not serve."""
    replace_default(monkeypatch, two_percent)
    turn(monkeypatch, Clock({"default": FAST}))
    q, k, v = qkv(64)
    for _ in range(2):
        check(q, k, v)
    why = fastattn.explain(q, k, v)
    assert why.served_by != "default"
    assert row("default", q, k, v).reason.startswith("inaccurate: forward error")
    assert "the default itself did not pass" in str(why)


def test_a_wrong_default_serves_if_nothing_else_passes_and_explain_says_so(monkeypatch):
    replace_default(monkeypatch, two_percent)
    turn(monkeypatch, Clock({"default": FAST}))
    q, k, v = qkv(64)
    out = fastattn.attention(q, k, v, accuracy=1e-12)  # more than float32 can give
    assert torch.equal(out, two_percent(q, k, v, None, _arguments(q)))
    why = fastattn.explain(q, k, v, accuracy=1e-12)
    assert why.served_by == "default"
    assert "nothing passed; the default itself: inaccurate: forward error" in why.why


def test_a_default_that_raises_does_not_serve(monkeypatch):
    def run(*args):
        raise RuntimeError("no kernel found to launch")

    replace_default(monkeypatch, run)
    turn(monkeypatch, Clock())
    q, k, v = qkv(64)
    check(q, k, v)
    assert fastattn.explain(q, k, v).served_by != "default"


def test_a_default_that_failed_does_not_serve_bucket_mates_either(monkeypatch):
    """The winner cannot do some lengths of its bucket: then what is right serves, not the default that was found wrong."""
    from fastattn.kernels.limits import Range

    replace_default(monkeypatch, two_percent)
    add(monkeypatch, made_up("even", honest, needs=(Range("extent", max=47_000),)))
    turn(monkeypatch, Clock({"default": FAST, "even": FAST}, other=1.0))
    q, k, v = qkv(1, 300)
    assert fastattn.explain(q, k, v, tune=True).served_by == "even"
    q, k, v = qkv(1, 368)  # the same bucket, beyond the winner's limit
    check(q, k, v)


def _arguments(q):
    from fastattn.kernels.kernel import Arguments

    return Arguments(1 / math.sqrt(q.shape[-1]))
