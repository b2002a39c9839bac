"""What a hit may be: an entry serves only under the circumstances it was made in. Every condition is tried for real.

`is_hit` answers whether a call is served without resolve.attention, by the front and by the table alike.
"""

from __future__ import annotations

import os
import sys
import threading

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from changes import changed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn import attention
from fastattn.dispatch import entries as entries_module
from fastattn.dispatch import guard as probe
from fastattn.dispatch import resolve
from fastattn.dispatch.attention import entries
from fastattn.dispatch.entries import STREAK, drop_all
from fastattn.dispatch.guard import NATIVE
from fastattn.problems import masks

SHAPE = (1, 4, 16, 32)
F_sdpa = torch.nn.functional.scaled_dot_product_attention


class Missed(Exception):
    """A call that reached resolve.attention."""


@pytest.fixture(params=[True, False], ids=["native", "plain"], autouse=True)
def guard(request, monkeypatch):
    """Both guards; nothing is timed, and no scope was ever used."""
    if request.param and not NATIVE:
        pytest.skip("this torch has no TensorGuards")
    monkeypatch.setattr(probe, "NATIVE", request.param)
    fastattn.options(mode="cached")


@pytest.fixture
def qkv():
    return make(), make(), make()


def make(*shape, **options):
    return torch.randn(shape or SHAPE, **options)


def arm(*args, **options):
    """Make an entry by a call."""
    fastattn.clear()
    attention(*args, **options)
    assert is_hit(*args, **options)


def is_hit(*args, **options):
    def missed(*_):
        raise Missed

    real, before = resolve.attention, entries.first
    resolve.attention = missed
    found = []
    try:
        for first in (before, entries._ask_table):
            entries.first = first
            try:
                attention(*args, **options)
                found.append(True)
            except Missed:
                found.append(False)
    finally:
        resolve.attention, entries.first = real, before
    assert found[0] == found[1], "the front and the table disagree"
    return found[0]


def swapped(qkv, place, x):
    return [x if i == place else y for i, y in enumerate(qkv)]


def inference_tensor():
    with torch.inference_mode():
        return make()


def fake_tensor():
    with FakeTensorMode():
        return make()


class Subclass(torch.Tensor):
    pass


class PlainSubclass(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl


OTHERS = {
    "dtype": lambda: make().double(),
    "device": lambda: make().to("meta"),
    "length": lambda: make(1, 4, 17, 32),
    "heads": lambda: make(1, 2, 32, 32),
    "head_dim": lambda: make(1, 4, 32, 16),
    "batch": lambda: make(2, 4, 8, 32),
    "dimensions": lambda: make(4, 16, 32),
    "stride": lambda: make(1, 16, 4, 32).transpose(1, 2),
    "last stride": lambda: make(1, 4, 32, 16).mT,
    "zero length": lambda: make(1, 4, 0, 32),
    "requires_grad": lambda: make(requires_grad=True),
    "parameter": lambda: torch.nn.Parameter(make(), False),
    "negative bit": lambda: torch._neg_view(make()),
    "sparse": lambda: make().to_sparse(),
    "mkldnn": lambda: make().to_mkldnn(),
    "nested strided": lambda: torch.nested.nested_tensor([make(4, 16, 32)]),
    "nested jagged": lambda: torch.nested.nested_tensor([make(4, 32), make(3, 32)], layout=torch.jagged),
    "subclass": lambda: make().as_subclass(Subclass),
    "subclass without torch function": lambda: make().as_subclass(PlainSubclass),
    "fake tensor": fake_tensor,
    "inference tensor": inference_tensor,
    "numpy": lambda: make().numpy(),
    "None": lambda: None,
}


def test_the_same_and_fresh_tensors_hit(qkv):
    arm(*qkv)
    assert is_hit(*qkv)
    fresh = make(), make(), make()
    assert is_hit(*fresh)
    assert torch.equal(attention(*fresh), F_sdpa(*fresh))


@pytest.mark.parametrize("place", [0, 1, 2], ids=["q", "k", "v"])
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse")
def test_another_kind_of_tensor_misses(qkv, other, place):
    arm(*qkv)
    assert not is_hit(*swapped(qkv, place, OTHERS[other]()))
    assert is_hit(*qkv)


def test_another_storage_offset_is_served_rightly(qkv):
    arm(*qkv)
    odd = torch.randn(2049)[1:].view(SHAPE)
    assert torch.equal(attention(odd, *qkv[1:]), F_sdpa(odd, *qkv[1:]))


@pytest.mark.parametrize("place", [0, 1, 2], ids=["q", "k", "v"])
def test_a_dual_tensor_misses(qkv, place):
    arm(*qkv)
    with forward_ad.dual_level():
        assert not is_hit(*swapped(qkv, place, forward_ad.make_dual(make(), make())))
        assert not is_hit(*qkv)
    assert is_hit(*qkv)


def test_repeated_tensors_are_another_entry(qkv):
    q, k, v = qkv
    arm(q, q, q)
    assert is_hit(k, k, k)
    assert not is_hit(q, k, v) and not is_hit(q, q, v) and not is_hit(q, k, k)
    arm(q, k, k)
    assert is_hit(v, q, q) and not is_hit(q, k, v)
    arm(q, k, v)  # TensorGuards refuses repeated tensors; that the plain guard takes them is not wrong
    assert torch.equal(attention(q, q, v), F_sdpa(q, q, v))


MASKS = {
    "none": lambda: None,
    "float": lambda: torch.zeros(1, 1, 16, 16),
    "bool": lambda: torch.ones(1, 1, 16, 16, dtype=torch.bool),
    "per head": lambda: torch.zeros(1, 4, 16, 16),
    "two dimensions": lambda: torch.zeros(16, 16),
    "expanded": lambda: torch.zeros(1, 1, 1, 16).expand(1, 1, 16, 16),
    "requires_grad": lambda: torch.zeros(1, 1, 16, 16, requires_grad=True),
    "nested": lambda: torch.nested.nested_tensor([make(1, 16, 16)]),
    "top_left": lambda: masks.Causal(),
    "bottom_right": lambda: masks.Causal("bottom_right"),
}


@pytest.mark.parametrize("armed", [name for name in MASKS if name != "nested"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_mask_added_dropped_or_changed_misses(qkv, armed):
    arm(*qkv, MASKS[armed]())
    assert is_hit(*qkv, MASKS[armed]())
    for other in set(MASKS) - {armed}:
        assert not is_hit(*qkv, MASKS[other]()), other


def test_a_mask_that_is_a_query_too(qkv):
    x = make(1, 1, 16, 16)
    arm(x, x, x, x)
    assert is_hit(*(y := make(1, 1, 16, 16),) * 4) and not is_hit(y, y, y, x) and not is_hit(x, y, x, x)


def test_a_causal_bias_of_torch_is_served_rightly(qkv):
    from torch.nn.attention.bias import causal_lower_right

    q, k, v = make(1, 4, 7, 32), *qkv[1:]
    for _ in range(2):
        seen = torch.ones(7, 16, dtype=torch.bool).tril(9)
        out = attention(q, k, v, causal_lower_right(7, 16))
        assert torch.allclose(out, F_sdpa(q, k, v, seen), atol=1e-6)


OPTIONS = {
    "none": {},
    "causal": {"is_causal": True},
    "causal 1": {"is_causal": 1},
    "scale": {"scale": 0.5},
    "scale other": {"scale": 0.25},
    "scale None": {"scale": None},
    "scale tensor": {"scale": torch.tensor(0.5)},
    "scale tensors": {"scale": torch.full((2,), 0.5)},
    "scale numpy": {"scale": np.float64(0.5)},
    "scale 1": {"scale": 1},
    "scale 1.0": {"scale": 1.0},
    "scale True": {"scale": True},
    "scale 0": {"scale": 0.0},
    "layout": {"layout": "bshd"},
    "accuracy": {"accuracy": "dtype"},
    "kernel": {"kernel": "sdpa_math"},
    "unknown": {"bogus": 1},
}
ARMED = ["none", "causal", "scale", "scale None", "scale 1", "scale 1.0", "scale 0", "layout", "accuracy", "kernel"]


@pytest.mark.parametrize("armed", ARMED)
def test_other_options_miss(qkv, armed):
    arm(*qkv, **OPTIONS[armed])
    for other in set(OPTIONS) - {armed}:
        assert not is_hit(*qkv, **OPTIONS[other]), other
    assert is_hit(*qkv, **OPTIONS[armed])


def test_grad_mode_matters_where_an_input_requires_grad(qkv):
    g = make(requires_grad=True)
    arm(g, *qkv[1:])
    with torch.no_grad():
        assert not is_hit(g, *qkv[1:])
        arm(g, *qkv[1:])
    assert not is_hit(g, *qkv[1:])
    assert attention(g, *qkv[1:]).requires_grad


def test_a_parameter_has_an_entry_of_its_own(qkv):
    p = torch.nn.Parameter(make())
    arm(p, *qkv[1:])
    assert not is_hit(make(requires_grad=True), *qkv[1:])
    with torch.no_grad():
        assert not is_hit(p, *qkv[1:])


def test_inference_mode_has_entries_of_its_own(qkv):
    arm(*qkv)
    with torch.inference_mode():
        assert not is_hit(*qkv)
        arm(*qkv)
    assert not is_hit(*qkv)


@pytest.mark.parametrize("kernel", [None, "torch_flash"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_its_dtype(dtype, kernel):
    q, k, v = (make(dtype=dtype) for _ in range(3))
    options = {"kernel": kernel} if kernel else {}
    arm(q, k, v, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_hit(q, k, v, **options)
        arm(q, k, v, **options)
        with torch.autocast("cpu", dtype=torch.float16):
            assert attention(q, k, v, **options).dtype is torch.float16
        with torch.autocast("cpu", enabled=False):
            assert not is_hit(q, k, v, **options)
    assert not is_hit(q, k, v, **options)


def test_another_autocast_dtype_misses(qkv):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        arm(*qkv)
        with torch.autocast("cpu", dtype=torch.float16):
            assert not is_hit(*qkv)


def test_deterministic_mode_both_ways(qkv):
    arm(*qkv)
    torch.use_deterministic_algorithms(True)
    try:
        assert not is_hit(*qkv)
        arm(*qkv)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not is_hit(*qkv)


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class HiddenMode(DispatchMode):
    @classmethod
    def ignore_compile_internals(cls):
        return True


MODES = {
    "function mode": FunctionMode,
    "default device": lambda: torch.device("cpu"),
    "dispatch mode": DispatchMode,
    "hidden dispatch mode": HiddenMode,
    "fake mode": lambda: FakeTensorMode(allow_non_fake_inputs=True),
    "dual level": forward_ad.dual_level,
}


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_misses_and_hits_again_after_it(qkv, mode):
    arm(*qkv)
    with MODES[mode]():
        assert not is_hit(*qkv)
    assert is_hit(*qkv)


TRANSFORMS = {
    "vmap": lambda f, q: torch.func.vmap(f)(torch.stack([q, q])),
    "grad": lambda f, q: torch.func.grad(lambda x: f(x).sum())(q),
    "jvp": lambda f, q: torch.func.jvp(f, (q,), (q,)),
    "vjp": lambda f, q: torch.func.vjp(f, q),
    "functionalize": lambda f, q: torch.func.functionalize(f)(q),
    "make_fx": lambda f, q: make_fx(f)(q),
    "make_fx fake": lambda f, q: make_fx(f, tracing_mode="fake")(q),
    "jit.trace": lambda f, q: torch.jit.trace(f, (q,), check_trace=False),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_inside_a_transform_nothing_hits(qkv, transform):
    q, k, v = qkv
    arm(q, k, v)
    seen = []

    def f(x):
        seen.append(is_hit(x, k, v))
        seen.append(is_hit(q, k, v))  # not wrapped, yet inside
        return x * 1

    TRANSFORMS[transform](f, q)
    assert seen and not any(seen)
    assert is_hit(q, k, v)


def set_mkldnn(value):
    torch.backends.mkldnn.matmul.fp32_precision = value


SWITCHES = {
    # what is changed: (kernel, context) of an entry that must not serve inside
    "flash switch": ("torch_flash", lambda: changed(
        torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp, False)),
    "math switch": ("torch_math", lambda: changed(
        torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp, False)),
    "sdpa_kernel": ("torch_flash", lambda: sdpa_kernel(SDPBackend.MATH)),
    "sdpa_kernel with flash": ("torch_flash", lambda: sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])),
    "threads": ("torch_flash", lambda: changed(
        torch.get_num_threads, torch.set_num_threads, torch.get_num_threads() + 1)),
    "float32 precision": ("matmul", lambda: changed(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium")),
    "fp32_precision": ("matmul", lambda: changed(
        lambda: torch.backends.mkldnn.matmul.fp32_precision, set_mkldnn, "bf16")),
}  # fmt: skip


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_that_the_kernel_depends_on_misses(qkv, switch):
    kernel, context = SWITCHES[switch]
    torch.set_float32_matmul_precision("highest")  # torch tells "not set" from it
    arm(*qkv, kernel=kernel)
    with context():
        assert not is_hit(*qkv, kernel=kernel)
    assert is_hit(*qkv, kernel=kernel)


def test_precision_high_is_not_medium(qkv):
    read, write = torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    with changed(read, write, "high"):
        arm(*qkv, kernel="matmul")
        with changed(read, write, "medium"):
            assert not is_hit(*qkv, kernel="matmul")


def test_the_default_obeys_sdpa_kernel_on_a_hit(qkv):
    q, k, v = (x.bfloat16() for x in qkv)
    arm(q, k, v)
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.equal(attention(q, k, v), F_sdpa(q, k, v))


def test_another_thread_has_modes_of_its_own(qkv):
    arm(*qkv)
    seen = []

    def other():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            seen.append(is_hit(*qkv))
        seen.append(is_hit(*qkv))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [False, True]


def test_many_threads_hit_without_a_miss(qkv, monkeypatch):
    arm(*qkv)
    want, wrong = F_sdpa(*qkv), []
    monkeypatch.setattr(resolve, "attention", lambda *_: wrong.append("miss"))

    def work():
        for _ in range(100):
            if not torch.equal(attention(*qkv), want):
                wrong.append("output")

    threads = [threading.Thread(target=work) for _ in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_tells_apart_what_the_parent_did(qkv):
    arm(*qkv)
    pid = os.fork()
    if pid == 0:  # no operator may run here: the parent's thread pool is gone
        first = entries.first
        ok = first(*qkv, None, "bhsd", {}) and not first(qkv[0].detach().requires_grad_(), *qkv[1:], None, "bhsd", {})
        os._exit(0 if ok else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_an_options_scope_has_entries_of_its_own(qkv):
    """And flushes nobody's: the entries made outside serve other threads meanwhile, and this one afterwards."""

    def serving():
        """The Call that a hit leads to: a closure of its own in this layout."""
        return entries.lookup(*qkv, None, "bshd", {})

    def call():
        return attention(*qkv, layout="bshd")

    call()
    outside = serving()
    assert outside is not None
    with fastattn.options.scope(kernels=["torch_math"]):
        assert serving() is None
        call()
        assert serving() is not None and serving() is not outside
        with fastattn.options.scope(mode="off"):
            assert serving() is None
        seen = []
        thread = threading.Thread(target=lambda: seen.append(serving()))
        thread.start()
        thread.join()
        assert seen == [outside], "an entry of this thread's scope served another thread, or the other's was dropped"
    assert serving() is outside


@pytest.mark.parametrize("change", [{"mode": "off"}, {"kernels": ["torch_math"]}, {"accuracy": "dtype"}])
def test_options_for_the_process_forget_all_entries(qkv, change):
    arm(*qkv)
    fastattn.options(**change)
    assert not is_hit(*qkv)


@pytest.mark.parametrize("forget", [fastattn.clear, drop_all])
def test_forgetting_leaves_no_entry(qkv, forget):
    arm(*qkv)
    forget()
    assert not is_hit(*qkv)


# --- decoding: one entry for a bucket of kv_len


@pytest.fixture(params=["bhsd", "bshd"])
def cache(request):
    """(q, slice(n) -> k or v of that length, layout) of a decode with 40 of 64 places used; its bucket is 33 to 48."""
    layout = request.param
    q, k, v = make(2, 4, 1, 32), make(2, 2, 64, 32), make(2, 2, 64, 32)
    q, k, v = (x.transpose(1, 2).contiguous() if layout == "bshd" else x for x in (q, k, v))

    def cut(x, n):
        return x[:, :n] if layout == "bshd" else x[:, :, :n]

    arm(q, cut(k, 40), cut(v, 40), layout=layout)
    return q, k, v, cut, layout


def test_a_decode_entry_serves_its_bucket_and_no_more(cache):
    q, k, v, cut, layout = cache
    hits = {n for n in range(1, 65) if is_hit(q, cut(k, n), cut(v, n), layout=layout)}
    assert hits == set(range(33, 49))
    swap = (lambda x: x.transpose(1, 2)) if layout == "bshd" else lambda x: x
    for n in (33, 41, 48):
        want = F_sdpa(swap(q), swap(cut(k, n)), swap(cut(v, n)), enable_gqa=True)
        assert torch.equal(swap(attention(q, cut(k, n), cut(v, n), layout=layout)), want)


def test_a_decode_entry_refuses_other_calls(cache):
    q, k, v, cut, layout = cache
    key, value = cut(k, 40), cut(v, 40)
    heads = (lambda x: x[:, :, :1]) if layout == "bshd" else (lambda x: x[:, :1])
    others = {
        "k shorter": (q, cut(k, 39), value),
        "v shorter": (q, key, cut(v, 39)),
        "dtype": (q.double(), key.double(), value.double()),
        "dtype of v": (q, key, value.double()),
        "heads": (q, heads(key), heads(value)),
        "heads of v": (q, key, heads(value)),
        "head_dim": (q[..., :16], key[..., :16], value[..., :16]),
        "head_dim of v": (q, key, value[..., :16]),
        "batch": (q[:1], key[:1], value[:1]),
        "last stride": (q, key.mT.contiguous().mT, value),
        "empty": (q, cut(k, 0), cut(v, 0)),
        "requires_grad": (q, key.detach().requires_grad_(), value),
        "mask": (q, key, value, torch.zeros(1, 1, 1, 40)),
    }
    assert {name for name, args in others.items() if is_hit(*args, layout=layout)} == set()


def test_a_decode_entry_with_head_dim_v(qkv):
    q, k, v = make(1, 4, 1, 32), make(1, 4, 64, 32), make(1, 4, 64, 16)
    arm(q, k[:, :, :40], v[:, :, :40])
    assert is_hit(q, k[:, :, :41], v[:, :, :41])
    assert not is_hit(q, k[:, :, :41], v[:, :, :40]) and not is_hit(q, k[:, :, :40], v[:, :, :41])


def test_short_caches_are_exact():
    q, k, v = make(1, 4, 3, 32), make(1, 4, 16, 32), make(1, 4, 16, 32)
    arm(q, k[:, :, :10], v[:, :, :10], is_causal=True)
    assert not is_hit(q, k[:, :, :11], v[:, :, :11], is_causal=True)


# --- the front and the table


def test_64_alternating_problems_all_hit():
    calls = [tuple(make(1, 2, 17 + n, 8) for _ in range(3)) for n in range(64)]
    for c in calls:
        attention(*c)
    for _ in range(3):
        assert all(is_hit(*c) for c in calls)
    assert all(torch.equal(attention(*c), F_sdpa(*c)) for c in calls)


def test_more_problems_of_equal_bytes_than_are_kept(monkeypatch):
    monkeypatch.setattr(entries_module, "SAME_BYTES", 8)
    shapes = [(1, 2**i, 2 ** (11 - i), 8) for i in range(11)]
    calls = [tuple(make(*shape) for _ in range(3)) for shape in shapes]
    assert len(calls) > entries_module.SAME_BYTES
    for _ in range(2):
        assert all(torch.equal(attention(*c), F_sdpa(*c)) for c in calls)
    assert sum(map(len, entries.table.values())) <= entries_module.SAME_BYTES


def test_the_table_starts_anew_at_its_limit(monkeypatch):
    monkeypatch.setattr(entries_module, "LIMIT", 4)
    for n in range(20, 32):
        x = make(1, 1, n, 8)
        attention(x, x, x)
        assert is_hit(x, x, x)
        assert sum(map(len, entries.table.values())) <= 4


def test_the_front_is_dropped_while_problems_alternate_and_used_again_after():
    a, b, c = (make(1, 2, n, 8) for n in (20, 24, 28))
    for _ in range(1 + STREAK):
        for x in (a, b, c):
            attention(x, x, x)
    assert entries.first is entries._ask_table
    for _ in range(2 * STREAK + 2):
        attention(a, a, a)
    assert entries.first is not entries._ask_table
    assert entries.first(a, a, a, None, "bhsd", {}) is not None


def test_an_error_of_the_call_is_not_a_miss(qkv, monkeypatch):
    """The probe hands the Call out and never runs it: what the Call raises reaches the caller, and runs once."""
    ran = []

    def broken(q, k, v, mask):
        ran.append(1)
        raise ArithmeticError("from the kernel")

    served = resolve.Resolved(broken, "broken", "a test")
    entries.publish(served, *qkv, None, "bhsd", {})
    monkeypatch.setattr(resolve, "attention", lambda *_: pytest.fail("took the error for a miss"))
    with pytest.raises(ArithmeticError, match="from the kernel"):
        attention(*qkv)
    assert ran == [1]


def test_fx_symbolic_trace_records_sdpa(qkv):
    graph = torch.fx.symbolic_trace(lambda q: attention(q, *qkv[1:])).graph
    assert any("scaled_dot_product" in str(node.target) for node in graph.nodes)


def test_an_entry_that_was_dropped_meanwhile_is_not_put_in_front(qkv):
    """A thread that found it before another one dropped it notes its hits afterwards."""
    arm(*qkv)
    [[found]] = entries.table.values()
    drop_all()
    for _ in range(2 * STREAK):
        entries._note(found)
    assert entries.first is entries._ask_table


def test_fault_36_a_hit_runs_few_functions_and_asks_the_system_nothing(qkv):
    """A hit runs a handful of Python functions, and asks neither the clock nor the file system nor a lock."""
    arm(*qkv, is_causal=True)
    for _ in range(2 * STREAK):
        attention(*qkv, is_causal=True)
    ran, called = [], []

    def watch(frame, event, what):
        if event == "call":
            ran.append(frame.f_code.co_qualname if hasattr(frame.f_code, "co_qualname") else frame.f_code.co_name)
        elif event == "c_call":
            called.append((getattr(what, "__module__", None) or "", what.__qualname__))

    sys.setprofile(watch)
    try:
        attention(*qkv, is_causal=True)
    finally:
        sys.setprofile(None)
    assert len(ran) <= (5 if probe.NATIVE else 25), ran
    system = ("time", "posix", "io", "_io", "_thread", "_json", "nt")
    assert not [name for module, name in called if module in system or name.endswith(("acquire", "__enter__"))], called
    assert len(called) <= 40, called
