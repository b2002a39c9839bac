"""torch.nn.attention.varlen over torch's versions: 2.11 has no enable_gqa, and later ones are told of it where heads differ."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
from building import problem_of, qkv
from library_grid import installed, row_of
from stubs import module, torch_varlen

from fastattn.environment.device import Device
from fastattn.environment.settings import Settings
from fastattn.kernels.kernel import Arguments
from fastattn.planning import candidates
from fastattn.planning.decision import Accepted
from fastattn.problems.masks.unread import Sequences

NEW = ("enable_gqa", "seqused_k", "block_table", "num_splits")  # parameters that torch 2.11's function lacks


@pytest.fixture
def varlen(monkeypatch):
    """varlen(is_old): torch's function, the calls of which are noted, of torch 2.11 or of a later one."""
    told = []

    def install(is_old):
        def varlen_attn(**given):
            signature.bind(**given)
            told.append(given)
            return real(**given)

        signature = inspect.signature(torch_varlen.varlen_attn)
        if is_old:
            kept = [p for name, p in signature.parameters.items() if name not in NEW]
            signature = signature.replace(parameters=kept)
        varlen_attn.__signature__ = signature
        name = "torch.nn.attention.varlen"
        monkeypatch.setitem(sys.modules, name, module(name, varlen_attn=varlen_attn, AuxRequest=request))
        return told

    with installed(torch_varlen.STUB, monkeypatch):
        stub = sys.modules["torch.nn.attention.varlen"]
        real, request = stub.varlen_attn, stub.AuxRequest
        yield install


@pytest.mark.parametrize("is_old", [True, False])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
def test_enable_gqa_is_said_where_heads_differ(is_old, heads, varlen):
    told = varlen(is_old)
    q, k, v = (x.transpose(1, 2) for x in qkv(hq=heads[0], hkv=heads[1], d=64, dtype=torch.bfloat16))
    run = row_of(torch_varlen.STUB, "torch_varlen").load()
    if is_old and heads[0] != heads[1]:
        with pytest.raises(TypeError, match="enable_gqa"):
            run(q, k, v, None, Arguments(0.125))
        return
    assert run(q, k, v, None, Arguments(0.125)).shape == q.shape
    assert told[-1].get("enable_gqa") is (True if heads[0] != heads[1] else None)


@pytest.mark.parametrize("is_old", [True, False])
@pytest.mark.parametrize("most", [1, 5])
def test_packed_sequences_keep_torch_from_cudnn_and_from_taking_tokens_for_sequences(is_old, most, varlen):
    """Where it has the parameter that does so; with max_q 1 and groups it takes token i for sequence i."""
    told = varlen(is_old)
    q, k, v = (torch.randn(1, 5, 4, 64, dtype=torch.bfloat16) for _ in range(3))
    cu = torch.tensor([0, 1, 2, 3, 4, 5] if most == 1 else [0, 5], dtype=torch.int32)
    run = row_of(torch_varlen.STUB, "torch_varlen").load_packed()
    found = run(q, k, v, None, Arguments(0.125, packed=Sequences(cu, cu, most, most)))
    assert found.shape == q.shape and told[-1]["max_q"] == max(2, most) and told[-1]["max_k"] == most
    assert told[-1].get("enable_gqa") is (None if is_old else True)


@pytest.mark.parametrize(("version", "heads", "can"), [
    ("2.11.0+cu130", (4, 4), True), ("2.11.0", (8, 2), False), ("2.12.0", (8, 2), True), ("2.15.0", (8, 2), True),
])  # fmt: skip
def test_groups_are_refused_where_torch_cannot_be_told_of_them(version, heads, can, varlen):
    varlen(True)
    q, k, v = qkv(hq=heads[0], hkv=heads[1], d=64, dtype=torch.bfloat16)
    p = problem_of(q, k, v).replace(device="cuda", threads=0)
    device = Device("cuda", "made-up H100", 90, torch=version, cuda="12.8", cudnn=92300)
    [found] = candidates.decide(row_of(torch_varlen.STUB, "torch_varlen"), p, device, Settings())
    assert isinstance(found, Accepted) is can
    if not can:
        assert found.reasons == ("8 heads and 2 kv heads with torch 2.11.0 < 2.12",)


def test_it_is_imported_before_its_first_run_is_timed():
    row = row_of(torch_varlen.STUB, "torch_varlen")
    assert row.prepare is not None and callable(row.prepare()[0])


@pytest.mark.parametrize("is_old", [True, False])
def test_a_cache_needs_a_torch_that_can_be_told_how_much_is_used(is_old, varlen):
    varlen(is_old)
    q, k, v = (torch.randn(2, n, 4, 64, dtype=torch.bfloat16) for n in (1, 9, 9))
    run = row_of(torch_varlen.STUB, "torch_varlen").load_cached()
    told = Arguments(0.125, kv_lens=torch.tensor([9, 4], dtype=torch.int32))
    if is_old:
        with pytest.raises(
            ImportError, match="its varlen_attn takes no seqused_k, enable_gqa: another version is needed"
        ):
            run(q, k, v, None, told)
        return
    assert run(q, k, v, None, told).shape == q.shape
