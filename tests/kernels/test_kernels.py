"""THE TABLE: one row per kernel, what it accepts and what it refuses, word for word. docs/adding-a-kernel.md."""

from __future__ import annotations

from dataclasses import replace

import pytest
from building import CPU
from fakes import problem
from kernel_table import (
    H100,
    TABLE,
    check_case,
    check_table,
)

from fastattn.environment.settings import Settings
from fastattn.kernels import registry
from fastattn.kernels.limits import Range
from fastattn.planning import candidates
from fastattn.planning.decision import Accepted, Rejected


def test_the_fixed_order_names_the_adapters_of_each_kernel():
    """Else a stored verdict would not find its winner."""
    for name in registry.ORDER:
        assert registry._shipped_as(name) == tuple(row for row in registry._shipped() if row.name == name) != ()


def test_every_kernel_has_a_row_and_every_row_a_kernel():
    check_table()


@pytest.mark.parametrize("case", TABLE, ids=lambda c: f"{c.name} on {c.device}")
def test_a_kernel_accepts_and_refuses_what_the_table_says(case):
    check_case(case)


def test_an_unknown_library_a_foreign_device_and_a_closed_list_are_reasons():
    kernel = registry.rows()[1].replace(name="elsewhere", library="no-such-library", devices=("cuda",))
    [found] = candidates.decide(kernel, problem(), CPU, Settings())
    assert found.reasons == ("needs cuda, this device is cpu",)
    [found] = candidates.decide(kernel, problem(device="cuda"), H100, Settings(kernels=("matmul",)))
    assert found.reasons[0] == "excluded by options: kernels matmul"
    assert "package no-such-library is not installed" in found.reasons


# --- limits, beside what test_boundaries.py finds in the rows themselves


def test_the_edges_of_a_range_are_just_that():
    assert Range("kv_len", min=1).edges() == ([1], [0])
    assert Range("head_dim", max=128, multiple_of=8).edges() == ([128], [136, 9])
    assert Range("capability", min=80, max=121).edges() == ([80, 121], [79, 122])


def test_limits_written_out_name_both_numbers():
    sm86 = replace(H100, capability=86)
    texts = {
        "torch_flash": "training with head dims 200 and 200, dropout False, on sm86"
        " (86 to 89, 120 and 121 take up to 192, or over 224 without dropout)",
        "torch_efficient": "wrong with a mask or causal and q_len > 65536 (https://github.com/pytorch/pytorch/issues/162588)",
    }
    p = problem(device="cuda", dtype="float16", head_dim=200, needs_grad=True, q_len=70_000, causal="top_left")
    reasons = {d.name: d.reasons for d in candidates.decisions(p, sm86, Settings()) if isinstance(d, Rejected)}
    assert all(text in reasons[name] for name, text in texts.items()), reasons
    p = p.replace(head_dim=192, head_dim_v=192, q_len=65_536, kv_len=65_536)
    found = candidates.decisions(p, sm86, Settings())
    assert set(texts) <= {d.kernel.name for d in found if isinstance(d, Accepted)}


def test_every_reason_in_the_table_names_what_it_met():
    """A number or a name from the problem, beside the limit; words alone only where the kernel cannot do a thing at all."""
    whole = ("gradients are", "a gradient for", "causal is", "not deterministic", "switched off", "needs ",
             "dropout is", "return_lse: ", "a BlockMask is", "a score_mod is")  # fmt: skip
    for case in TABLE:
        for reason, changes in case.refuses.items():
            met = {f"{v:g}" if isinstance(v, float) else str(v) for v in changes.values()} | {"float32", "64", "70"}
            assert reason.startswith(whole) or any(word.strip("(),") in met for word in reason.split()), reason
