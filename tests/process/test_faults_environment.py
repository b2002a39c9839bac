"""Faults 70, 90, 93 and 97 of the list of real failures: the environment, and what is passed (86: test_option_scope.py)."""

from __future__ import annotations

import zipfile
from importlib import metadata
from pathlib import Path

import children
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from fakes import DEFAULT, Clock, qkv, turn

import fastattn
from fastattn import attention
from fastattn.cli.main import main
from fastattn.kernels.libraries import availability

F_sdpa = torch.nn.functional.scaled_dot_product_attention
SOURCE = Path(fastattn.__file__).parent


def child(code, **environment):
    done = children.run(code, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- fault 70: what is imported decides, not its metadata


def test_fault_70_torch_without_metadata_is_there(monkeypatch):
    """torch is what is imported, with metadata or without."""

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    availability.forget_libraries()
    try:
        assert availability.library_version("torch") == torch.__version__
        q, k, v = qkv(20)
        assert torch.allclose(attention(q, k, v), F_sdpa(q, k, v), atol=1e-5)
    finally:
        availability.forget_libraries()


def test_fault_70_the_package_may_lie_in_a_zip(tmp_path):
    archive = tmp_path / "packed.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for path in SOURCE.rglob("*"):
            if path.suffix in (".py", ".json"):
                packed.write(path, Path("fastattn") / path.relative_to(SOURCE))
    code = f"""
import sys
sys.path.insert(0, {str(archive)!r})
import torch, fastattn
from fastattn.kernels import known_faults, registry
assert "packed.zip" in fastattn.__file__
x = torch.randn(1, 2, 16, 8)
fastattn.attention(x, x, x)
print(len(known_faults.known_faults()) > 0, "flash_attn_2" in registry.names())
"""
    assert child(code, FASTATTN_MODE="cached", PYTHONPATH="") == "True True"


# --- fault 90: numbers are numbers, and a message names the module of a type

NUMBERS = [0.5, np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5), np.int64(1), 1]


@pytest.mark.parametrize("scale", NUMBERS, ids=lambda x: f"{type(x).__module__}.{type(x).__name__}")
def test_fault_90_a_scale_may_be_any_number(scale):
    """A scale may be any number: of Python, of numpy, or a tensor without dimensions."""
    q, k, v = qkv(20)
    want = F_sdpa(q, k, v, scale=float(scale))
    assert torch.allclose(attention(q, k, v, scale=scale), want, atol=1e-5)
    assert torch.allclose(attention(q, k, v, scale=scale), want, atol=1e-5), "as a hit"


def test_fault_90_sdpa_serves_an_int_scale():
    q, k, v = qkv(20)
    fastattn.stats.reset()
    assert torch.allclose(fastattn.sdpa(q, k, v, scale=1), F_sdpa(q, k, v, scale=1.0), atol=1e-5)
    assert not fastattn.stats()["passed_on"]


@pytest.mark.parametrize(("option", "value", "named"), [
    ("is_causal", np.bool_(True), "numpy.bool"), ("scale", "1", "str"), ("scale", True, "bool"), ("scale", 1j, "complex"),
    ("scale", torch.ones(1), "Tensor"), ("dropout_p", np.bool_(True), "numpy.bool"),
])  # fmt: skip
def test_fault_90_a_message_names_the_type_with_its_module(option, value, named):
    with pytest.raises(TypeError, match=rf"attention\(\): {option} must be .*, got {named}"):
        attention(*qkv(20), **{option: value})


# --- fault 93: nobody looks for plugins that were not named


def test_fault_93_a_call_does_not_scan_entry_points(tmp_path):
    """A call looks for plugins only where one is named."""
    code = """
import importlib.metadata, torch, fastattn
def scan(*args, **how):
    raise SystemExit("entry points were scanned")
importlib.metadata.entry_points = scan
x = torch.randn(1, 2, 16, 8)
fastattn.attention(x, x, x)
fastattn.attention(x, x, x, kernel="torch_math")
print("served")
"""
    assert child(code, FASTATTN_CACHE_DIR=str(tmp_path), FASTATTN_KERNELS="-flex") == "served"


TUNES = """
import pytest, torch, fastattn
from fakes import Clock, turn
turn(pytest.MonkeyPatch(), Clock({{"default": 4e-3, {winner!r}: 1e-3}}))
x = torch.zeros(1, 2, 16, 8)
fastattn.attention(x, x, x)
"""
CALLS = """
import sys, torch, fastattn
before, x = set(sys.modules), torch.zeros(1, 2, 16, 8)
fastattn.attention(x, x, x)
print(*sorted(set(sys.modules) - before))
"""
COMPILED_TEXT = """
import sys, typing, torch, fastattn
x = torch.zeros(1, 2, 16, 8)
fastattn.attention(x, x, x)
modules = [module for name, module in sys.modules.items() if name.startswith("fastattn.")]
records = {c for m in modules for c in vars(m).values() if isinstance(c, type) and hasattr(c, "_fields")}
assert len(records) > 20, records
for record in records:
    text = [name for name, kind in record.__annotations__.items() if isinstance(kind, typing.ForwardRef)]
    if len(text) > 3:
        print(record.__module__, record.__name__, *text)
"""
# What the first call on a stored problem without a mask does without, unless its candidate asks for it.
SPARED = (
    "fastattn.tuning.t", "fastattn.tuning.s", "fastattn.tuning.accuracy", "fastattn.problems.masks.",
    "fastattn.problems.tilings", "fastattn.problems.rewriting", "fastattn.problems.packing", "fastattn.problems.spelling",
    "fastattn.problems.sliding_window_decode", "fastattn.verdicts.manifest", "fastattn.kernels.workspace",
    "fastattn.kernels.plain_math", "fastattn.kernels.libraries.import_probe", "fastattn.kernels.libraries.operator_files",
    "fastattn.kernels.libraries.crash_notes", "fastattn.kernels.adapters.", "fastattn.planning.conversions.",
    "fastattn.dispatch.dtensors", "fastattn.dispatch.four_dims", "fastattn.dispatch.passed_on", "fastattn.dispatch.rescue",
    "fastattn.dispatch.explain", "fastattn.dispatch.compiled", "shlex", "subprocess", "email",
)  # fmt: skip
OF_ALL = {"planning.conversions.conversion", "kernels.adapters.torch_sdpa"}
OF_MATMUL = {"dispatch.rescue", "kernels.adapters.matmul", "kernels.plain_math", "kernels.workspace",
             "planning.conversions.blocks", "planning.conversions.dtype"}  # fmt: skip


@pytest.mark.parametrize(
    ("winner", "own"), [("default", OF_ALL), ("matmul", OF_ALL | OF_MATMUL)], ids=["default", "matmul"]
)
def test_fault_93_the_first_call_on_a_stored_problem_imports_what_its_candidate_needs(winner, own, tmp_path):
    """Nothing of tuning, no other kernel's adapter, and of the conversions and the masks those that the call has."""
    child(TUNES.format(winner=winner), FASTATTN_CACHE_DIR=str(tmp_path), PYTHONPATH=children.PATH)
    assert len(list(tmp_path.rglob("v*/*/*.json"))) == 1
    done = children.run(CALLS, env={"FASTATTN_CACHE_DIR": str(tmp_path)}, fresh=True)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split()
    found = {name.removeprefix("fastattn.") for name in loaded if name.startswith(SPARED)}
    assert found <= own, "imported in the first call, and not needed by it"
    assert ("kernels.adapters.matmul" in found) == (winner == "matmul"), "it was not the stored winner that served"


def test_fault_93_a_first_call_compiles_no_annotations(tmp_path):
    """A NamedTuple compiles each annotation that is text: as with `from __future__ import annotations`."""
    child(TUNES.format(winner="default"), FASTATTN_CACHE_DIR=str(tmp_path), PYTHONPATH=children.PATH)
    done = children.run(COMPILED_TEXT, env={"FASTATTN_CACHE_DIR": str(tmp_path)}, fresh=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


# --- fault 97: where the default wins, tune says what came nearest


def test_fault_97_tune_names_the_nearest_challenger_and_how_far_behind(monkeypatch):
    """Where nothing beats the default, `fastattn tune` names the candidate that came nearest, and how far behind it was."""
    turn(
        monkeypatch,
        Clock({"default": DEFAULT, "matmul": 1.25 * DEFAULT, "torch_math": 2 * DEFAULT}, other=2.5 * DEFAULT),
    )
    told = CliRunner().invoke(main, ["tune", "1x4x64x32"], catch_exceptions=False)
    assert told.exit_code == 0
    [line] = [line for line in told.output.splitlines() if "1 x 4 x 64 d32" in line]
    assert "default" in line and "1.00x" in line and "matmul 0.80x" in line
    why = CliRunner().invoke(main, ["explain", "1x4x64x32"], catch_exceptions=False).output
    assert "served by default: the fastest; matmul came nearest with 0.80x" in why
