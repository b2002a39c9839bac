"""`import fastattn` loads no kernel library and touches no file; imports inside the package point down only."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastattn

SOURCE = Path(fastattn.__file__).parent
KERNEL_LIBRARIES = ["flash_attn", "flash_attn_interface", "xformers", "transformer_engine", "sageattention", "flashinfer",
                    "cudnn", "triton", "mslk", "aiter"]  # fmt: skip
LIGHT_LIBRARIES = ["rich", "click", "platformdirs", "transformers", "hypothesis", "pytest"]


def fresh(code, **environment):
    """What a fresh process prints as JSON."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("FASTATTN_")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env={**environ, **environment}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_loads_only_itself_and_the_standard_library(tmp_path):
    """Beyond what torch loads; and no directory is made, nothing opened for writing, no environment or flag changed."""
    seen = fresh(
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
        HOME=str(tmp_path),
    )
    assert seen["new"] == ["fastattn"]
    assert seen["writes"] == [] and seen["threads"] == 0 and seen["same"]
    assert list(tmp_path.iterdir()) == []
    assert not set(KERNEL_LIBRARIES + LIGHT_LIBRARIES) & set(seen["all"])
    assert not [m for m in ("torch._dynamo", "torch._inductor") if m in seen["all"]]


def test_the_first_call_loads_no_compiler_and_no_terminal_library(tmp_path):
    seen = fresh(
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


def layers():
    """module -> its layer, 0 on top."""
    text = (SOURCE.parents[1] / "pyproject.toml").read_text()
    block = text.split('type = "layers"')[1].split("layers = [")[1].split("]")[0]
    rows = [row.strip().strip(",").strip('"') for row in block.splitlines() if '"' in row]
    return {name.strip(): depth for depth, row in enumerate(rows) for name in row.split("|")}


def test_imports_point_down():
    depth = layers()
    modules = {p.relative_to(SOURCE).parts[0].removesuffix(".py") for p in SOURCE.rglob("*.py")} - {"__init__"}
    assert modules <= set(depth), f"not in the layers of pyproject.toml: {modules - set(depth)}"
    wrong = []
    for path in SOURCE.rglob("*.py"):
        mine = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        for name in imports_of(path):
            parts = name.split(".")
            if parts[0] != "fastattn" or len(parts) == 1 or mine in ("__init__", parts[1]):
                continue
            if parts[1] in depth and depth[parts[1]] <= depth[mine]:
                wrong.append(f"{mine} imports {parts[1]}")
    assert not wrong


@pytest.mark.parametrize("path", sorted((SOURCE / "kernels").glob("[a-z]*.py")), ids=lambda p: p.stem)
def test_a_kernel_file_imports_the_contract_alone(path):
    """And the standard library; what it is an adapter of, it imports in load(). The hub and mslk have others' kernels."""
    top = [n for n in ast.parse(path.read_text()).body if isinstance(n, (ast.Import, ast.ImportFrom))]
    modules = {a.name for n in top if isinstance(n, ast.Import) for a in n.names}
    modules |= {n.module or "" for n in top if isinstance(n, ast.ImportFrom)}
    assert {m for m in modules if m.split(".")[0] not in sys.stdlib_module_names} <= {"fastattn.kernel", "fastattn.kernels"}
    siblings = {"fastattn.kernels"} if path.stem in ("hf_kernels", "mslk") else set()
    assert {name for name in imports_of(path) if name.startswith("fastattn")} == {"fastattn.kernel", *siblings}


def test_the_words_import_only_torch_and_the_standard_library():
    for name in ("layouts", "masks", "buckets", "errors", "config", "device"):
        found = {m.split(".")[0] for m in imports_of(SOURCE / f"{name}.py")} - {"fastattn", "torch"}
        assert found <= set(sys.stdlib_module_names), (name, found)


def test_private_names_of_torch_are_reached_from_device_alone():
    """`torch._x` or an import from torch._x anywhere else is a name that the next torch may take away."""
    allowed = {
        ("memory.py", "torch.utils._python_dispatch"),
        ("memory.py", "torch.utils._pytree"),
        ("probe.py", "torch._neg_view"),  # in the self-test: without it the plain guard is used
    }
    found = set()
    for path in SOURCE.rglob("*.py"):
        if path.name == "device.py":
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
