"""report(): a row for layers that are alike, with who serves them and why."""

import pytest
import torch
import torch.nn.functional as F
from fakes import FAST, Clock, add, honest, made_up, turn

import fastattn
from fastattn import attention
from fastattn.dispatch.four_dims import OTHER_DIMS
from fastattn.dispatch.session import session


class Layer(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.attend = Attend(call)

    def forward(self, x):
        return x + self.attend(x)


class Attend(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        return self.call(x, x, x)


def long(q, k, v):
    return attention(q[..., :16, :], k, v, is_causal=True, return_lse=True)[0].repeat(1, 1, 2, 1)


def model(*calls):
    return torch.nn.Sequential(*(Layer(call) for call in calls))


def stock(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def three_d(q, k, v):
    return F.scaled_dot_product_attention(q[0], k[0], v[0])[None]


def mixed(q, k, v):
    return F.scaled_dot_product_attention(q, k[0], v[0])


X = torch.randn(1, 2, 32, 16)


def test_layers_that_are_alike_share_a_row(monkeypatch):
    add(monkeypatch, made_up("a", honest))
    turn(monkeypatch, Clock({"default": 4e-3, "a": FAST}, other=5e-3))
    found = fastattn.report(model(stock, three_d, attention, stock, mixed), X)
    assert [row.layers for row in found.rows] == [
        ("0.attend", "1.attend", "2.attend", "3.attend"), ("4.attend",),
    ]  # fmt: skip
    alike, other = found.rows
    assert alike.served_by == "a" and alike.gain == pytest.approx(4.0) and alike.problem.startswith("1 x 2 x 32 d16")
    assert other.served_by == "F.sdpa" and other.why == f"passed on: {OTHER_DIMS.why}" and other.gain is None
    text = str(found)
    assert "[0-3].attend" in text and "4.00x" in text
    assert text.endswith("4 of 5 calls were timed by their tunings: 16 ms by F.sdpa, 4 ms by what serves (4.00x)")


def test_times_are_compared_with_what_would_serve_untuned(monkeypatch):
    """F.sdpa says no log-sum-exp: what was gained was gained over another kernel, which is named."""
    add(monkeypatch, made_up("a", honest, lse=True))
    turn(monkeypatch, Clock({"torch_flash": 4e-3, "a": FAST}, other=5e-3))
    assert "4 ms by torch_flash, 1 ms by what serves (4.00x)" in str(fastattn.report(model(long), X))


def test_calls_that_an_integration_answers_itself_are_rows_too():
    """As transformers' weights, which the model's own eager path gives."""

    def own(q, k, v):
        session.counts.pass_on("the weights are asked for")
        return stock(q, k, v)

    with fastattn.options.scope(mode="cached"):
        found = fastattn.report(model(own, stock), X)
    other = found.rows[-1]
    assert (len(other.layers), other.served_by, other.why) == (1, "the model", "passed on: the weights are asked for")
    assert [len(row.layers) for row in found.rows] == [2, 1] and "the model" in str(found)


def test_it_leaves_everything_as_it_was():
    before, net = F.scaled_dot_product_attention, model(stock, long)
    with fastattn.options.scope(mode="cached"):
        found = fastattn.report(net, X)
        assert [row.served_by for row in found.rows] == ["default", "torch_flash"]
        assert F.scaled_dot_product_attention is before
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
        fastattn.stats.reset()
        long(X, X, X)
        long(X, X, X)
        assert fastattn.stats()["hits"] == 1, "entries are published again"


def test_what_a_model_raises_is_raised_and_nothing_stays():
    def fails(q, k, v):
        stock(q, k, v)
        raise KeyError("mine")

    before, net = F.scaled_dot_product_attention, model(fails)
    with fastattn.options.scope(mode="cached"), pytest.raises(KeyError, match="mine"):
        fastattn.report(net, X)
    assert F.scaled_dot_product_attention is before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_model_without_attention_says_so():
    assert "no attention was called" in str(fastattn.report(torch.nn.Linear(2, 2), torch.zeros(1, 2)))
    with pytest.raises(TypeError, match="expected a torch.nn.Module and its inputs, got function"):
        fastattn.report(stock, X)


def test_numbers_of_layers_are_written_as_ranges(monkeypatch):
    with fastattn.options.scope(mode="cached"):
        found = fastattn.report(model(stock, stock, long, stock, stock, stock, long), X)
    assert [line.split()[0] for line in str(found).splitlines()[1:3]] == ["[0-1,3-5].attend", "[2,6].attend"]
