"""patch(model): ours while that model runs, what it was everywhere else, and nothing is left of it when it is undone."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.bias import causal_lower_right
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn.dispatch import compiled, patching_models

STOCK = F.scaled_dot_product_attention
pytestmark = pytest.mark.usefixtures("untuned", "one_thread")
x = torch.randn(2, 3, 5, 8)


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q = torch.nn.Linear(8, 8)

    def forward(self, x, fails=None):
        if fails is not None:
            raise fails
        return F.scaled_dot_product_attention(self.q(x), x, x)

    def encode(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class Model(torch.nn.Module):
    def __init__(self, recompute=None):
        super().__init__()
        self.layers = torch.nn.ModuleList([Attention(), Attention()])
        self.recompute = recompute

    def forward(self, x, fails=None):
        for layer in self.layers:
            x = layer(x, fails) if self.recompute is None else checkpoint(layer, x, use_reentrant=self.recompute)
        return x


@pytest.fixture(autouse=True)
def restored():
    fastattn.stats.reset()
    yield
    assert not patching_models._times and not patching_models._running.depth and not patching_models._place.is_installed
    assert F.scaled_dot_product_attention is STOCK


def served(run, *given):
    """How many calls of F.sdpa inside were fastattn's."""
    before = fastattn.stats()["calls"]
    run(*given)
    return fastattn.stats()["calls"] - before


def test_it_is_ours_in_the_model_and_torchs_elsewhere():
    model, other = Model(), Attention()
    with fastattn.patch(model) as handle:
        assert isinstance(handle, fastattn.ModelPatch) and repr(handle) == "<fastattn.patch: in Model>"
        assert served(model, x) == 2
        assert served(model.layers[0], x) == 1
        assert served(other, x) == served(F.scaled_dot_product_attention, x, x, x) == 0
    assert repr(handle) == "<fastattn.patch: undone>" and not handle.undo()
    assert served(model, x) == 0


def test_a_part_of_a_model_alone():
    model = Model()
    with fastattn.patch(model.layers[1]):
        assert served(model, x) == 1


def test_the_answer_is_the_same_bits_untuned():
    model = Model()
    want = model(x)
    with fastattn.patch(model):
        assert torch.equal(model(x), want)


def test_types_are_what_they_were():
    model = Model()
    with fastattn.patch(model):
        assert (
            isinstance(model, Model) and type(model).__name__ == "Model" and type(model.layers[0].q) is torch.nn.Linear
        )
        assert repr(model) == repr(Model())
    assert type(model) is Model and {type(layer) for layer in model.layers} == {Attention}


@pytest.mark.parametrize("error", [KeyError(), KeyboardInterrupt()], ids=["KeyError", "KeyboardInterrupt"])
def test_an_exception_leaves_the_scope(error):
    model = Model()
    with fastattn.patch(model):
        with pytest.raises(type(error)):
            model(x, error)
        assert served(F.scaled_dot_product_attention, x, x, x) == 0
    with pytest.raises(ZeroDivisionError), fastattn.patch(model):
        raise ZeroDivisionError


def test_threads_do_not_see_each_other():
    """A thread inside the model, one outside at the same time, and one that runs the model itself."""
    model, inside, done = Model(), threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        done.wait(20)

    model.layers[0].register_forward_hook(wait)
    found = []
    with fastattn.patch(model):
        thread = threading.Thread(target=lambda: found.append(served(model.layers[1], x)))
        waiting = threading.Thread(target=model, args=(x,))
        waiting.start()
        assert inside.wait(20)
        assert served(F.scaled_dot_product_attention, x, x, x) == 0
        thread.start()
        thread.join(20)
        done.set()
        waiting.join(20)
    assert found == [1]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=lambda order: "".join(map(str, order)))
@pytest.mark.parametrize("begun", list(itertools.permutations(["everywhere", "model", "part"])), ids="-".join)
def test_fault_24_handles_are_undone_in_any_order(begun, order):
    """patch(), patch(model) and patch() of a part of it are begun and undone in any order, and each holds while it stands."""
    model = Model()
    makers = {
        "everywhere": fastattn.patch,
        "model": lambda: fastattn.patch(model),
        "part": lambda: fastattn.patch(model.layers[0]),
    }
    handles = [(name, makers[name]()) for name in begun]
    standing = set(begun)
    for i in order:
        assert served(F.scaled_dot_product_attention, x, x, x) == ("everywhere" in standing)
        assert served(model, x) == (2 if standing & {"everywhere", "model"} else 1)
        name, handle = handles[i]
        assert handle.undo()
        standing.remove(name)
    assert served(model, x) == 0 and F.scaled_dot_product_attention is STOCK
    assert type(model) is Model and type(model.layers[0]) is Attention


@pytest.mark.parametrize("first", ["ours", "theirs"])
@pytest.mark.parametrize("undone", ["ours", "theirs"])
def test_fault_24_every_order_of_a_model_with_a_foreign_patcher_still_computes(first, undone):
    model, calls = Model(), []

    def foreign():
        before = F.scaled_dot_product_attention

        def call(*given, **options):
            calls.append(1)
            return before(*given, **options)

        F.scaled_dot_product_attention = call
        return lambda: setattr(F, "scaled_dot_product_attention", before)

    makers = {"ours": lambda: fastattn.patch(model), "theirs": foreign}
    made = {name: makers[name]() for name in (first, {"ours": "theirs", "theirs": "ours"}[first])}
    want = STOCK(x, x, x)
    assert (
        torch.equal(F.scaled_dot_product_attention(x, x, x), want) and len(calls) == 1
    )  # theirs, outside of the model
    assert served(model, x) == 2
    second = fastattn.patch(model.layers[0])  # which must not stand before what stands before it
    assert torch.equal(F.scaled_dot_product_attention(x, x, x), want)
    second.undo()
    undo = {"ours": made["ours"].undo, "theirs": made["theirs"]}
    undo[undone]()
    assert torch.equal(F.scaled_dot_product_attention(x, x, x), want)
    undo["theirs" if undone == "ours" else "ours"]()
    assert served(model, x) == 0
    if first == "ours" and undone == "ours":
        assert made["ours"].undo(), "theirs gave back what stood there, and ours was done with"
    F.scaled_dot_product_attention = STOCK


@pytest.mark.parametrize("through", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_is_of_the_old_class_and_not_patched(through):
    model = Model()
    with fastattn.patch(model) as handle:
        if through == "deepcopy":
            other = copy.deepcopy(model)
        elif through == "pickle":
            other = pickle.loads(pickle.dumps(model))
        else:
            file = io.BytesIO()
            torch.save(model, file)
            other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        assert type(other) is Model and type(other.layers[0]) is Attention
        assert served(other, x) == 0 and torch.equal(other(x), model(x))
        with pytest.raises(TypeError, match="belongs to its process"):
            pickle.dumps(handle)


@pytest.mark.parametrize("reentrant", [True, False])
def test_fault_34_a_checkpointed_layer_is_recomputed_by_what_ran_before(reentrant):
    """Activation checkpointing calls a layer of a patched model again in the backward, where it is patched as well."""
    model, given = Model(recompute=reentrant), x.clone().requires_grad_()
    with fastattn.patch(model):
        out = model(given)
        assert served(out.sum().backward) == 2
    plain = Model()
    plain.load_state_dict(model.state_dict())
    again = x.clone().requires_grad_()
    plain(again).sum().backward()
    torch.testing.assert_close(given.grad, again.grad)


@pytest.fixture
def marked(monkeypatch):
    """What fastattn serves in a graph is told by its numbers."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "sdpa", lambda q, k, v, *_: STOCK(q, k, v) + 1)
    return CompileCounter()


def ours(layer, x):
    return STOCK(layer.q(x), x, x) + 1


@pytest.mark.parametrize("when", ["inside", "before"])
def test_fault_27_a_patched_model_is_one_graph(when, marked):
    model = Model()
    want, served = model(x), ours(model.layers[1], ours(model.layers[0], x))
    graph = torch.compile(model, backend=marked, fullgraph=True)
    if when == "before":
        assert torch.equal(graph(x), want)
    with fastattn.patch(model):
        for _ in range(2):
            assert torch.equal(graph(x), served)
        assert marked.frame_count == (1 if when == "inside" else 2)
    assert torch.equal(graph(x), want)


def test_fault_27_one_compiled_function_inside_and_outside_of_a_model(marked):
    attend = torch.compile(lambda x: F.scaled_dot_product_attention(x, x, x), backend=marked, fullgraph=True)

    class Calls(torch.nn.Module):
        def forward(self, x):
            return attend(x)

    model = Calls()
    with fastattn.patch(model):
        for run, more in ((model, 1), (attend, 0), (model, 1), (attend, 0)):
            assert torch.equal(run(x), STOCK(x, x, x) + more)
        assert marked.frame_count == 2


def test_a_class_made_over_ours_stays():
    layer = Attention()
    with fastattn.patch(layer):
        made = type("Made", (type(layer),), {})
        layer.__class__ = made
        assert served(layer, x) == 1
    assert type(layer) is made and served(layer, x) == 0


def test_a_forward_of_its_own_as_accelerate_gives_one():
    layer = Attention()
    old = layer.forward
    layer.forward = lambda *given: old(*given)
    with fastattn.patch(layer):
        assert served(layer, x) == 1
    del layer.forward


def test_what_is_not_reached_is_torchs():
    layer = Attention()
    with fastattn.patch(layer):
        assert served(layer.encode, x) == served(layer.forward, x) == 0


def test_torchs_own_layers_are_models_too():
    layer = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    given = torch.randn(2, 5, 8)
    want = layer(given, given, given, need_weights=False)[0]
    with fastattn.patch(layer):
        assert served(lambda: layer(given, given, given, need_weights=False)) == 1
        assert torch.equal(layer(given, given, given, need_weights=False)[0], want)


def test_what_is_no_module_and_a_scan_are_refused():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module or None, got"):
        fastattn.patch(lambda x: x)
    with pytest.raises(ValueError, match="scan"):
        fastattn.patch(Attention(), scan=True)


def test_unpatch_leaves_models():
    model = Attention()
    with fastattn.patch(model):
        assert not fastattn.unpatch()
        assert served(model, x) == 1
        with fastattn.patch():
            assert fastattn.unpatch()
        assert served(model, x) == 1


@pytest.mark.parametrize("place", ["inside", "outside"])
def test_fault_68_who_compares_the_function_finds_it(place):
    """torch's causal biases and a function mode that looks for F.sdpa, in a patched model and outside of it."""
    seen = []

    class Looks(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func is F.scaled_dot_product_attention)
            return func(*args, **(kwargs or {}))

    class Calls(torch.nn.Module):
        def forward(self, mask):
            return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    model, drawn = Calls(), torch.ones(5, 5, dtype=torch.bool).tril()
    run = model if place == "inside" else model.forward
    with fastattn.patch(model):
        torch.testing.assert_close(run(causal_lower_right(5, 5)), STOCK(x, x, x, drawn))
        with Looks():
            assert torch.equal(run(None), STOCK(x, x, x))
    assert any(seen)
