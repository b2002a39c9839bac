"""dropout_p: the right share of weights is dropped, the others scaled up, the backward uses the same mask; tuning uses up no
random numbers of the caller's.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from building import DTYPES, accepted, name_of, qkv
from fakes import add, honest, made_up, problem

import fastattn
from fastattn import attention
from fastattn.environment.settings import current_settings
from fastattn.kernels import registry
from fastattn.kernels.libraries.availability import load_kernel
from fastattn.planning import binding
from fastattn.tuning.accuracy import dropout
from fastattn.tuning.accuracy.probes import probe_sample
from fastattn.tuning.tune import tune_problem

CPU = torch.device("cpu")
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


def weights_of(rate, n=64, heads=4, batch=8, **options):
    """The weights that attention() used, (b, h, q, k): v is the unit matrix, and all scores are equal."""
    q = torch.zeros(batch, heads, n, n)
    return attention(q, q.clone(), torch.eye(n).expand(batch, heads, n, n), dropout_p=rate, **options)


@pytest.mark.parametrize("name", [None, "default", "torch_math", "sdpa_math"])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_mean_variance_and_share(untuned, rate, name):
    n = 64
    found = weights_of(rate, n, kernel=name) * n
    count = found.numel()
    sigma = math.sqrt(rate * (1 - rate) / count)
    assert abs(float((found == 0).double().mean()) - rate) < 6 * sigma
    kept = found[found != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - rate)))
    assert abs(float(found.double().mean()) - 1) < 6 * math.sqrt(rate / (1 - rate) / count)
    rows = found.sum(-1).double() / n  # of 64 weights each
    assert abs(float(rows.var()) / (rate / (1 - rate) / n) - 1) < 6 * math.sqrt(2 / rows.numel())
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[0, 0], found[0, 1])


@by_dtype
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"window": (9, 4)}, {"return_lse": True}, {"softcap": 2.0}], ids=str
)
def test_every_candidate_is_a_fair_dropout_forward_and_backward(dtype, options, untuned):
    """The kernels' own gate, on each: the factors it used are read off, then output and gradients are judged with them."""
    q, k, v = qkv(hq=4, hkv=2, sq=40, skv=50, dtype=dtype, grad=True)
    p = problem(
        dtype=name_of(dtype), q_heads=4, kv_heads=2, q_len=40, kv_len=50, head_dim=16, head_dim_v=16, dropout=True,
        needs_grad=True, causal="top_left" if "is_causal" in options else None, window=options.get("window"),
        softcap=options.get("softcap", 0.0), lse="return_lse" in options,
    )  # fmt: skip
    names = accepted(q, k, v, dropout_p=0.5, **options)
    assert names
    from fastattn.environment.device import Device
    from fastattn.environment.settings import current_settings
    from fastattn.planning import candidates

    for d in candidates.decisions(p, Device.of(CPU), current_settings()):
        if d.name in names:
            small = dropout.dropout_problem(p)
            call, without = (binding.bind(d, small, None, dropout_p=rate) for rate in (dropout.RATE, 0.0))
            errors = dropout.check_dropout(call, without, small, CPU)
            assert errors.passed and errors.backward is not None, (d.name, errors)


def lying(change):
    """A kernel that takes dropout and lies about it."""
    math_kernel = load_kernel(next(k for k in registry.rows() if k.name == "sdpa_math"))

    def run(q, k, v, mask, a):
        return change(math_kernel, q, k, v, mask, a)

    return run


LIES = {
    "drops nothing": lying(lambda run, q, k, v, m, a: run(q, k, v, m, a._replace(dropout_p=0.0))),
    "drops half as many": lying(lambda run, q, k, v, m, a: run(q, k, v, m, a._replace(dropout_p=a.dropout_p / 2))),
    "rounds to sixteenths": lying(
        lambda run, q, k, v, m, a: run(q, k, v, m, a._replace(dropout_p=round(16 * a.dropout_p) / 16))
    ),
    "does not scale up": lying(lambda run, q, k, v, m, a: run(q, k, v, m, a) * (1 - a.dropout_p)),
    "drops outputs, not weights": lying(
        lambda run, q, k, v, m, a: F.dropout(run(q, k, v, m, a._replace(dropout_p=0.0)), a.dropout_p)
    ),
}


def another_mask_backward(run, q, k, v, m, a):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            ctx.save_for_backward(q, k, v)
            return run(q, k, v, m, a)

        @staticmethod
        def backward(ctx, grad):
            given = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            with torch.enable_grad():
                out = run(*given, m, a)  # draws again
            return torch.autograd.grad(out, given, grad)

    return Wrong.apply(q, k, v)


LIES["another mask in the backward"] = lying(another_mask_backward)


@pytest.mark.parametrize("lie", LIES)
def test_a_dropout_that_lies_never_wins(lie, monkeypatch):
    add(monkeypatch, made_up("liar", LIES[lie], dropout=True, masks=("bool", "additive"), mask_and_causal=True))
    p = problem(q_len=48, kv_len=48, dropout=True, needs_grad=True)
    verdict = tune_problem(p, current_settings())
    reason = verdict.trial("liar").reason
    assert reason and ("dropout" in reason or "inaccurate" in reason), reason
    assert honest is not None and verdict.winner != "liar"


def test_tuning_uses_up_no_random_numbers(monkeypatch, tmp_path):
    q, k, v = qkv(sq=24, grad=True)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    fastattn.explain(q, k, v, dropout_p=0.3, tune=True)
    assert torch.equal(before, torch.get_rng_state())
    first = attention(q, k, v, dropout_p=0.3)
    assert not torch.equal(before, torch.get_rng_state())  # a call does, as F.sdpa's
    torch.manual_seed(3)
    assert torch.equal(first, attention(q, k, v, dropout_p=0.3))


def test_dropout_of_one_is_zeros_and_of_none_is_nothing(untuned):
    q, k, v = qkv(sq=9)
    assert not attention(q, k, v, dropout_p=1.0).any()
    assert torch.equal(attention(q, k, v, dropout_p=0.0), attention(q, k, v))


def test_samples_do_not_touch_the_global_state():
    before = torch.get_rng_state()
    probe_sample(problem(dropout=True), CPU)
    assert torch.equal(before, torch.get_rng_state())


def test_the_drop_in_drops_as_f_sdpa_does(untuned):
    """Where the default serves it is F.sdpa itself: the same seed gives the same bits."""
    q, k, v = qkv(sq=12)
    torch.manual_seed(1)
    ours = fastattn.sdpa(q, k, v, dropout_p=0.4)
    torch.manual_seed(1)
    assert torch.equal(ours, F.scaled_dot_product_attention(q, k, v, dropout_p=0.4))


def test_a_dropout_of_1_leaves_zeros_whatever_won():
    q, k, v = (torch.randn(1, 2, 33, 16, requires_grad=True) for _ in range(3))
    fastattn.attention(q, k, v, dropout_p=0.5)
    out = fastattn.attention(q, k, v, dropout_p=1.0)
    assert torch.equal(out, torch.zeros_like(out))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(out.sum(), (q, k, v)))
