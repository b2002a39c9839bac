"""zentorch beyond the grid: which CPUs and torches it is for, what its operator is told, a whole call, and its removal."""

from __future__ import annotations

import pytest
import torch
from fakes import qkv
from library_grid import installed, row_of
from stubs import calls
from stubs import zentorch as stub
from uninstalling import serves_until_uninstalled

import fastattn
from fastattn.cli.doctor import rows
from fastattn.cli.doctor.machine import this_machine
from fastattn.kernels.libraries import availability, catalogue, operator_files

LIBRARY = catalogue.library_of("zentorch")
TORCH = ".".join(torch.__version__.split(".")[:2])


def in_version(version, monkeypatch, **capabilities):
    monkeypatch.setattr(catalogue, "installed_distribution", lambda _: ("zentorch", version))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    availability.forget_libraries()


@pytest.mark.parametrize("is_imported", [False, True], ids=["found", "imported"])
def test_a_cpu_without_avx512_bf16_is_a_reason_and_nothing_is_loaded(is_imported, monkeypatch):
    """There the operator runs torch's own kernel, whoever loaded it."""
    in_version(f"{TORCH}.0.2", monkeypatch, avx2=True, avx512_f=True)
    monkeypatch.setattr(operator_files, "is_imported", lambda _: is_imported)
    assert availability.why_unavailable(row_of(stub.STUB, "zentorch")) == (
        "package zentorch cannot be used: ImportError: needs avx512_bf16, of which this CPU has none"
    )
    row = rows.of_library(LIBRARY, this_machine(), 1.0)
    assert row.importable is None and not row.usable and row.fix is None, "no command mends a CPU"


@pytest.mark.parametrize("version", ["2.9.1.0", "3.0.0.1", "?"])
def test_a_version_for_another_torch_is_a_reason_and_the_doctor_names_the_right_one(version, monkeypatch):
    """Its file would be loaded with half of its symbols missing, or with others of the same names."""
    in_version(version, monkeypatch, avx512_bf16=True)
    monkeypatch.setattr(operator_files, "is_imported", lambda _: False)
    built = f"ImportError: its version {version} is built for another torch than {torch.__version__}"
    assert availability.why_unavailable(row_of(stub.STUB, "zentorch")) == f"package zentorch cannot be used: {built}"
    row = rows.of_library(LIBRARY, this_machine(), 1.0)
    assert row.why_not == (built,) and row.fix == f'pip install --force-reinstall --no-deps "zentorch=={TORCH}.*"'


def test_float16_is_cast_as_its_own_runs_torch_s_kernel_on_most_cpus(monkeypatch):
    with installed(stub.STUB, monkeypatch):
        q, k, v = (x.half() for x in qkv(64))
        calls.clear()
        found = fastattn.attention(q, k, v, kernel="zentorch")
        assert calls and all(told["query"].dtype is torch.float32 for _, told in calls)
        want = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in (q, k, v)))
        assert (found - want).abs().max() < 2e-3


def test_a_mask_is_refused_in_words(monkeypatch):
    with installed(stub.STUB, monkeypatch):
        q, k, v = qkv(64)
        with pytest.raises(fastattn.NoKernelError, match="zentorch.*a mask is not supported"):
            fastattn.attention(q, k, v, torch.ones(64, 64, dtype=torch.bool).tril(), kernel="zentorch")


def test_it_wins_serves_the_next_process_and_once_uninstalled_another_serves_without_a_word(monkeypatch, caplog):
    serves_until_uninstalled(stub.STUB, "zentorch", "zentorch", monkeypatch, caplog, is_causal=True)
