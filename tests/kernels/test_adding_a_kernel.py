"""docs/adding-a-kernel.md is carried out as it is written: one file, one row of the table."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import kernel_table
import pytest
import torch
from fakes import FAST, Clock, check, qkv, row, turn

import fastattn
from fastattn.kernels import adapters, registry

PAGE = (Path(__file__).parents[2] / "docs" / "adding-a-kernel.md").read_text(encoding="utf-8")
FILE, CASE, LOOK = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The page's file, put where the package finds its kernels."""
    (tmp_path / "toy.py").write_text(FILE, encoding="utf-8")
    monkeypatch.setattr(adapters, "__path__", [*adapters.__path__, str(tmp_path)])
    registry._shipped.cache_clear()
    registry._shipped_as.cache_clear()
    yield
    monkeypatch.undo()
    registry._shipped.cache_clear()
    registry._shipped_as.cache_clear()
    sys.modules.pop("fastattn.kernels.adapters.toy", None)
    if hasattr(adapters, "toy"):
        del adapters.toy


def test_without_the_file_there_is_no_toy():
    assert "toy" not in registry.names()


def test_the_file_alone_makes_it_known(toy):
    assert "toy" in registry.names()
    assert row("toy", *qkv(64)).reason is None
    assert row("toy", *qkv(64), is_causal=True).reason == "causal is not supported"


def test_the_pages_row_holds(toy):
    case = eval(CASE, vars(kernel_table).copy())
    assert case.name == "toy" and case.accepts and case.refuses
    kernel_table.check_case(case)


def test_the_table_asks_for_the_row(toy):
    with pytest.raises(AssertionError):
        kernel_table.check_table()
    kernel_table.TABLE.append(eval(CASE, vars(kernel_table).copy()))
    try:
        kernel_table.check_table()
    finally:
        kernel_table.TABLE.pop()


@pytest.mark.parametrize("grad", [False, True])
def test_it_is_verified_and_timed(toy, monkeypatch, grad):
    turn(monkeypatch, Clock({"default": 4e-3, "toy": FAST}))
    trial = row("toy", *qkv(64, grad=grad), tune=True)
    assert trial.time_us == pytest.approx(FAST * 1e6)
    assert 0 < trial.forward <= 1 and (trial.backward is not None) == grad


def test_it_wins_where_it_is_the_fastest(toy, monkeypatch):
    turn(monkeypatch, Clock({"default": 4e-3, "toy": FAST}))
    q, k, v = qkv(64)
    check(q, k, v)
    assert fastattn.explain(q, k, v).served_by == "toy"
    q, k, v = qkv(64, heads=8, kv_heads=2)
    check(q, k, v)
    assert fastattn.explain(q, k, v).served_by == "toy+gqa_expand"


def test_an_order_runs_or_raises_with_the_reason(toy):
    q, k, v = qkv(64)
    check(q, k, v, kernel="toy")
    with pytest.raises(fastattn.NoKernelError, match=r"head_dim 72 > 64"):
        fastattn.attention(*qkv(64, head_dim=72), kernel="toy")


def test_the_pages_last_lines_run(toy, capsys):
    q, k, v = qkv(64)
    scope = {"fastattn": fastattn, "q": q, "k": k, "v": v}
    exec(LOOK, scope)
    assert "toy" in capsys.readouterr().out
    torch.testing.assert_close(scope["out"], torch.nn.functional.scaled_dot_product_attention(q, k, v))
