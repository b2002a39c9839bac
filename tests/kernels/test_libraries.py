"""Every kernel library's adapter against a stub with that library's own signature and semantics: no GPU is needed.

The grid is one table of calls. A kernel does a call rightly, by float64, or refuses it; which it refuses is listed beside its
stub. The mutation run breaks each adapter in every convention that it keeps, and must see the grid turn red.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import replace

import pytest
import stubs
import torch
from building import problem_of, qkv
from library_grid import (
    EACH,
    MUTATIONS,
    STUBS,
    broken,
    calls_of,
    find_killer,
    forget,
    installed,
    is_red,
    known_killers,
    row_of,
    rows_of,
    run,
    silicon,
    sizes_for,
)
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn.environment.settings import Settings
from fastattn.kernels.libraries import availability
from fastattn.planning import binding, candidates

pytestmark = pytest.mark.usefixtures("one_thread")  # stand-ins compute here, for a made-up GPU
KILLERS = known_killers()  # mutation -> the kernel and the case that turn red
FIND = "run python tests/support/find_killers.py"


@pytest.mark.parametrize("stub, name", EACH)
def test_every_call_of_the_grid_is_right_or_refused_as_listed(stub, name, monkeypatch):
    refused = {}
    with installed(stub, monkeypatch):
        for case, call in calls_of(stub, row_of(stub, name)).items():
            try:
                reasons = run(row_of(stub, name), stub, call)
            except Exception as error:
                raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
            if reasons:
                refused[case] = reasons
    listed = set(stub.refuses.get(name, "").split())
    assert set(refused) == listed, {case: refused.get(case) for case in set(refused) ^ listed}
    assert all(reason and "not installed" not in reason for reasons in refused.values() for reason in reasons), refused


@pytest.mark.parametrize("stub, name", EACH)
def test_every_dtype_is_right(stub, name, monkeypatch):
    with installed(stub, monkeypatch):
        for dtype in row_of(stub, name).dtypes:
            assert run(row_of(stub, name), stub, {"is_causal": True}, getattr(torch, dtype)) == []


class Copies(TorchDispatchMode):
    """Names every copy that is made outside the library itself."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not stubs.is_inside() and func.overloadpacket.__name__ in ("clone", "contiguous", "_to_copy", "copy_"):
            self.made.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize("stub, name", EACH)
def test_nothing_is_copied_where_the_library_takes_strides(stub, name, layout, monkeypatch):
    kernel = row_of(stub, name)
    made = {"dtype": getattr(torch, kernel.dtypes[0]), **sizes_for(kernel), **stub.sizes}
    made |= {"layout": layout, "memory": "transposed"}
    q, k, v = qkv(**made)
    options = {"accuracy": 0.5} if kernel.approximate else {}
    with installed(stub, monkeypatch):
        p = problem_of(q, k, v, None, layout, **options).replace(device=kernel.devices[0], threads=0)
        found = candidates.decide(kernel, p, silicon(stub, name), Settings(kernels=(f"+{name}",)))
        assert found[0].name == name, "a plain call needs no conversion"
        call = binding.bind(found[0], p, None)
        with Copies() as copies:
            call(q, k, v, None)
    assert bool(copies.made) is (name in stub.copies), copies.made


# --- the mutation run


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_convention_turns_the_grid_red(mutation, monkeypatch):
    """The call that killers.json names is tried first, the whole grid where it is not red."""
    stub, text, other = MUTATIONS[mutation]
    with installed(stub, monkeypatch):
        kernels = broken(stub, text, other)
        kernel, case = KILLERS.get(mutation, ("", ""))
        if any(is_red(row, stub, case) for row in kernels if row.name == kernel):
            return
        found = find_killer(stub, kernels)
    assert found, "no call of the grid turns red"
    warnings.warn(f"{mutation} is killed by {found}, which killers.json does not say: {FIND}", stacklevel=1)


def test_nothing_is_red_while_nothing_is_broken(monkeypatch):
    """Else the mutations would be killed by whatever is wrong anyhow: every call that kills is green with the adapter whole."""
    for stub in STUBS:
        calls = {KILLERS[name] for name, (its, *_) in MUTATIONS.items() if its is stub and name in KILLERS}
        with installed(stub, monkeypatch):
            red = [
                (row.name, case)
                for row in rows_of(stub)
                for kernel, case in calls
                if row.name == kernel and is_red(row, stub, case)
            ]
        assert not red


# --- what is told to the library beyond numbers


@pytest.mark.parametrize("stub, name", EACH)
def test_fault_15_determinism_is_asked_for_or_refused(stub, name, monkeypatch):
    """In torch's deterministic mode a kernel's own switch is set, and a kernel that is never deterministic is refused."""
    kernel = row_of(stub, name)
    if not kernel.grad:
        pytest.skip("no backward")
    q, k, v = qkv(dtype=getattr(torch, kernel.dtypes[0]), grad=True, **{**sizes_for(kernel), **stub.sizes})
    with installed(stub, monkeypatch):
        p = problem_of(q, k, v).replace(device=kernel.devices[0], threads=0, deterministic=True)
        found = candidates.decide(kernel, p, silicon(stub, name), Settings(kernels=(f"+{name}",)))
        if not kernel.deterministic:
            assert "not deterministic, and torch.use_deterministic_algorithms is on" in found[0].reasons
            return
        stubs.calls.clear()
        binding.bind(found[0], p, None)(q, k, v, None)
        told = stubs.calls[-1][1]
        assert told.get("deterministic", True) is True


# --- found without importing


def test_a_library_that_is_not_there_is_a_reason():
    forget()
    for stub in STUBS:
        for kernel in rows_of(stub):
            if kernel.library != "torch" and availability.library_version(kernel.library) is None:
                assert availability.why_unavailable(kernel) == f"package {kernel.library} is not installed"


@pytest.mark.parametrize("stub, name", EACH)
def test_a_version_that_is_too_old_or_too_new_is_refused_with_both_numbers(stub, name, monkeypatch):
    kernel = row_of(stub, name)
    first, last = kernel.versions
    if kernel.library == "torch" or not (first or last):
        pytest.skip("any version")
    for bad in filter(None, (first and "0.0.1", last)):
        with installed(replace(stub, version=bad), monkeypatch):
            reason = availability.why_unavailable(kernel)
            assert reason and bad in reason and re.search(r"\d", reason.replace(bad, "", 1)), reason
