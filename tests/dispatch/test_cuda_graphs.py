"""CUDA graphs, on a CPU with a capture that is made up: a hit captures, and so does a compiled model's operator."""

from __future__ import annotations

import builtins
from types import SimpleNamespace

import pytest
import torch
from graphs import qkv, store

import fastattn
from fastattn import attention, masks
from fastattn.dispatch import circumstances, resolve, tune_now
from fastattn.dispatch.attention import entries
from fastattn.dispatch.session import session
from fastattn.environment.settings import current_settings


class OnCuda(SimpleNamespace):
    """What circumstances ask of a tensor."""

    device, is_nested, layout, shape = torch.device("cuda"), False, torch.strided, (2, 4, 24, 16)


@pytest.fixture
def capture(monkeypatch):
    """capture(True): from now on a graph is captured on the current stream; nothing is timed, and no file is opened then."""
    is_on, real, opened = [False], resolve.read_circumstances, builtins.open
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_on[0])
    monkeypatch.setattr(circumstances, "_PLAIN", (OnCuda, torch.Tensor))

    def read(tensors, settings, spent):
        return real(tensors, settings, spent)._replace(capturing=real([OnCuda()], settings, spent).capturing)

    def no_file(*given, **more):
        assert not is_on[0], f"opened {given[0]} while a graph is captured"
        return opened(*given, **more)

    def no_tuning(*_, **__):
        pytest.fail("tuned")

    monkeypatch.setattr(resolve, "read_circumstances", read)
    monkeypatch.setattr(tune_now, "tune_problem", no_tuning)
    monkeypatch.setattr(builtins, "open", no_file)

    def switch(on):
        is_on[0] = on

    return switch


def test_a_capture_is_seen_on_cuda_alone(capture):
    for on in (True, False):
        capture(on)
        read = circumstances.read_circumstances
        assert read([OnCuda()], current_settings(), False).capturing is on
        assert not read([torch.randn(2)], current_settings(), False).capturing


def test_a_hit_captures(capture, untuned):
    given = qkv()
    store("matmul", *given)
    fastattn.stats.reset()
    want = attention(*given)
    before = dict(fastattn.stats()["served_by"])
    assert before == {"matmul": 1} and entries.table
    capture(True)
    misses = fastattn.stats()["misses"]
    assert torch.equal(attention(*given), want)
    assert fastattn.stats()["misses"] == misses


def test_the_operator_of_a_compiled_model_is_served_as_any_call_in_a_capture(capture):
    """A miss: by the default, not published, recorded. tests/process has the same of eager calls (fault 47)."""
    torch._dynamo.reset()
    given, window = qkv(), masks.Causal() & masks.Window(5, 0)
    run = torch.compile(lambda q, k, v: attention(q, k, v, window), backend="aot_eager", fullgraph=True)
    with fastattn.options.scope(mode="cached"):
        want = run(*given)
    fastattn.clear()
    capture(True)
    assert torch.allclose(run(*given), want, atol=1e-5)
    assert not entries.table and len(session.misses) == 1
