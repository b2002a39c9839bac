"""`import fastattn` loads no kernel library and touches no file; imports inside the package point down only."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

import children
import pytest

import fastattn

SOURCE = Path(fastattn.__file__).parent
KERNEL_LIBRARIES = ["flash_attn", "flash_attn_interface", "xformers", "transformer_engine", "sageattention", "flashinfer",
                    "cudnn", "triton", "mslk", "aiter"]  # fmt: skip
LIGHT_LIBRARIES = ["rich", "click", "platformdirs", "transformers", "hypothesis", "pytest"]


def said(code, fresh=False, **environment):
    """What a process prints as JSON."""
    done = children.run(code, env={"FASTATTN_CACHE_DIR": None, **environment}, fresh=fresh)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_fault_63_import_loads_only_itself_and_the_standard_library(tmp_path):
    """`import fastattn` loads nothing but itself and the standard library beyond what torch loads.

    And no directory is made, nothing opened for writing, no environment or flag changed.
    """
    seen = said(
        """
import json, os, sys, threading
import torch
before, environ, threads = set(sys.modules), dict(os.environ), threading.active_count()
flags = (torch.is_grad_enabled(), torch.get_num_threads(), torch.backends.cuda.flash_sdp_enabled(), torch.initial_seed())
rng, writes = torch.get_rng_state(), []
def hook(event, args):
    is_write = event == "open" and isinstance(args[2], int) and args[2] & 3 and "__pycache__" not in str(args[0])
    if is_write or event in ("os.mkdir", "socket.connect", "subprocess.Popen"):
        writes.append([event, str(args[0])])
sys.addaudithook(hook)
import fastattn
new = sorted({name.split(".")[0] for name in set(sys.modules) - before})
print(json.dumps({
    "new": [n for n in new if n not in sys.stdlib_module_names], "writes": writes,
    "all": sorted(sys.modules), "threads": threading.active_count() - threads,
    "same": environ == dict(os.environ) and bool(torch.equal(rng, torch.get_rng_state())) and flags == (
        torch.is_grad_enabled(), torch.get_num_threads(), torch.backends.cuda.flash_sdp_enabled(), torch.initial_seed()),
}))
""",
        fresh=True,
        HOME=str(tmp_path),
    )
    assert seen["new"] == ["fastattn"]
    assert seen["writes"] == [] and seen["threads"] == 0 and seen["same"]
    assert list(tmp_path.iterdir()) == []
    assert not set(KERNEL_LIBRARIES + LIGHT_LIBRARIES) & set(seen["all"])
    assert not [m for m in ("torch._dynamo", "torch._inductor") if m in seen["all"]]


def test_the_first_call_loads_no_compiler_and_no_terminal_library(tmp_path):
    seen = said(
        """
import json, sys
import torch, fastattn
x = torch.randn(1, 2, 24, 16)
fastattn.attention(x, x, x); fastattn.explain(x, x, x)
print(json.dumps([m for m in ("torch._dynamo", "torch._inductor", "rich", "click", "triton") if m in sys.modules]))
""",
        FASTATTN_CACHE_DIR=str(tmp_path / "store"),
    )
    assert seen == []


def test_every_public_name_is_there_and_documented():
    assert len(set(fastattn.__all__)) == len(fastattn.__all__)
    for name in fastattn.__all__:
        assert getattr(fastattn, name).__doc__, name


# --- the import law, read from pyproject.toml


def imports_of(path):
    """Modules of fastattn that a file imports, at its top or inside a function, less those for type checkers."""
    tree = ast.parse(path.read_text())
    skipped = {
        inner for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }  # fmt: skip
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "fastattn":
                yield from (f"fastattn.{a.name}" for a in node.names)
            else:
                yield node.module


LAW = (
    "cli",
    "integrations | compat",
    "dispatch",
    "tuning",
    "planning | verdicts",
    "kernels",
    "problems",
    "environment",
)
LAW_FILE = SOURCE.parents[1] / "pyproject.toml"
DEPTH = {folder: depth for depth, row in enumerate(LAW) for folder in row.split(" | ")}


def test_the_law_is_the_one_that_lint_imports_keeps():
    assert f'name = "{" > ".join(LAW)}"' in LAW_FILE.read_text()


def test_the_folders_are_those_of_the_law():
    folders = {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= set(DEPTH)
    assert {path.name for path in SOURCE.glob("*.py")} == {"__init__.py"}


def test_imports_point_down():
    """Inside functions as well, where lint-imports counts them too."""
    wrong = []
    for path in SOURCE.rglob("*.py"):
        mine = path.relative_to(SOURCE).parts[0]
        for name in imports_of(path):
            parts = name.split(".")
            if parts[0] != "fastattn" or len(parts) == 1 or mine in ("__init__.py", parts[1]):
                continue
            if DEPTH[parts[1]] <= DEPTH[mine]:
                wrong.append(f"{path.relative_to(SOURCE)} imports {name}")
    assert not wrong


def test_files_are_short_enough_to_read_in_one_sitting():
    long = {str(p.relative_to(SOURCE)): n for p in SOURCE.rglob("*.py") if (n := p.read_text().count("\n")) > 250}
    assert not long, "two ideas in one file?"


ADAPTERS = SOURCE / "kernels" / "adapters"
HOME = ("init", "pycache", "adapters")


@pytest.mark.parametrize("path", sorted(ADAPTERS.glob("[a-z]*.py")), ids=lambda p: p.stem)
def test_an_adapter_imports_the_contract_alone(path):
    """And the standard library; what it is an adapter of, it imports in load().

    The hub, mslk and torch_varlen have others' kernels.
    """
    top = [n for n in ast.parse(path.read_text()).body if isinstance(n, (ast.Import, ast.ImportFrom))]
    modules = {a.name for n in top if isinstance(n, ast.Import) for a in n.names}
    modules |= {n.module or "" for n in top if isinstance(n, ast.ImportFrom)}
    siblings = {"fastattn.kernels.adapters"} if path.stem in ("hf_kernels", "mslk", "torch_varlen") else set()
    assert {m for m in modules if m.split(".")[0] not in sys.stdlib_module_names} <= {"fastattn.kernels", *siblings}
    assert {name for name in imports_of(path) if name.startswith("fastattn")} == {"fastattn.kernels", *siblings}


def test_whoever_may_not_import_an_adapter_is_named_to_lint_imports():
    named = set(re.findall(r'"fastattn\.([\w.]+)"', LAW_FILE.read_text()))
    outside = {folder for folder in DEPTH if folder != "kernels"}
    outside |= {f"kernels.{path.stem}" for path in (SOURCE / "kernels").iterdir() if path.stem.strip("_") not in HOME}
    assert outside <= named


def test_the_environment_imports_only_torch_and_the_standard_library():
    for path in (SOURCE / "environment").glob("*.py"):
        found = {m.split(".")[0] for m in imports_of(path)} - {"fastattn", "torch", "platformdirs"}
        assert found <= set(sys.stdlib_module_names), (path.name, found)


def test_private_names_of_torch_are_reached_from_torch_private_alone():
    """`torch._x` or an import from torch._x anywhere else is a name that the next torch may take away."""
    allowed = {
        ("memory_use.py", "torch.utils._python_dispatch"),
        ("memory_use.py", "torch.utils._pytree"),
        ("guard.py", "torch._neg_view"),  # in the self-test: without it the plain guard is used
    }
    found = set()
    for path in SOURCE.rglob("*.py"):
        if path.name == "torch_private.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch._"):
                found.add((path.name, ast.unparse(node)))
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch") and "._" in node.module:
                found.add((path.name, node.module))
    found = {(file, name) for file, name in found if not name.startswith(("torch._dynamo", "torch.__"))}
    assert found <= allowed


def test_dir_shows_what_is_public_and_nothing_else():
    shown = dir(fastattn)
    assert {name for name in shown if not name.startswith("__")} == set(fastattn.__all__)
    assert {"__version__", "__doc__", "__file__"} <= set(shown)
