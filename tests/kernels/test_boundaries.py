"""Every limit of every kernel, from the rows themselves: no GPU, no library.

A limit is where it is said to be: some problem is refused by it alone, and a neighbour, which differs in one field, is not
refused at all. So no limit is dead (hidden behind another of its row) and none is wider than it says. The problems that showed
it last are kept (support/limit_proofs.json) and tried first; where they show it no more, others are searched.
"""

from __future__ import annotations

import warnings

import pytest
from limit_space import Space, all_limits, find_proof, is_proof, known_proofs

LIMITS, PROOFS = all_limits(), known_proofs()


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_refuses_alone_and_its_neighbour_is_accepted(name, monkeypatch):
    kernel, kind, need = LIMITS[name]
    space = Space(kernel, kind, monkeypatch)
    if name in PROOFS and is_proof(space, need, PROOFS[name]):
        return
    warnings.warn(f"{name} has no proof any more: run python tests/support/find_limit_proofs.py", stacklevel=1)
    find_proof(space, need)
