"""fastattn.sdpa is F.scaled_dot_product_attention to whoever calls it; patch() puts it in torch's place and undoes that."""

from __future__ import annotations

import contextlib
import itertools
import sys
import types
from unittest import mock

import fakes
import pytest
import torch
import torch.nn.functional as F
from building import DTYPES, expect, mask_of, name_of, qkv
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as imported_earlier
from torch.overrides import TorchFunctionMode

import fastattn
from fastattn import sdpa
from fastattn.dispatch import drop_in
from fastattn.dispatch.session import session

ORIGINAL = F.scaled_dot_product_attention
r = torch.randn
pytestmark = pytest.mark.usefixtures("untuned")


def boolean(*shape):
    return torch.rand(shape) < 0.7


# what F.sdpa takes: (q, k, v, keyword arguments)
TAKEN = {
    "4-D": (r(2, 4, 5, 8), r(2, 4, 6, 8), r(2, 4, 6, 8), {}),
    "2-D": (r(5, 8), r(6, 8), r(6, 8), {}),
    "3-D": (r(4, 5, 8), r(4, 6, 8), r(4, 6, 8), {"is_causal": True}),
    "5-D": (r(2, 3, 4, 5, 8), r(2, 3, 4, 6, 8), r(2, 3, 4, 6, 8), {}),
    "5-D, mask": (r(2, 3, 4, 5, 8), r(2, 3, 4, 6, 8), r(2, 3, 4, 6, 8), {"attn_mask": boolean(5, 6)}),
    "3-D mask": (r(2, 4, 5, 8), r(2, 4, 6, 8), r(2, 4, 6, 8), {"attn_mask": boolean(4, 5, 6)}),
    "1-D mask": (r(2, 4, 5, 8), r(2, 4, 6, 8), r(2, 4, 6, 8), {"attn_mask": boolean(6)}),
    "mask and is_causal": (
        r(2, 4, 5, 8),
        r(2, 4, 6, 8),
        r(2, 4, 6, 8),
        {"attn_mask": boolean(5, 6), "is_causal": True},
    ),
    "batch broadcast": (r(2, 4, 5, 8), r(1, 4, 6, 8), r(1, 4, 6, 8), {}),
    "heads broadcast": (r(2, 4, 5, 8), r(2, 1, 6, 8), r(2, 1, 6, 8), {}),
    "GQA": (r(2, 4, 5, 8), r(2, 2, 6, 8), r(2, 2, 6, 8), {"enable_gqa": True}),
    "GQA without the flag": (r(2, 4, 5, 8), r(2, 2, 6, 8), r(2, 2, 6, 8), {}),
    "wide v": (r(2, 4, 5, 8), r(2, 4, 6, 8), r(2, 4, 6, 12), {}),
    "scale": (r(2, 4, 5, 8), r(2, 4, 6, 8), r(2, 4, 6, 8), {"scale": 0.3}),
    "scale int": (r(2, 4, 5, 8), r(2, 4, 6, 8), r(2, 4, 6, 8), {"scale": 1}),
    "dropout": (r(2, 4, 5, 8), r(2, 4, 6, 8), r(2, 4, 6, 8), {"dropout_p": 0.5}),
    "dropout 0": (r(2, 4, 5, 8), r(2, 4, 6, 8), r(2, 4, 6, 8), {"dropout_p": 0}),
    "no keys": (r(2, 4, 5, 8), r(2, 4, 0, 8), r(2, 4, 0, 8), {}),
    "wrong head_dim": (r(2, 4, 5, 8), r(2, 4, 6, 9), r(2, 4, 6, 8), {}),
    "wrong batch": (r(2, 4, 5, 8), r(3, 4, 6, 8), r(3, 4, 6, 8), {}),
    "wrong dtype": (r(2, 4, 5, 8), r(2, 4, 6, 8).half(), r(2, 4, 6, 8), {}),
    "integers": (torch.ones(2, 4, 5, 8, dtype=torch.long),) * 3 + ({},),
    "1-D": (r(8), r(8), r(8), {}),
    "wrong mask": (r(2, 4, 5, 8), r(2, 4, 6, 8), r(2, 4, 6, 8), {"attn_mask": boolean(5, 5)}),
    "mask of integers": (
        r(2, 4, 5, 8),
        r(2, 4, 6, 8),
        r(2, 4, 6, 8),
        {"attn_mask": torch.ones(5, 6, dtype=torch.long)},
    ),
    "unknown keyword": (r(2, 4, 5, 8), r(2, 4, 6, 8), r(2, 4, 6, 8), {"layout": "bshd"}),
    "None for k": (r(2, 4, 5, 8), None, None, {}),
    "dropout above 1": (r(2, 4, 5, 8), r(2, 4, 6, 8), r(2, 4, 6, 8), {"dropout_p": 1.5}),
    "scale of a word": (r(2, 4, 5, 8), r(2, 4, 6, 8), r(2, 4, 6, 8), {"scale": "1"}),
    "is_causal as int": (r(2, 4, 5, 8), r(2, 4, 6, 8), r(2, 4, 6, 8), {"is_causal": 1}),
}


def outcome(call, *args, **kwargs):
    torch.manual_seed(0)
    try:
        return call(*args, **kwargs)
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("what", TAKEN)
def test_fault_26_sdpa_takes_what_f_sdpa_takes_and_raises_what_it_raises(what):
    """The drop-in takes what F.sdpa takes, positional or by name, and raises the type of error that it raises."""
    q, k, v, options = TAKEN[what]
    theirs = outcome(ORIGINAL, q, k, v, **options)
    for _ in range(3):  # a miss, and hits
        ours = outcome(sdpa, q, k, v, **options)
        if isinstance(theirs, type):
            assert ours is theirs
        else:
            assert torch.equal(ours, theirs)  # untuned, it is F.sdpa that serves


def test_the_table_has_both_kinds():
    raised = {what for what, (q, k, v, o) in TAKEN.items() if isinstance(outcome(ORIGINAL, q, k, v, **o), type)}
    assert {"wrong head_dim", "unknown keyword", "integers"} <= raised
    assert not {"2-D", "5-D", "dropout"} & raised


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("what", ["plain", "causal", "bool", "float", "gqa"])
def test_tuned_sdpa_is_within_budget(what, dtype):
    """Whatever won: small problems tuned for real."""
    hkv = 2 if what == "gqa" else 4
    q, k, v = qkv(hkv=hkv, dtype=dtype, grad=True)
    mask = mask_of("11qk", torch.bool if what == "bool" else dtype, 2, 4, 19, 19) if what in ("bool", "float") else None
    want = expect(q, k, v, mask, corners=("top_left",) if what == "causal" else ())
    with fastattn.options(mode="auto"):
        for _ in range(2):
            out = sdpa(q, k, v, mask, is_causal=what == "causal", enable_gqa=what == "gqa")
            assert want.forward(out) <= 1.0
            assert want.backward(*torch.autograd.grad(out, (q, k, v), want.grad)) <= 1.0
    assert any(v is not None for v in session.verdicts.values())


# --- patch()


def test_patch_is_a_handle():
    handle = fastattn.patch()
    assert F.scaled_dot_product_attention is not ORIGINAL
    assert handle.undo() and F.scaled_dot_product_attention is ORIGINAL
    assert not handle.undo() and F.scaled_dot_product_attention is ORIGINAL


def test_patch_is_a_context_manager():
    with pytest.raises(KeyError), fastattn.patch() as handle:
        assert isinstance(handle, fastattn.Patch) and F.scaled_dot_product_attention is not ORIGINAL
        raise KeyError
    assert F.scaled_dot_product_attention is ORIGINAL


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_patching_twice_ends_as_it_began(order):
    handles = [fastattn.patch(), fastattn.patch()]
    for i in order:
        handles[i].undo()
    assert F.scaled_dot_product_attention is ORIGINAL


class Foreign:
    """Another library's patch: it saves what it finds, calls it, and puts it back blindly."""

    def __init__(self):
        self.before = F.scaled_dot_product_attention
        self.calls = 0
        F.scaled_dot_product_attention = self.call

    def call(self, *args, **kwargs):
        self.calls += 1
        return self.before(*args, **kwargs)

    def undo(self):
        F.scaled_dot_product_attention = self.before


@pytest.fixture
def restored():
    yield
    F.scaled_dot_product_attention = ORIGINAL


@pytest.mark.parametrize("first", ["ours", "theirs"])
@pytest.mark.parametrize("undone", ["ours", "theirs"])
def test_fault_24_every_order_with_a_foreign_patcher_still_computes(first, undone, restored):
    """With another library's patch below or above ours, undone in either order, F.sdpa still computes."""
    x = r(1, 2, 3, 8)
    want = ORIGINAL(x, x, x)
    makers = {"ours": fastattn.patch, "theirs": Foreign}
    made = {name: makers[name]() for name in (first, {"ours": "theirs", "theirs": "ours"}[first])}
    assert torch.equal(F.scaled_dot_product_attention(x, x, x), want)
    last = F.scaled_dot_product_attention
    made[undone].undo()
    if first == "ours" and undone == "ours":
        assert F.scaled_dot_product_attention == last  # theirs is on top, and stays
    assert torch.equal(F.scaled_dot_product_attention(x, x, x), want)
    made["ours" if undone == "theirs" else "theirs"].undo()
    assert torch.equal(F.scaled_dot_product_attention(x, x, x), want)
    if undone != first:  # last in, first out
        assert F.scaled_dot_product_attention is ORIGINAL


def test_a_patch_over_ours_is_left_alone_until_it_is_gone(restored, caplog):
    ours, theirs = fastattn.patch(), Foreign()
    assert not ours.undo() and "patched again" in caplog.text
    x = r(1, 2, 3, 8)
    F.scaled_dot_product_attention(x, x, x)
    assert theirs.calls == 1
    theirs.undo()
    assert ours.undo() and F.scaled_dot_product_attention is ORIGINAL


def test_fault_23_a_name_imported_earlier_keeps_the_old_one():
    """A name that was imported before patch() keeps torch's own function, and still computes."""
    x = r(1, 2, 3, 8)
    with fastattn.patch(), spied() as calls:
        imported_earlier(x, x, x)
        assert imported_earlier is ORIGINAL and calls == []
        F.scaled_dot_product_attention(x, x, x)
        assert calls == ["drop_in"]


@contextlib.contextmanager
def spied():
    """The misses of sdpa() inside."""
    calls = []
    real = drop_in.drop_in

    def spied_on(*args):
        calls.append("drop_in")
        return real(*args)

    with mock.patch.object(drop_in, "drop_in", spied_on):
        yield calls


class Recorder(TorchFunctionMode):
    def __init__(self):
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


def test_fault_23_a_scan_rebinds_names_that_were_imported_earlier(restored, monkeypatch):
    """patch(scan=True) binds names that were imported before, lists them, and puts them back."""
    stock = ORIGINAL
    early, other = types.ModuleType("imported_early"), types.ModuleType("bound_otherwise")
    early.attend, early.kept = stock, len
    other.attend = theirs = lambda *given: stock(*given)
    for module in (early, other):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "no_module", None)
    with fastattn.patch() as handle:
        assert handle.rebound == () and early.attend is stock
    with fastattn.patch(scan=True) as handle:
        assert "imported_early.attend" in handle.rebound and "imported_early.attend" in repr(handle)
        assert not [place for place in handle.rebound if place.startswith(("torch.", "fastattn."))]
        assert early.attend is F.scaled_dot_product_attention is not stock
        assert (early.kept, other.attend) == (len, theirs)
        x = torch.randn(1, 2, 5, 8)
        torch.testing.assert_close(early.attend(x, x, x), stock(x, x, x))
        other.attend = early.attend  # bound meanwhile, by somebody who will not be asked
    assert early.attend is stock and handle.rebound == ()
    with fastattn.patch(scan=True) as handle:
        early.attend = theirs  # somebody else's meanwhile
    assert early.attend is theirs


def test_a_function_mode_sees_exactly_one_sdpa_call():
    q, k, v = qkv()
    with fastattn.patch():
        for _ in range(3):
            F.scaled_dot_product_attention(q, k, v)  # known, hence a hit outside the mode
            with Recorder() as mode:
                F.scaled_dot_product_attention(q, k, v)
            assert [name for name in mode.seen if "attention" in name] == ["scaled_dot_product_attention"]


def test_fault_25_multi_head_attention_is_the_same_patched():
    """nn.MultiheadAttention gives the same bits under patch(), also in eval mode, where torch has a fast path."""
    layer = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    x = r(2, 7, 32)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[:, 5:] = True
    for train, need, mask in itertools.product((True, False), (True, False), (None, padding)):
        layer.train(train)
        want = layer(x, x, x, need_weights=need, key_padding_mask=mask)[0]
        with fastattn.patch():
            assert torch.equal(layer(x, x, x, need_weights=need, key_padding_mask=mask)[0], want)


def test_fault_33_sdpa_kernel_is_obeyed():
    """Inside sdpa_kernel(MATH) F.sdpa serves, also where a hit is known, and nothing is learnt."""
    q, k, v = qkv(b=2, hq=4, sq=64, d=32, dtype=torch.bfloat16)
    with fastattn.options(mode="auto"), fastattn.patch():
        F.scaled_dot_product_attention(q, k, v)
        known = dict(session.verdicts)
        with sdpa_kernel(SDPBackend.MATH):
            assert torch.equal(F.scaled_dot_product_attention(q, k, v), ORIGINAL(q, k, v))
            for other in (qkv(sq=11), qkv(sq=12)):
                assert torch.equal(F.scaled_dot_product_attention(*other), ORIGINAL(*other))
    assert session.verdicts == known and len(known) == 1


OF_A_CPU = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
SCOPES = {  # (who serves inside, the scope)
    "ordinary": ("quick", contextlib.nullcontext),
    "restricted": ("F.sdpa", lambda: sdpa_kernel(SDPBackend.MATH)),
    "all of a CPU's": ("quick", lambda: sdpa_kernel(OF_A_CPU)),
}


@pytest.mark.parametrize("first", SCOPES)
def test_an_sdpa_kernel_that_names_every_backend_of_the_device_restricts_nothing(first, monkeypatch):
    """Whichever scope a call is first made in, no entry of one serves in another."""
    fakes.quick_wins(monkeypatch)
    given = qkv(b=2, hq=4, sq=64, d=32)
    with fastattn.options(mode="auto"), fastattn.patch():
        for name in [first, *SCOPES, *SCOPES]:
            fastattn.stats.reset()
            server, scope = SCOPES[name]
            with scope():
                for _ in range(2):
                    F.scaled_dot_product_attention(*given)
            stats = fastattn.stats()
            found = stats["served_by"] or {"F.sdpa": sum(stats["passed_on"].values())}
            assert found == {server: 2}, name


def test_a_patched_model_compiles_fullgraph():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = torch.nn.Linear(32, 96)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    torch._dynamo.reset()
    model, x = Model(), r(2, 7, 32)
    want = model(x)
    with fastattn.patch():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        out = compiled(x)
    assert torch.equal(out, want)
    out.sum().backward()
    assert model.qkv.weight.grad.isfinite().all()


def test_a_handle_says_how_it_stands():
    first = fastattn.patch()
    try:
        second = fastattn.patch()
        assert repr(first) == repr(second) == "<fastattn.patch: in place>"
        with mock.patch.object(F, "scaled_dot_product_attention", ORIGINAL):
            assert repr(first) == "<fastattn.patch: patched over>"
    finally:
        first.undo()
    assert repr(first) == "<fastattn.patch: undone>"
