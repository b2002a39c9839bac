"""Fault 83 of reference/faults2.md: memory that is short for the copies of a winner, and not for the default."""

from __future__ import annotations

import json
import logging
import weakref
from pathlib import Path

import children
import pytest
import torch
from fakes import FAST, Clock, add, check, honest, made_up, qkv, turn

import fastattn

F_sdpa = torch.nn.functional.scaled_dot_product_attention
SHORT = {
    "torch": (
        RuntimeError,
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: 9",
    ),
    "torch on Windows": (RuntimeError, "[enforce fail at alloc_cpu.cpp:115] DefaultCPUAllocator: not enough memory"),
    "C++": (RuntimeError, "std::bad_alloc"),
    "Python": (MemoryError, ""),
}


class Hungry:
    """Right, and by far the fastest; while `error` is set it holds a copy and then finds no memory."""

    def __init__(self):
        self.error, self.calls, self.held = None, 0, []

    def __call__(self, q, k, v, mask, a):
        self.calls += 1
        if self.error is not None:
            copy = q.float().clone()
            self.held.append(weakref.ref(copy))
            kind, text = self.error
            raise kind(text)
        return honest(q, k, v, mask, a)


@pytest.fixture
def hungry(monkeypatch):
    kernel = Hungry()
    add(monkeypatch, made_up("hungry", kernel))
    turn(monkeypatch, Clock({"default": 4e-3, "hungry": FAST}))
    return kernel


def doors(q, k, v):
    plan = fastattn.plan(q, k, v)
    return {"attention": fastattn.attention, "sdpa": fastattn.sdpa, "plan": plan}


@pytest.mark.parametrize("door", ["attention", "sdpa", "plan"])
@pytest.mark.parametrize("short", SHORT)
def test_fault_83_a_winner_without_memory_on_the_cpu_gives_way_to_the_default(short, door, hungry, own_store, caplog):
    """Where memory is too short for a winner's copies on the CPU the default answers that call, and nobody is demoted."""
    q, k, v = qkv(64)
    call = doors(q, k, v)[door]
    for _ in range(3):
        call(q, k, v)  # the last is a hit
    hungry.error = SHORT[short]
    with caplog.at_level(logging.WARNING, "fastattn"):
        for _ in range(3):
            assert torch.equal(call(q, k, v), F_sdpa(q, k, v))
    assert not caplog.records and not fastattn.stats()["demoted"]
    assert not [ref for ref in hungry.held if ref() is not None], "nothing of it is kept"
    hungry.error, calls = None, hungry.calls
    call(q, k, v)
    assert hungry.calls == calls + 1, "there is memory again: it serves again"
    fastattn.clear()
    assert fastattn.explain(q, k, v).served_by == "hungry"
    [file] = own_store.rglob("v*/*/*.json")
    assert "demoted" not in json.dumps(json.loads(file.read_text()))


def test_fault_83_what_it_held_is_free_before_the_default_runs(hungry, monkeypatch):
    from fastattn.planning import binding

    q, k, v = qkv(64)
    check(q, k, v)
    hungry.error = SHORT["torch"]
    real, alive = binding.sdpa, []

    def sdpa(*given, **named):
        alive.append([ref() for ref in hungry.held])
        return real(*given, **named)

    monkeypatch.setattr(binding, "sdpa", sdpa)
    assert torch.equal(fastattn.attention(q, k, v), F_sdpa(q, k, v))
    assert alive == [[None]]


def test_fault_83_training_goes_on(hungry):
    q, k, v = qkv(64, grad=True)
    check(q, k, v)
    hungry.error = SHORT["torch"]
    check(q, k, v)
    fastattn.attention(q, k, v).sum().backward()
    assert all(x.grad is not None for x in (q, k, v)) and not fastattn.stats()["demoted"]


def test_fault_83_where_the_default_has_none_either_its_error_is_raised(hungry, monkeypatch):
    from fastattn.planning import binding

    q, k, v = qkv(64)
    check(q, k, v)
    hungry.error = SHORT["torch"]

    def sdpa(*given, **named):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory, says the default")

    monkeypatch.setattr(binding, "sdpa", sdpa)
    with pytest.raises(RuntimeError, match="says the default"):
        fastattn.attention(q, k, v)
    assert not fastattn.stats()["demoted"]


def test_fault_83_another_candidate_without_memory_gives_way_too(hungry, monkeypatch):
    """The winner is broken, and the next one finds no memory: the default answers; the winner alone is demoted."""
    broken = []

    def run(*given):
        if broken:
            raise RuntimeError("broken")
        return honest(*given)

    add(monkeypatch, made_up("broken", run))
    turn(monkeypatch, Clock({"default": 4e-3, "hungry": 2e-3, "broken": FAST}))
    q, k, v = qkv(64)
    fastattn.attention(q, k, v)
    assert fastattn.explain(q, k, v).served_by == "broken"
    broken.append(1)
    hungry.error = SHORT["torch"]
    assert torch.equal(fastattn.attention(q, k, v), F_sdpa(q, k, v))
    assert [name.split()[0] for name in fastattn.stats()["demoted"]] == ["broken"]


def test_fault_83_an_order_is_an_order(hungry):
    hungry.error = SHORT["torch"]
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        fastattn.attention(*qkv(64), kernel="hungry")


def test_fault_83_cudas_memory_is_not_ours_to_save(hungry):
    q, k, v = qkv(64)
    check(q, k, v)
    hungry.error = (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 3 GiB")
    with pytest.raises(torch.OutOfMemoryError):
        fastattn.attention(q, k, v)


SCRIPT = """
import logging, resource, sys
logging.basicConfig(level="INFO", stream=sys.stdout, format="%(message)s")
import torch, fastattn
from stored import verdict
from fastattn.dispatch.session import session
from fastattn.environment.device import Device
from fastattn.environment.settings import current_settings

torch.set_num_threads(1)
fastattn.options(mode="cached")
q, k, v = (torch.randn(1, 8, n, 64, generator=torch.Generator().manual_seed(n)).half() for n in (1, 65536, 65536))
problem = fastattn.explain(q, k, v).problem.bucketed("kv")
session.store(current_settings()).put(verdict(problem, "{winner}"), Device.of(q.device))
fastattn.clear()
for _ in range(3):
    fastattn.attention(q, k, v)
hits, served = fastattn.stats()["hits"], fastattn.explain(q, k, v).served_by
assert served == "{winner}" and hits, (served, hits)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**21, resource.RLIM_INFINITY))
out = fastattn.attention(q, k, v)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))
assert fastattn.explain(q, k, v).served_by == "{winner}" and not fastattn.stats()["demoted"]
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc here")
@pytest.mark.parametrize("winner", ["torch_flash+fp32", pytest.param("matmul+fp32", marks=pytest.mark.long)])
def test_fault_83_a_real_copy_under_a_real_limit(winner):
    done = children.run(SCRIPT.format(winner=winner), env={"PYTHONPATH": children.PATH})
    assert done.returncode == 0, done.stderr
    assert f"kernel {winner} found no memory on" in done.stdout and done.stdout.count("default answered") == 1
