"""What is found of a library without importing it: by any distribution that brings it, and by versions with their betas."""

from __future__ import annotations

import importlib.metadata

import pytest
from fakes import honest, made_up
from library_grid import row_of
from stubs import flash_attn_3

from fastattn.kernels.libraries import availability, catalogue, versions


def install(monkeypatch, found):
    """These distributions are installed, and no other."""

    def version(name):
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    availability.forget_libraries()


@pytest.mark.parametrize("found, version", [
    ({"flash-attn-3": "3.0.0"}, "3.0.0"),
    ({"tokenspeed-fa3": "3.0.0.post20260810"}, "3.0.0.post20260810"),
    ({"flash-attn-3": "3.0.1", "tokenspeed-fa3": "3.0.0.post20260810"}, "3.0.1"),
    ({"fa3-fwd": "0.0.3"}, None),
])  # fmt: skip
def test_flash_attention_3_is_found_by_whoever_brings_its_module(found, version, monkeypatch):
    """tokenspeed-fa3, which pip installs, has flash_attn_interface and flash_attn_config as the package itself does."""
    install(monkeypatch, found)
    row = row_of(flash_attn_3.STUB, "flash_attn_3")
    assert availability.library_version("flash-attn-3") == version
    assert availability.why_absent(row) == (None if version else "package flash-attn-3 is not installed")
    library = catalogue.library_of("tokenspeed-fa3")
    assert library is catalogue.library_of("flash-attn-3") and library.module == "flash_attn_interface"
    availability.forget_libraries()


@pytest.mark.parametrize("version, other, sign", [
    ("4.0.0b36", "4", ">="), ("4.0.0b36", "4.0.0b34", ">"), ("4.0.0b4", "4.0.0b34", "<"), ("4.0.0", "4.0.0b36", ">"),
    ("4.0.0rc1", "4.0.0b36", ">"), ("3.9", "4.0.0b1", "<"), ("4.0.1b1", "4.0.0b36", ">"), ("2.13.0+cu130", "2.13", ">="),
    ("4.0.0b34", "4.0.0b34", "=="), ("2.8.3.post2", "2.8.3", "=="), ("4.0b34", "4.0.0b34", "=="),
])  # fmt: skip
def test_a_beta_is_a_version_where_one_is_named(version, other, sign):
    here, wanted = versions.comparable(version, other)
    assert (here > wanted, here < wanted) == (">" in sign and here != wanted, sign == "<")
    assert sign != "==" or here == wanted
    assert sign != ">" or here > wanted


@pytest.mark.parametrize("version, why", [
    ("1.0.0b5", None), ("1.0.0", None), ("1.0.0b4", "package lib 1.0.0b4 < 1.0.0b5"),
    ("2.0.0b3", "package lib 2.0.0b3 >= 2, which is not known to work"),
])  # fmt: skip
def test_a_row_may_begin_with_a_beta(version, why, monkeypatch):
    install(monkeypatch, {"lib": version})
    assert availability.why_absent(made_up("x", honest, library="lib", versions=("1.0.0b5", "2"))) == why
    availability.forget_libraries()
