"""Faults 47, 50 and 56 of reference/faults.md: graph capture, servers that must be ready, downloads."""

from __future__ import annotations

import ast
import builtins
import io
import os
import socket
import tempfile
from pathlib import Path

import children
import pytest
import torch
from fakes import FAST, Clock, add, check, honest, made_up, problem, qkv, turn

import fastattn
from fastattn.dispatch import resolve, tune_now
from fastattn.dispatch.attention import entries
from fastattn.dispatch.circumstances import read_circumstances
from fastattn.dispatch.entries import drop_all
from fastattn.dispatch.session import session
from fastattn.environment.settings import reload_settings
from fastattn.tuning import screening
from fastattn.tuning import tune as tune_module

F_sdpa = torch.nn.functional.scaled_dot_product_attention
SOURCE = Path(fastattn.__file__).parent


@pytest.fixture
def quick(monkeypatch):
    """A kernel that wins wherever it is timed; the clock that says so."""
    add(monkeypatch, made_up("quick", honest))
    return turn(monkeypatch, Clock({"default": 4e-3, "quick": FAST}))


def forbid(monkeypatch, *calls):
    """Any of these (object, name) fails the test."""
    for owner, name in calls:
        monkeypatch.setattr(owner, name, lambda *_, name=name, **__: pytest.fail(f"called {name}"))


TUNING = [
    (tune_now, "tune_and_keep"),
    (tune_now, "tune_problem"),
    (tune_module, "time_interleaved"),
    (screening, "judges_of_problem"),
    (screening, "plain_sample"),
]

# --- fault 47: a CUDA graph is being captured

DISTURBING = [(torch.cuda, "synchronize"), (torch.cuda, "Event"), (torch.cuda, "empty_cache"), (torch.cuda, "mem_get_info"),
              (builtins, "open"), (io, "open"), (os, "open"), (os, "scandir"), (tempfile, "mkstemp"), *TUNING]  # fmt: skip


@pytest.fixture
def capture(monkeypatch):
    """capture(): from then on a CUDA graph is being captured."""
    real = read_circumstances

    def start():
        drop_all()
        monkeypatch.setattr(resolve, "read_circumstances", lambda *given: real(*given)._replace(capturing=True))
        forbid(monkeypatch, *DISTURBING)

    return start


def test_fault_47_a_capture_is_served_by_what_was_met_before_it(quick, capture):
    """While a CUDA graph is captured nothing is tuned, synchronised or read: what was met before serves."""
    q, k, v = qkv(48)
    check(q, k, v)
    ran = quick.ran.count("quick")
    capture()
    fastattn.attention(q, k, v)
    assert quick.ran.count("quick") == ran + 1
    assert not entries.table, "what was bound in a capture must not outlive it"


@pytest.mark.parametrize("known", ["unknown", "on disk"])
def test_fault_47_anything_else_gets_the_default_without_a_file_a_clock_or_a_sync(known, quick, capture, caplog):
    fastattn.attention(*qkv(40))  # the process is warm
    q, k, v = qkv(48)
    if known == "on disk":
        fastattn.attention(q, k, v)
        fastattn.clear()
    capture()
    ran = quick.ran.count("quick")
    assert torch.equal(fastattn.attention(q, k, v), F_sdpa(q, k, v))
    assert quick.ran.count("quick") == ran
    assert len(session.misses) == 1 and "being captured" in caplog.text


def test_fault_47_after_the_capture_it_is_tuned(quick, monkeypatch):
    q, k, v = qkv(48)
    real = read_circumstances
    with monkeypatch.context() as patch:
        patch.setattr(resolve, "read_circumstances", lambda *given: real(*given)._replace(capturing=True))
        fastattn.attention(q, k, v)
    fastattn.attention(q, k, v)
    assert fastattn.explain(q, k, v).served_by == "quick"


# --- fault 50: a server that must be ready


def test_fault_50_cached_mode_tunes_nothing_whatever_it_meets(monkeypatch):
    """In cached mode nothing is ever tuned, whatever a server meets."""
    forbid(monkeypatch, *TUNING)
    monkeypatch.setenv("FASTATTN_MODE", "cached")
    reload_settings()
    for n in (1, 7, 64):
        for grad in (False, True):
            q, k, v = qkv(n, 64, heads=4, kv_heads=2, grad=grad)
            check(q, k, v)
            check(q, k, v, torch.rand(n, 64) > 0.2)
        with fastattn.patch():
            F_sdpa(*qkv(n, 64))
            torch.nn.functional.scaled_dot_product_attention(*qkv(n, 65))
    assert session.misses and session.tuning_s == 0


def test_fault_50_cached_mode_serves_what_was_tuned_ahead(quick, monkeypatch):
    q, k, v = qkv(48)
    fastattn.tune(fastattn.explain(q, k, v).problem)
    fastattn.clear()
    forbid(monkeypatch, *TUNING)
    with fastattn.options(mode="cached"):
        check(q, k, v)
        assert fastattn.explain(q, k, v).served_by == "quick" and not session.misses


def test_fault_50_ahead_of_time_tuning_says_how_far_it_is(quick):
    steps = []
    problems = [problem(), problem(q_len=80, kv_len=80)]
    fastattn.tune(problems, progress=lambda *step: steps.append(step))
    assert list(dict.fromkeys(p for p, *_ in steps)) == problems
    for p in problems:
        mine = [(index, count) for each, _, index, count in steps if each == p]
        assert [index for index, _ in mine] == list(range(1, len(mine) + 1))
        assert {count for _, count in mine} == {len(mine) + 1}  # the incumbent is one more


# --- fault 56: nothing is downloaded, built or loaded by a name from elsewhere

OFFLINE = """
import sys, torch
seen = []
WATCHED = ("socket.connect", "socket.getaddrinfo", "socket.bind", "urllib.Request", "subprocess.Popen", "os.system",
           "os.exec", "os.posix_spawn", "ftplib.connect", "http.client.connect")
sys.addaudithook(lambda event, args: seen.append((event, args)) if event in WATCHED else None)
import fastattn
q = torch.randn(1, 2, 24, 16)
fastattn.attention(q, q, q)
fastattn.explain(q, q, q, tune=True)
fastattn.tune(fastattn.explain(q, q, q, is_causal=True).problem)
with fastattn.patch():
    torch.nn.functional.scaled_dot_product_attention(q, q, q)
assert not seen, seen
"""


def test_fault_56_nobody_is_called_from_import_to_patch(tmp_path):
    """No other machine is called, from import to patch()."""
    done = children.run(OFFLINE, env={"FASTATTN_CACHE_DIR": str(tmp_path / "store")})
    assert done.returncode == 0, done.stderr


FOREIGN = {"urllib", "http", "ftplib", "socket", "requests", "httpx", "aiohttp", "huggingface_hub", "pip", "ensurepip"}
FOREIGN_NAMES = {"entry_points", "get_kernel", "load_inline", "cpp_extension", "load_state_dict_from_url", "system"}


def reaches_out(source):
    """Names in a source that fetch, build, or load what somebody else registered."""
    for node in ast.walk(ast.parse(source)):
        names = [a.name for a in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from (n for n in names if n.split(".")[0] in FOREIGN or n.rpartition(".")[2] in FOREIGN_NAMES)
        whole = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if whole in ("torch.hub", "os.system") or whole.rpartition(".")[2] in FOREIGN_NAMES - {"system"}:
            yield node.attr


def test_fault_56_no_source_fetches_builds_or_asks_for_plugins():
    """Plugins are listed from their metadata, and loaded only where they are named: tests/test_plugins.py."""
    found = {(str(p.relative_to(SOURCE)), name) for p in SOURCE.rglob("*.py") for name in reaches_out(p.read_text())}
    assert found == {("kernels/registry.py", "entry_points")}


@pytest.mark.parametrize("bad", [
    "import urllib.request", "from huggingface_hub import hf_hub_download", "torch.hub.load(x)",
    "from kernels import get_kernel", "importlib.metadata.entry_points()", "torch.utils.cpp_extension.load(n)", "os.system(c)",
])  # fmt: skip
def test_fault_56_the_guard_would_see_it(bad):
    assert list(reaches_out(bad))


def test_fault_56_the_tests_themselves_reach_nobody():
    with socket.socket() as probe, pytest.raises(OSError, match="wants to reach"):
        probe.connect(("192.0.2.1", 80))
