"""A library that wins, serves the next process by what is stored, and is then gone: what its users see."""

from __future__ import annotations

from typing import Any

import torch
from fakes import DEFAULT, FAST, Clock, qkv, turn
from library_grid import installed

import fastattn
from fastattn.dispatch.session import session
from fastattn.kernels.libraries import availability, catalogue


def served(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> str:
    """Who serves a call, which is right."""
    out = fastattn.attention(q, k, v, **options)
    want = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), **options)
    assert (out - want).abs().max() < 1e-5
    return fastattn.explain(q, k, v, **options).served_by


def restart() -> None:
    """What a new process knows: nothing but what is on disk."""
    fastattn.clear()
    session.tuning_s = 0.0


def serves_until_uninstalled(stub: Any, name: str, package: str, monkeypatch: Any, caplog: Any, **options: Any) -> None:
    clock = turn(monkeypatch, Clock({"default": DEFAULT, name: FAST}))
    q, k, v = qkv(64)
    with monkeypatch.context() as patch, installed(stub, patch):
        assert served(q, k, v, **options) == name
        timed = list(clock.timed)
        restart()
        assert served(q, k, v, **options) == name and clock.timed == timed, "nothing is timed again"
    monkeypatch.setattr(catalogue, "installed_distribution", lambda _: None)
    availability.forget_libraries()
    restart()
    caplog.clear()
    assert served(q, k, v, **options) != name
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    [row] = [t for t in fastattn.explain(q, k, v, **options).rows if t.candidate == name]
    assert row.reason == f"package {package} is not installed"
