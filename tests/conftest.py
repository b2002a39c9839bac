"""Fixtures every test has: a store of its own, a clean process state, and nothing left patched.

`pytest --nothing-wins` runs the tests as on a machine where no kernel is faster than the default: no test may need one that is.
"""

from __future__ import annotations

import gc
import itertools
import logging
import os
import runpy
import socket
import sys
from pathlib import Path

import pytest

os.environ.pop("FASTATTN_MODE", None)
# OpenMP's threads sleep while they wait (read when torch is loaded, children inherit it): spinning, they take the cores that
# the test, or whoever shares the machine, needs
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # pytest -n: each process has its share of the cores
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

import torch
from core import CORE

import fastattn
from fastattn.dispatch.session import session
from fastattn.environment.log import log
from fastattn.environment.settings import reload_settings
from fastattn.tuning import cpu_contention

NOTHING_WINS = Path(__file__).parent / "support" / "nothing_wins"
# torch has 55 loggers whose parents hear nothing of them: pytest would hang its handlers on each, six times a test
for logger in [x for x in logging.Logger.manager.loggerDict.values() if isinstance(x, logging.Logger)]:
    logger.propagate = True


def pytest_addoption(parser):
    parser.addoption("--nothing-wins", action="store_true", help="by the real clock all kernels are equally fast")


def pytest_configure(config):
    if config.getoption("nothing_wins"):
        runpy.run_path(str(NOTHING_WINS / "sitecustomize.py"))
        sys.path.insert(0, str(NOTHING_WINS))
        os.environ["PYTHONPATH"] = os.pathsep.join([str(NOTHING_WINS), os.environ.get("PYTHONPATH", "")])  # children


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Mark the core, and refuse a row of core.py that names no test: a renamed test would leave it in silence."""
    unseen = {(path, row) for path, rows in CORE.items() for row in rows}
    collected = set()
    for item in items:
        path = item.path.relative_to(config.rootpath).as_posix()
        collected.add(path)
        rows = {(path, item.name), (path, item.originalname)} if path in CORE else set()
        if any(row in CORE[path] for path, row in rows):
            item.add_marker("core")
        unseen -= rows
    missing = sorted(row for path, row in unseen if path in collected)
    if missing and not any("::" in argument for argument in config.args):
        raise pytest.UsageError(f"tests/support/core.py names what is no test: {', '.join(missing)}")


def pytest_collection_finish():
    gc.freeze()  # a million objects that stay: whoever looks for garbage need not look at them


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


@pytest.fixture(scope="session")
def stores(tmp_path_factory):
    """Directories, each of which is made when something is stored there."""
    root = tmp_path_factory.mktemp("stores")
    return (root / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def own_store(stores, monkeypatch):
    """Every test tunes into its own directory, with a small budget, and forgets what it learnt."""
    store = next(stores)
    for name in [n for n in os.environ if n.startswith("FASTATTN_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(store))
    monkeypatch.setattr(
        cpu_contention, "read_cpu_usage", lambda: None
    )  # what else runs on the machine has no say in a test
    reload_settings()
    fastattn.clear()
    session.tuning_s = 0.0
    log.setLevel("NOTSET")
    log.handlers.clear()
    torch.default_generator.manual_seed(0)  # torch.manual_seed formats the stack for a GPU: 1 ms a test
    before = torch.nn.functional.scaled_dot_product_attention
    yield store
    assert torch.nn.functional.scaled_dot_product_attention is before, "a test left F.sdpa patched"
    reload_settings()
    fastattn.clear()


@pytest.fixture(autouse=True)
def quicker_torch(request, monkeypatch):
    """What torch does for each new graph and is not asked for here.

    Outside of compiled code flex_attention sends itself through Dynamo, a second for each new shape, only to run the same
    operators in eager code. Here it runs them at once; the tests of flex itself let it do as it does for users. And Dynamo
    flushes the caches of the CPU to time its own guards, for a log.
    """
    flex = sys.modules.get("torch.nn.attention.flex_attention")
    if flex is not None and request.path.name != "test_flex.py":
        monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)
    if guards := sys.modules.get("torch._dynamo.guards"):
        monkeypatch.setattr(guards, "profile_guard_manager", lambda *_: 0.0, raising=False)


@pytest.fixture
def untuned():
    """Nothing is timed: the default serves. For tests of semantics, where speed has no say."""
    with fastattn.options(mode="cached"):
        yield


@pytest.fixture(scope="module")
def one_thread():
    """torch works in one thread: for small tensors, where waiting for a second one takes longer than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
