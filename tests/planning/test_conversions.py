"""The rows of the conversions: what a row does not concern, its file would refuse as well."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from building import CPU
from limit_space import Space

from fastattn.environment.device import Device
from fastattn.kernels import registry
from fastattn.kernels.kernel import Kernel
from fastattn.planning.conversions import CONVERSIONS
from fastattn.planning.conversions.conversion import NO
from fastattn.problems.call_facts import CallFacts, ordinary_facts
from fastattn.problems.problem import Problem

DRAWS = 60  # problems of each kernel on each of its devices, beside
RARE = (
    {"q_len": 600, "kv_len": 600, "structure": "Document(8)", "mask": "bool", "mask_shape": "11qk"},
    {"q_len": 1, "kv_len": 600, "q_heads": 1, "kv_heads": 1},
    {"q_len": 1, "kv_len": 600, "kept": True},
)
STRIDES = (("contiguous",) * 3, ("transposed",) * 3, ("other", "contiguous", "expanded"))
FACTS = {"aligned": (True, True, False), "aligned_rows": (False, True, True)}


@pytest.fixture(scope="module")
def asked() -> list[tuple[Kernel, Problem, CallFacts]]:
    """Problems at random that classify() could have made, ordinary ones and such as lie askew, for every kernel."""
    rng, found = random.Random(0), []
    with pytest.MonkeyPatch.context() as monkeypatch:
        for kernel, kind in ((kernel, kind) for kernel in registry.rows() for kind in kernel.devices):
            space = Space(kernel, kind, monkeypatch)
            for at in range(DRAWS):
                point = {"dtype": rng.choice(kernel.dtypes)}
                for _ in range(at % 10 if at >= len(RARE) else 0):
                    stepped = space.step(rng, point)
                    point = stepped if space.is_reachable(stepped) else point
                point |= RARE[at] if at < len(RARE) else {}
                p = space.at(point)[0].replace(strides=STRIDES[at % 3], threads=4)
                facts = ordinary_facts(p)
                found.append((kernel, p, facts._replace(**FACTS) if at % 2 else facts))
    return found


@pytest.fixture
def amx(monkeypatch):
    """A CPU that has AMX, for all that fastattn knows."""
    made_up = replace(CPU, name=f"{CPU.name} amx_bf16")
    monkeypatch.setattr(Device, "of", staticmethod(lambda device: made_up))


@pytest.mark.parametrize("row", CONVERSIONS, ids=lambda row: row.name)
def test_what_a_row_does_not_concern_its_file_refuses(row, asked, amx):
    """Else a problem would lose a candidate, or a kernel its reason."""
    file = row._replace(concerns=lambda kernel, p: True)
    for kernel, p, facts in asked:
        if not row.concerns(kernel, p):
            assert file.when(kernel, p, facts) == NO, f"{kernel.name} on {p}"
    assert {NO} < {file.when(*given) for given in asked}, "no problem was drawn to which it applies"
