"""Sinks: a logit of each head in the denominator, as gpt-oss defines it, forward and backward, in every layout."""

import pytest
import torch

import fastattn
from fastattn import attention, masks

SAME = {"atol": 1e-6, "rtol": 1e-5}  # the log-sum-exp is float32


@pytest.fixture(autouse=True)
def untuned_calls():
    with fastattn.options.scope(mode="cached"):
        yield


def draw(*shape, seed=0, grad=True):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_(grad)


def reference(q, k, v, sinks, seen=None):
    """gpt-oss: a column more in the softmax, which is dropped afterwards. (out, lse with the sink)."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * q.shape[3] ** -0.5
    scores = scores if seen is None else scores.masked_fill(~seen, float("-inf"))
    column = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    whole = torch.cat([scores, column], -1)
    return torch.softmax(whole, -1)[..., :-1] @ v, torch.logsumexp(whole, -1)


CALLS = {
    "plain": ({}, lambda i, j: j >= 0),
    "causal": ({"is_causal": True}, lambda i, j: j <= i),
    "window": ({"window": (2, 0), "mask": masks.Causal("bottom_right")}, lambda i, j: (j <= i + 2) & (j >= i)),
    "rows that see nothing": ({"mask": torch.arange(5)[:, None] > torch.arange(7)}, lambda i, j: j < i),
}


@pytest.mark.parametrize("layout", ["bhsd", "bshd", "sbhd"])
@pytest.mark.parametrize("kernel", [None, "torch_flash", "matmul"])
@pytest.mark.parametrize("name", CALLS)
def test_a_sink_takes_its_share(name, kernel, layout):
    options, seen = CALLS[name]
    order = {"bhsd": (0, 1, 2, 3), "bshd": (0, 2, 1, 3), "sbhd": (2, 0, 1, 3)}[layout]
    q, k, v, sinks = draw(2, 4, 5, 8), draw(2, 2, 7, 8, seed=1), draw(2, 2, 7, 8, seed=2), draw(4, seed=3)
    want, want_lse = reference(q, k, v, sinks, seen(torch.arange(5)[:, None], torch.arange(7)))
    tensors = [x.permute(order) for x in (q, k, v)]
    out, lse = attention(
        *tensors, options.get("mask"), layout, sinks=sinks, return_lse=True, kernel=kernel,
        **{name: value for name, value in options.items() if name != "mask"},
    )  # fmt: skip
    out = out.permute([order.index(i) for i in range(4)])
    torch.testing.assert_close(out, want, **SAME)
    torch.testing.assert_close(lse, want_lse.float(), atol=1e-5, rtol=1e-5)
    weight = draw(*want.shape, seed=4, grad=False)
    got, expected = (torch.autograd.grad((x * weight).sum(), (q, k, v, sinks)) for x in (out, want))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_packed_sequences_and_caches_have_sinks_too():
    q, k, v, sinks = draw(7, 4, 8), draw(7, 2, 8, seed=1), draw(7, 2, 8, seed=2), draw(4, seed=3)
    found = attention(q, k, v, None, "thd", cu_seqlens_q=[0, 3, 7], sinks=sinks)
    for part in (slice(0, 3), slice(3, 7)):
        want, _ = reference(*(x[part].transpose(0, 1)[None] for x in (q, k, v)), sinks)
        torch.testing.assert_close(found[part], want[0].transpose(0, 1), **SAME)
    q, k, v = draw(2, 4, 1, 8), draw(2, 2, 9, 8, seed=1), draw(2, 2, 9, 8, seed=2)
    found = attention(q, k, v, kv_lens=[9, 4], sinks=sinks)
    want, _ = reference(q, k, v, sinks, torch.arange(9) < torch.tensor([9, 4])[:, None, None, None])
    torch.testing.assert_close(found, want, **SAME)
    assert fastattn.explain(q, k, v, kv_lens=[9, 4], sinks=sinks).problem.lse


def test_it_is_compiled_without_a_break():
    q, k, v, sinks = draw(1, 4, 5, 8), draw(1, 2, 5, 8, seed=1), draw(1, 2, 5, 8, seed=2), draw(4, seed=3)
    call = lambda q, k, v, sinks: attention(q, k, v, is_causal=True, sinks=sinks)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v, sinks), call(q, k, v, sinks), **SAME)


def test_a_sink_of_no_weight_beside_a_row_that_sees_nothing():
    q = draw(1, 2, 3, 8, grad=False)
    seen = torch.tensor([[True] * 3, [False] * 3, [True] * 3])
    found = attention(q, q, q, seen, sinks=torch.tensor([float("-inf"), 0.0], dtype=torch.float64))
    assert found.isfinite().all() and (found[:, :, 1] == 0).all()
    torch.testing.assert_close(found[:, 0], attention(q, q, q, seen)[:, 0], **SAME)


def test_half_precision_stays():
    q, k, v = (draw(1, 4, 5, 8, seed=i, grad=False).bfloat16() for i in range(3))
    sinks = draw(4, seed=3, grad=False).bfloat16()
    out = attention(q, k, v, sinks=sinks)
    want, _ = reference(*(x.double() for x in (q, k, v, sinks)))
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out.double(), want, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(("sinks", "kind", "text"), [
    (torch.zeros(3), ValueError, "one logit for each of 4 query heads, got (3,)"),
    ([0.0] * 4, TypeError, "sinks must be a float Tensor"),
    (torch.zeros(4, dtype=torch.int64), TypeError, "sinks must be a float Tensor"),
])  # fmt: skip
def test_what_are_no_sinks_is_refused_in_words(sinks, kind, text):
    q = draw(1, 4, 5, 8)
    with pytest.raises(kind) as raised:
        attention(q, q, q, sinks=sinks)
    assert text in str(raised.value)
