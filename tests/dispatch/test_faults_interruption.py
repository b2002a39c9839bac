"""Fault 69: whatever interrupts a program surfaces in the kernel that runs just then, and is none of the kernel's doing."""

from __future__ import annotations

import bdb
import ctypes
import functools
import json
import os
import signal
import sys
import threading
import warnings

import pytest
import torch
from fakes import FAST, Clock, add, check, honest, made_up, qkv, row, turn

import fastattn
from fastattn.dispatch.attention import entries
from fastattn.environment import blame
from fastattn.environment.blame import Cause, cause_of
from fastattn.kernels.libraries import availability
from fastattn.verdicts.verdict import Outcome

SIGNAL = signal.SIGUSR1


class SoftTimeLimit(Exception):
    """What a task queue's signal handler raises."""


class Interrupted:
    """Right, and by far the fastest; `interruption` runs inside it while it is set."""

    def __init__(self) -> None:
        self.interruption = None

    def __call__(self, q, k, v, mask, a):
        if self.interruption is not None:
            self.interruption()
            for _ in range(1000):  # what was thrown in arrives at some instruction of this frame
                pass
        return honest(q, k, v, mask, a)


@pytest.fixture
def kernel(monkeypatch):
    found = Interrupted()
    add(monkeypatch, made_up("interrupted", found))
    turn(monkeypatch, Clock({"default": 4e-3, "interrupted": FAST}))
    return found


@pytest.fixture
def handler():
    """handler(raises, how): from now on SIGNAL's handler raises that."""
    before = signal.getsignal(SIGNAL)

    def install(error, how="function"):
        def on_signal(number, frame):
            raise error

        class Object:
            def __call__(self, number, frame):
                raise error

            method = __call__

        ways = {
            "function": on_signal,
            "method": Object().method,
            "object": Object(),
            "partial": functools.partial(lambda error, number, frame: on_signal(number, frame), error),
        }
        signal.signal(SIGNAL, ways[how])
        return error

    yield install
    signal.signal(SIGNAL, before)


def alarm():
    signal.raise_signal(SIGNAL)


def is_unharmed(own_store):
    """Whether the winner still serves and its file says nothing against it."""
    q, k, v = qkv(64)
    texts = [path.read_text() for path in own_store.rglob("*.json")]
    return fastattn.explain(q, k, v).served_by == "interrupted" and "demoted" not in "".join(texts)


ERRORS = [SoftTimeLimit("30 s"), TimeoutError("30 s"), ValueError("a handler's"), RuntimeError("a handler's")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("how", ["function", "method", "object", "partial"])
def test_fault_69_a_signal_handlers_exception_reaches_the_caller(error, how, kernel, handler, own_store, caplog):
    """What only passes through a kernel reaches the caller, and demotes nobody."""
    q, k, v = qkv(64)
    check(q, k, v)
    handler(error, how)
    kernel.interruption = alarm
    with pytest.raises(type(error)) as raised:
        fastattn.attention(q, k, v)
    assert raised.value is error and not caplog.records
    kernel.interruption = None
    assert is_unharmed(own_store)


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_fault_69_in_a_first_call_too_and_the_next_one_tunes(error, kernel, handler, own_store):
    """An interrupted tuning leaves nothing behind."""
    q, k, v = qkv(64)
    handler(error)
    kernel.interruption = alarm
    with pytest.raises(type(error)) as raised:
        fastattn.attention(q, k, v)
    assert raised.value is error and not list(own_store.rglob("*.json"))
    kernel.interruption = None
    check(q, k, v)
    assert is_unharmed(own_store)


@pytest.mark.parametrize("call", [lambda *x: fastattn.plan(*x), lambda *x: fastattn.sdpa(*x)], ids=["plan", "sdpa"])
def test_fault_69_in_plan_and_in_the_drop_in(call, kernel, handler, own_store):
    """Every way to a kernel lets the caller's exceptions through."""
    q, k, v = qkv(64)
    error = handler(SoftTimeLimit())
    kernel.interruption = alarm
    with pytest.raises(SoftTimeLimit) as raised:
        call(q, k, v)
    assert raised.value is error
    kernel.interruption = None
    held = fastattn.plan(q, k, v)
    kernel.interruption = alarm
    with pytest.raises(SoftTimeLimit):
        held(q, k, v)
    kernel.interruption = None
    assert held.candidate == "interrupted" and is_unharmed(own_store)


@pytest.mark.parametrize("where", ["guard", "table", "store", "import"])
def test_fault_69_between_the_kernels_too(where, kernel, handler, own_store, monkeypatch):
    """Wherever fastattn makes do without something, it lets the caller's exception through."""
    q, k, v = qkv(64)
    error = handler(TimeoutError("a handler's, and an OSError"))
    if where in ("guard", "table"):
        check(q, k, v)
        monkeypatch.setattr(entries, "first", lambda *_: alarm() if where == "guard" else None)
        monkeypatch.setattr(entries, "lookup", lambda *_: alarm())
    elif where == "store":
        real = os.fsync
        monkeypatch.setattr(os, "fsync", lambda file: (alarm(), real(file)))
    else:
        monkeypatch.setattr(availability, "load_kernel", lambda kernel: alarm())
        availability.why_unavailable.cache_clear()
    with pytest.raises(TimeoutError) as raised:
        fastattn.attention(q, k, v)
    assert raised.value is error
    monkeypatch.undo()
    availability.why_unavailable.cache_clear()


def thrown_in(kind):
    """As another thread throws an exception into this one: it has no frame of its own."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(threading.get_ident()), ctypes.py_object(kind))


def debugger_quits():
    def trace(frame, event, argument):
        raise bdb.BdbQuit

    sys.settrace(trace)
    try:
        (lambda: None)()
    finally:
        sys.settrace(None)


@pytest.mark.parametrize("how", ["thrown in", "thrown in, of Python's own", "debugger", "checkpoint"])
def test_fault_69_what_others_raise_in_a_hit(how, kernel, own_store, caplog):
    """Exceptions of watchdogs, debuggers and checkpointing are their own."""
    kind = {
        "thrown in": type("WatchdogError", (Exception,), {"__module__": "watchdog"}),
        "thrown in, of Python's own": TimeoutError,
        "debugger": bdb.BdbQuit,
        "checkpoint": torch.utils.checkpoint._StopRecomputationError,
    }[how]
    q, k, v = qkv(64)
    check(q, k, v)
    if how == "debugger":
        kernel.interruption = debugger_quits
    elif how == "checkpoint":
        kernel.interruption = lambda: (_ for _ in ()).throw(kind())
    else:
        once = [kind]
        kernel.interruption = lambda: thrown_in(once.pop()) if once else None
    with pytest.raises(kind):
        fastattn.attention(q, k, v)
    assert not caplog.records
    kernel.interruption = None
    assert is_unharmed(own_store)


@pytest.mark.parametrize("error", [ValueError("not this one"), SoftTimeLimit()], ids=lambda e: type(e).__name__)
def test_fault_69_a_hook_for_saved_tensors_raises(error, monkeypatch, own_store):
    """A hook that refuses a tensor refuses it, whichever kernel saves it."""
    add(monkeypatch, made_up("interrupted", honest))
    turn(monkeypatch, Clock({"default": 4e-3, "interrupted": FAST}))
    q, k, v = qkv(64, grad=True)
    check(q, k, v)

    def pack(x):
        raise error

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), pytest.raises(type(error)) as raised:
        fastattn.attention(q, k, v)
    assert raised.value is error and "demoted" not in "".join(p.read_text() for p in own_store.rglob("*.json"))
    assert fastattn.explain(q, k, v).served_by == "interrupted"


def test_fault_69_a_plan_made_without_gradients_is_called_in_training(monkeypatch, own_store):
    """The default answers what the plan was not made for, with its gradients, and nobody is demoted."""

    def forward_only(q, k, v, mask, a):
        if torch.is_grad_enabled() and q.requires_grad:
            raise RuntimeError("out= does not support automatic differentiation")
        return honest(q, k, v, mask, a)

    add(monkeypatch, made_up("interrupted", forward_only, grad=False))
    turn(monkeypatch, Clock({"default": 4e-3, "interrupted": FAST}))
    q, k, v = qkv(64, grad=True)
    with torch.no_grad():
        held = fastattn.plan(q, k, v)
    assert held.candidate == "interrupted"
    held(q, k, v).sum().backward()
    assert q.grad is not None and is_unharmed(own_store)


def test_fault_69_only_what_raises_again_is_demoted(kernel, own_store, caplog):
    """A kernel that fails once is answered by another, and keeps its place."""
    q, k, v = qkv(64)
    check(q, k, v)
    errors = [RuntimeError("a passing failure")]

    def fail_once():
        if errors:
            raise errors.pop()

    kernel.interruption = fail_once
    check(q, k, v)
    assert not errors and is_unharmed(own_store) and not caplog.records
    kernel.interruption = lambda: (_ for _ in ()).throw(RuntimeError("for good"))
    check(q, k, v)
    kernel.interruption = None
    assert not is_unharmed(own_store) and "for good" in caplog.text


def deep():
    return deep()


@pytest.mark.parametrize("how", ["recursion", "a warning", "a deprecation"])
def test_fault_69_the_circumstances_of_one_call_demote_nobody(how, kernel, own_store, caplog):
    """A stack that is full, or warnings that are errors, are no fault of the kernel that meets them."""
    kind = {"a warning": UserWarning, "a deprecation": DeprecationWarning}.get(how)
    q, k, v = qkv(64)
    check(q, k, v)
    kernel.interruption = deep if kind is None else lambda: warnings.warn("old", kind, stacklevel=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(q, k, v)
    assert not caplog.records
    kernel.interruption = None
    assert is_unharmed(own_store)


def test_fault_69_and_rule_nobody_out_for_good(kernel, own_store):
    """A candidate that only warned where warnings are errors is tried again by the next process."""
    q, k, v = qkv(64)
    kernel.interruption = lambda: warnings.warn("old", UserWarning, stacklevel=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(q, k, v)
    [path] = own_store.rglob("*.json")
    [trial] = [t for t in json.loads(path.read_text())["trials"] if t["candidate"] == "interrupted"]
    assert Outcome(trial["outcome"]) is Outcome.NOT_TRIED and "UserWarning" in trial["reason"]


def test_fault_69_whose_an_exception_is():
    """One function says it, from the exception alone."""
    foreign = type("Error", (Exception,), {"__module__": "some_library.errors"})
    assert cause_of(RuntimeError("shape")) is Cause.KERNEL
    assert cause_of(foreign()) is Cause.CALLER and cause_of(foreign(), ["some_library"]) is Cause.KERNEL
    assert cause_of(KeyboardInterrupt()) is Cause.CALLER and cause_of(SystemExit()) is Cause.CALLER
    assert cause_of(MemoryError()) is Cause.MEMORY
    assert cause_of(RuntimeError("CUDA error: an illegal memory access was encountered")) is Cause.DEVICE
    with blame.suppress_system_errors():
        raise FileNotFoundError("no file of that name")


@pytest.mark.parametrize("where", ["import", "tuning", "the caller's tensors"])
def test_fault_69_an_exception_of_the_librarys_own_type_is_the_kernels(where, kernel, monkeypatch):
    """A type that a library's C++ defines has no frames: it is known by the library's name."""
    own = type("cudnnGraphNotSupportedError", (Exception,), {"__module__": "cudnn"})
    q, k, v = qkv(64)

    def raises(*_):
        raise own("no engine")

    if where == "import":
        add(monkeypatch, made_up("broken", honest, load=raises))
    elif where == "tuning":
        kernel.interruption = raises
    else:
        monkeypatch.setattr("fastattn.tuning.callers_tensors.CallersTensors.check", raises)
    check(q, k, v)
    if where == "import":
        assert "cudnnGraphNotSupportedError" in row("broken", q, k, v).reason
    else:
        assert fastattn.explain(q, k, v).served_by != "interrupted"
