"""Kernels of the Hugging Face hub: only where they are named, only what the local cache has, never a download."""

from __future__ import annotations

import os

import pytest
import stubs
import torch
from building import problem_of, qkv
from library_grid import forget, installed, row_of, silicon
from stubs import hf_kernels as stub

from fastattn.environment.settings import Settings
from fastattn.kernels import registry
from fastattn.kernels.adapters import flash_attn_2, flash_attn_4, hf_kernels
from fastattn.kernels.libraries import availability
from fastattn.planning import candidates
from fastattn.planning.decision import Accepted

FLASH_2 = "kernels-community/flash-attn2"


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache of the hub, with `kernels` installed."""
    with installed(stub.STUB, monkeypatch):
        monkeypatch.setenv("KERNELS_CACHE", str(tmp_path))
        stubs.calls.clear()
        yield tmp_path


def loaded() -> list[str]:
    """What hf_flash_attn_2 loads: the commits in turn."""
    stubs.calls.clear()
    forget()
    reason = availability.why_unavailable(row_of(stub.STUB, "hf_flash_attn_2"))
    commits = [told["repo_path"].name for name, told in stubs.calls if name == "get_local_kernel"]
    return [*commits, *([reason] if reason else [])]


def test_they_are_considered_only_where_they_are_named(monkeypatch):
    with installed(stub.STUB, monkeypatch):
        stubs.calls.clear()
        p = problem_of(*qkv(d=64, dtype=torch.float16), accuracy=0.5).replace(device="cuda", threads=0)
        for row in hf_kernels.KERNELS:
            assert row.opt_in and row.name in registry.names()
            [unnamed] = candidates.decide(row, p, silicon(stub.STUB, row.name), Settings())
            assert "considered only where it is named" in unnamed.reasons[0]
        assert not stubs.calls
        for row in hf_kernels.KERNELS:
            named = Settings(kernels=(f"+{row.name}",))
            assert isinstance(candidates.decide(row, p, silicon(stub.STUB, row.name), named)[0], Accepted)


def test_each_has_the_limits_of_the_library_it_is_a_build_of():
    rows = {row.name: row for row in hf_kernels.KERNELS}
    assert rows["hf_flash_attn_2"].needs == flash_attn_2.KERNELS[0].needs and rows["hf_flash_attn_2"].dropout
    newer = {flash_attn_4.SOFTCAP_IN_TRAINING, *flash_attn_4.PAGES_ON}
    of_4 = {*flash_attn_4.KERNELS[0].needs} - newer | {*flash_attn_4.BEFORE_B34}
    assert {*rows["hf_flash_attn_4"].needs} == of_4 and rows["hf_flash_attn_4"].compiles == "once"
    assert rows["hf_sage"].approximate and not rows["hf_sage"].grad
    assert {row.library for row in rows.values()} == {"kernels"}
    assert [name for name, row in rows.items() if row.load_paged] == ["hf_flash_attn_3"], (
        "whose pages ask for no version"
    )


def test_an_empty_cache_is_a_reason_that_names_it(cache):
    [reason] = loaded()
    assert FLASH_2 in reason and str(cache) in reason and "none is there" in reason


def test_the_highest_version_with_a_build_for_this_system_is_taken(cache):
    stub.put(cache, FLASH_2, "aaa", 9)
    stub.put(cache, FLASH_2, "bbb", 10)
    stub.put(cache, FLASH_2, "ccc", 11, variant="torch-rocm")
    stub.put(cache, FLASH_2, "ddd", None)
    assert loaded() == ["ccc", "bbb"]


def test_a_cache_of_the_time_when_kernels_were_models_is_read(cache):
    stub.put(cache, FLASH_2, "aaa", 1, kind="models")
    assert loaded() == ["aaa"]


def test_what_local_kernels_names_goes_first(cache, monkeypatch, tmp_path):
    stub.put(cache, FLASH_2, "aaa", 1)
    mine = stub.put(tmp_path / "mine", FLASH_2, "mine", None)
    monkeypatch.setenv("LOCAL_KERNELS", f"other/kernel=/nowhere:{FLASH_2}={mine}")
    assert loaded() == ["mine"]


def test_a_build_that_depends_on_others_is_not_loaded_as_they_would_be_downloaded(cache):
    stub.put(cache, FLASH_2, "aaa", 1, **{"kernel-depends": [{"repo-id": "a/b", "version": 1}]})
    [reason] = loaded()
    assert "aaa depends on other kernels, which `kernels` would download" in reason
    stub.put(cache, FLASH_2, "bbb", None)
    assert loaded() == ["bbb"]


def test_what_a_build_raises_is_a_reason(cache, monkeypatch):
    stub.put(cache, FLASH_2, "aaa", 1)
    monkeypatch.setitem(stub.MODULES, "flash-attn2", stubs.module("older", flash_attn_func=lambda q, k, v: q))
    *_, reason = loaded()
    assert "aaa: ImportError" in reason and "softmax_scale" in reason


@pytest.mark.parametrize("name, below", [*hf_kernels.WHERE, ("HOME", ".cache/huggingface/hub")])
def test_the_cache_is_where_huggingface_hub_has_it(cache, monkeypatch, tmp_path, name, below):
    for other, _ in hf_kernels.WHERE:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, str(tmp_path))
    stub.put(tmp_path / below, FLASH_2, "aaa", 1)
    before = dict(os.environ)
    assert loaded() == ["aaa"]
    assert dict(os.environ) == before and "HF_HUB_OFFLINE" not in before
