"""Faults 68, 72, 73, 74 and 87: under patch() the function is, to whoever asks, torch's."""

from __future__ import annotations

import functools
import importlib
import inspect
import io
import pickle

import children
import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import fx
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.overrides import TorchFunctionMode

import fastattn
from fastattn.dispatch import patching

STOCK = F.scaled_dot_product_attention
pytestmark = pytest.mark.usefixtures("untuned")


@pytest.fixture(autouse=True)
def restored():
    yield
    F.scaled_dot_product_attention = STOCK


@pytest.fixture
def patched():
    with fastattn.patch() as handle:
        yield handle


def qkv(q_len=4, kv_len=6, heads=4, kv_heads=4):
    return torch.randn(2, heads, q_len, 8), torch.randn(2, kv_heads, kv_len, 8), torch.randn(2, kv_heads, kv_len, 8)


# --- 68, 72: subclasses and modes that compare the function


class ReadsItOff(torch.Tensor):
    """Compares with what torch holds when it is asked."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            return "handled"
        return super().__torch_function__(func, types, args, kwargs or {})


class AsksItsOwnMethod(torch.Tensor):
    @classmethod
    def is_attention(cls, func):
        return func == F.scaled_dot_product_attention

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return "handled" if cls.is_attention(func) else super().__torch_function__(func, types, args, kwargs or {})


TABLE = {STOCK: lambda *args, **kwargs: "handled"}


class HasATableMadeBefore(torch.Tensor):
    """As `@implements(F.scaled_dot_product_attention)` makes it when a module is imported."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in TABLE:
            return TABLE[func](*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})


imported_before = STOCK


class ImportedTheNameBefore(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return "handled" if func is imported_before else super().__torch_function__(func, types, args, kwargs or {})


def table_made_under_the_patch():
    handled = {F.scaled_dot_product_attention: "handled"}

    class HasATableMadeUnderThePatch(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return handled[func] if func in handled else super().__torch_function__(func, types, args, kwargs or {})

    return HasATableMadeUnderThePatch


KINDS = {
    "reads it off torch": lambda: ReadsItOff,
    "in a method": lambda: AsksItsOwnMethod,
    "a table made before": lambda: HasATableMadeBefore,
    "a name imported before": lambda: ImportedTheNameBefore,
    "a table made under the patch": table_made_under_the_patch,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", [F.__name__, "sdpa", "attention"])
@pytest.mark.parametrize("place", [0, 3], ids=["q", "mask"])
def test_fault_68_a_subclass_that_knows_the_function_gets_its_say(kind, call, place, patched):
    """A Tensor subclass that dispatches on F.sdpa does so under patch(), however it knows the function."""
    given = [*qkv(), torch.zeros(4, 6)]
    given[place] = given[place].as_subclass(KINDS[kind]())
    run = {"sdpa": fastattn.sdpa, "attention": fastattn.attention}.get(call, F.scaled_dot_product_attention)
    assert run(*given) == "handled"


@pytest.mark.parametrize("heads", [4, 2], ids=["MHA", "GQA"])
@pytest.mark.parametrize("bias", [causal_lower_right, causal_upper_left])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_fault_68_torchs_own_causal_biases(bias, heads, compiled, patched):
    """torch.nn.attention.bias under patch() gives what it gives without."""
    torch._dynamo.reset()
    q, k, v = qkv(kv_heads=heads)

    def run(q, k, v):
        mask = bias(4, 6)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=heads != 4)

    run = torch.compile(run, backend="eager") if compiled else run
    seen = torch.ones(4, 6, dtype=torch.bool).tril(2 if bias is causal_lower_right else 0)
    want = STOCK(q.double(), k.double(), v.double(), seen, enable_gqa=heads != 4)
    assert torch.allclose(run(q, k, v).double(), want, atol=1e-5)


def test_fault_68_a_subclass_that_does_not_care_is_computed(patched):
    """A subclass without a say of its own comes back as stock gives it back."""

    class Plain(torch.Tensor):
        pass

    q, k, v = qkv()
    out = F.scaled_dot_product_attention(q.as_subclass(Plain), k, v)
    assert type(out) is Plain and torch.equal(out.as_subclass(torch.Tensor), STOCK(q, k, v))


class Compares(TorchFunctionMode):
    """Counts the calls of what torch holds."""

    def __init__(self):
        super().__init__()
        self.seen, self.options = 0, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.seen += 1
            self.options.append(kwargs)
        return func(*args, **(kwargs or {}))


def test_fault_72_a_mode_sees_the_function_that_torch_holds(patched):
    """A function mode that looks for F.sdpa finds it, once a call, with the options that were given."""
    q, k, v = qkv()
    with Compares() as mode:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert mode.seen == 1 and mode.options == [{"is_causal": True}]
    assert torch.equal(out, STOCK(q, k, v, is_causal=True))


def test_fault_72_modes_inside_modes_and_after_the_patch(patched):
    """So do two modes, and a mode when nothing is patched any more."""
    q, k, v = qkv()
    with Compares() as outer, Compares() as inner:
        F.scaled_dot_product_attention(q, k, v)
    assert (outer.seen, inner.seen) == (1, 1)
    patched.undo()
    with Compares() as mode:
        F.scaled_dot_product_attention(q, k, v)
    assert mode.seen == 1


class Attends(torch.nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_fault_72_nodes_of_fx_hold_the_function_that_torch_holds(patched):
    """A pass over a graph of torch.fx finds the calls of F.sdpa, and its code runs."""
    traced = fx.symbolic_trace(Attends())
    [node] = [n for n in traced.graph.nodes if n.target is F.scaled_dot_product_attention]
    assert node.op == "call_function" and "scaled_dot_product_attention" in traced.code
    given = qkv()
    assert torch.equal(traced(*given), STOCK(*given, is_causal=True))


# --- 73: TorchScript


@pytest.mark.parametrize("when", ["under the patch", "afterwards"])
@pytest.mark.parametrize("what", ["a module", "a function", "MultiheadAttention", "an encoder layer"])
def test_fault_73_what_scripts_stock_scripts_patched(what, when):
    """torch.jit.script takes the patched function for torch's builtin, and after undo() too."""

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, scale=0.5)

    x = torch.randn(2, 5, 16)
    made = {
        "a module": (Attends(), qkv()),
        "a function": (function, qkv()),
        "MultiheadAttention": (torch.nn.MultiheadAttention(16, 2).eval(), (x, x, x)),
        "an encoder layer": (torch.nn.TransformerEncoderLayer(16, 2, 32).eval(), (x,)),
    }
    thing, given = made[what]
    want = thing(*given)
    with fastattn.patch():
        if when == "under the patch":
            scripted = torch.jit.script(thing)
            saved = io.BytesIO()
            torch.jit.save(scripted, saved)
    if when == "afterwards":
        scripted = torch.jit.script(thing)
    found = scripted(*given)
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, want)), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


# --- 74: what the function says of itself


@pytest.mark.parametrize("name", ["__name__", "__qualname__", "__doc__"])
def test_fault_74_its_attributes_are_torchs(name, patched):
    """Code that asks the function for its name or documentation hears what torch's says."""
    assert getattr(F.scaled_dot_product_attention, name) == getattr(STOCK, name)


def test_fault_74_features_are_found_by_its_documentation(patched):
    """As libraries do: is there enable_gqa, is there scale."""
    text = F.scaled_dot_product_attention.__doc__
    assert "enable_gqa" in text and "scale" in text
    parameters = inspect.signature(F.scaled_dot_product_attention).parameters
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    assert tuple(parameters) == names and callable(functools.partial(F.scaled_dot_product_attention, scale=1.0))


@pytest.mark.long  # torch itself is compiled anew
def test_fault_74_without_docstrings_too():
    """python -OO drops ours, and torch's stays."""
    code = (
        "import torch, fastattn; F = torch.nn.functional; before = F.scaled_dot_product_attention.__doc__; "
        "fastattn.patch(); assert 'enable_gqa' in before and F.scaled_dot_product_attention.__doc__ == before"
    )
    done = children.run(code, flags=("-OO",))
    assert done.returncode == 0, done.stderr


def test_fault_74_it_is_pickled_as_torchs(patched):
    """A config that holds the function is read in a process that does not patch."""
    data = pickle.dumps({"attention": F.scaled_dot_product_attention})
    patched.undo()
    assert pickle.loads(data)["attention"] is STOCK


# --- 87: notebooks


def test_fault_87_a_cell_that_patches_runs_twice():
    """Patching again gives the handle that there is, and one undo() ends it."""
    first = fastattn.patch()
    second = fastattn.patch()
    assert first is second and "in place" in repr(second)
    assert second.undo() and F.scaled_dot_product_attention is STOCK and not first.undo()


def test_fault_87_a_lost_handle():
    """unpatch() needs no handle."""
    fastattn.patch()
    assert fastattn.unpatch() and F.scaled_dot_product_attention is STOCK
    assert not fastattn.unpatch()


def test_fault_87_with_blocks_inside_a_standing_patch():
    """A `with` block undoes what it patched itself."""
    standing = fastattn.patch()
    with fastattn.patch():
        with fastattn.patch():
            pass
        assert F.scaled_dot_product_attention is not STOCK
    assert F.scaled_dot_product_attention is not STOCK, "it stood before the block"
    assert standing.undo() and F.scaled_dot_product_attention is STOCK
    with fastattn.patch(), fastattn.patch():
        pass
    assert F.scaled_dot_product_attention is STOCK


@pytest.fixture
def as_it_was(monkeypatch):
    """What fastattn exports of the module is the module's own again after the test, though it was reloaded: pickle looks."""
    for name in {"patch", "unpatch", "Patch"} & set(fastattn.__all__):
        monkeypatch.setattr(patching, name, getattr(fastattn, name))


def test_fault_87_reloaded_modules_find_the_patch(as_it_was):
    """importlib.reload, as autoreload does it, loses no handle."""
    before = fastattn.patch()
    again = importlib.reload(patching)
    assert again.patch() is before
    assert again.unpatch() and F.scaled_dot_product_attention is STOCK


def test_fault_87_the_function_of_a_done_patch_still_computes():
    """Code that took the function by name under a patch keeps working."""
    with fastattn.patch():
        held = F.scaled_dot_product_attention
    q, k, v = qkv()
    assert torch.equal(held(q, k, v), STOCK(q, k, v))


def test_fault_73_no_other_function_is_taken_for_it(as_it_was):
    """torch.jit knows builtins by their ids: those of patches that are done are not given to other functions."""
    for _ in range(20):
        with fastattn.patch():
            pass
        importlib.reload(patching)
        made = [torch.jit.script(_twice) for _ in range(2)]
        assert torch.equal(made[0](torch.ones(2)), torch.full((2,), 2.0))


def _twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def test_fault_68_a_handler_beside_values_that_cannot_be_compared(patched):
    """What a handler's names stand for is looked at, and not compared: arrays in a list, and a name without a value."""
    arrays = [numpy.zeros(3), torch.zeros(3)]

    def made():
        class Careless(torch.Tensor):
            @classmethod
            def __torch_function__(cls, func, types, args=(), kwargs=None):
                return (func, arrays, later) and super().__torch_function__(func, types, args, kwargs or {})

        yield Careless
        later = 1
        yield

    q, k, v = qkv()
    makes = made()
    kind = next(makes)
    with pytest.raises(NameError, match="later"):  # the handler's own, as stock has it
        F.scaled_dot_product_attention(q.as_subclass(kind), k, v)
    next(makes)
    assert type(F.scaled_dot_product_attention(q.as_subclass(kind), k, v)) is kind


def test_fault_87_a_foreign_patcher_puts_an_undone_patch_back():
    """unpatch() ends it then too, and patch() gives the handle that is in place."""
    handle = fastattn.patch()
    ours = F.scaled_dot_product_attention
    assert handle.undo()
    F.scaled_dot_product_attention = ours  # as one that saved it blindly does
    assert fastattn.patch() is handle and "in place" in repr(handle)
    assert fastattn.unpatch() and F.scaled_dot_product_attention is STOCK
