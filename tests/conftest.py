"""Fixtures every test has: a store of its own, a clean process state, and nothing left patched."""

from __future__ import annotations

import os
import socket

import pytest
import torch

os.environ.pop("FASTATTN_MODE", None)

import fastattn
from fastattn.dispatch import session
from fastattn.environment.log import log
from fastattn.environment.settings import reload_settings
from fastattn.tuning import cpu_contention


@pytest.fixture(scope="session", autouse=True)
def no_network():
    """Fault 56: nothing here may need, or reach, another machine."""
    real = socket.socket.connect

    def connect(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"a test wants to reach {address}")
        return real(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect)
        yield


@pytest.fixture(autouse=True)
def own_store(tmp_path, monkeypatch):
    """Every test tunes into its own directory, with a small budget, and forgets what it learnt."""
    for name in [n for n in os.environ if n.startswith("FASTATTN_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path / "store"))
    monkeypatch.setattr(
        cpu_contention, "read_cpu_usage", lambda: None
    )  # what else runs on the machine has no say in a test
    reload_settings()
    fastattn.clear()
    session.state.spent_s = 0.0
    log.setLevel("NOTSET")
    log.handlers.clear()
    torch.manual_seed(0)
    before = torch.nn.functional.scaled_dot_product_attention
    yield tmp_path / "store"
    assert torch.nn.functional.scaled_dot_product_attention is before, "a test left F.sdpa patched"
    reload_settings()
    fastattn.clear()


@pytest.fixture
def untuned():
    """Nothing is timed: the default serves. For tests of semantics, where speed has no say."""
    with fastattn.options(mode="cached"):
        yield
