"""Every private name of torch taken away: everything still works, slower."""

from __future__ import annotations

import json

import children
import pytest

from fastattn.environment import torch_private

# environment/torch_private.py is executed with every private name missing, then the rest is imported on top of it.
BOOTSTRAP = """
import importlib.util, json, sys, types
import torch
import torch.nn.functional as F
package = importlib.util.find_spec("fastattn")
stub = types.ModuleType("fastattn"); stub.__path__ = list(package.submodule_search_locations); stub.__spec__ = package
sys.modules["fastattn"] = stub
spec = importlib.util.find_spec("fastattn.environment.torch_private")
source = spec.loader.get_source("fastattn.environment.torch_private")
head = "def _find(path: str) -> Any:\\n"
assert source.count(head) == 1
source = source.replace(head, head + "    MISSING.append(path)\\n    return None\\n")
module = importlib.util.module_from_spec(spec)
module.MISSING = []
sys.modules["fastattn.environment.torch_private"] = module
exec(compile(source, spec.origin, "exec"), module.__dict__)
del sys.modules["fastattn"]
import fastattn
import fastattn.dispatch.guard
assert fastattn.dispatch.guard.torch_private is module, "another environment.torch_private was imported"
from fastattn import attention
from fastattn.dispatch import attention as api, guard as probe, resolve
from fastattn.environment import device
exact = lambda q, k, v, **kw: F.scaled_dot_product_attention(q.double(), k.double(), v.double(), **kw).to(q.dtype)
torch.set_num_threads(1)
q, k, v = (torch.randn(2, 4, 24, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
said = {}
"""

PARTS = {
    "missing": "said['missing'] = len(set(module.MISSING)); said['native'] = probe.NATIVE",
    "attention": """
for options in ({}, {"is_causal": True}, {"scale": 0.3}):
    for _ in range(3):
        out = attention(q, k, v, **options)
        assert torch.allclose(out, exact(q, k, v, **options), atol=1e-5), options
half = [x.bfloat16() for x in (q, k, v)]
assert torch.allclose(attention(*half).float(), exact(*half).float(), atol=2e-2)
""",
    "hits": """
attention(q, k, v)
real, resolve.attention = resolve.attention, None
try:
    assert torch.allclose(attention(q, k, v), exact(q, k, v), atol=1e-5)
finally:
    resolve.attention = real
misses = []
resolve.attention = lambda *a: (misses.append(1), real(*a))[1]
attention(q.double(), k.double(), v.double())
attention(q[:, :, :20], k, v)
attention(q.clone().requires_grad_(), k, v)
assert len(misses) == 3, misses
resolve.attention = real
""",
    "gradients": """
grads = []
for call in (attention, F.scaled_dot_product_attention):
    mine = [x.clone().requires_grad_() for x in (q, k, v)]
    for _ in range(2):
        out = call(*mine, is_causal=True)
    grads.append(torch.autograd.grad(out.square().sum(), mine))
assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*grads, strict=True))
""",
    "explain": """
text = str(fastattn.explain(q, k, v))
assert "torch_flash" in text and "entry point" in text, text  # the rows that need a private name say so
said["served"] = fastattn.explain(q, k, v, tune=True).served_by
""",
    "sdpa and patch": """
assert torch.allclose(fastattn.sdpa(q, k, v, is_causal=True), exact(q, k, v, is_causal=True), atol=1e-5)
with fastattn.patch():
    for _ in range(2):
        assert torch.allclose(F.scaled_dot_product_attention(q, k, v), exact_before(q, k, v), atol=1e-5)
""",
    "plan": "assert torch.allclose(fastattn.plan(q, k, v)(q, k, v), exact(q, k, v), atol=1e-5)",
    "compile": """
run = torch.compile(lambda q, k, v: attention(q, k, v, is_causal=True), backend="eager", fullgraph=True)
assert torch.allclose(run(q, k, v), exact(q, k, v, is_causal=True), atol=1e-5)
""",
    "transforms": """
out = torch.func.vmap(lambda x: attention(x, k, v))(torch.stack([q, q]))
assert torch.allclose(out[1], exact(q, k, v), atol=1e-5)
grad = torch.func.grad(lambda x: attention(x, k, v).sum())(q)
assert grad.shape == q.shape
""",
    "circumstances": """
torch.use_deterministic_algorithms(True)
assert torch.allclose(attention(q, k, v), exact(q, k, v), atol=1e-5)
torch.use_deterministic_algorithms(False)
with torch.autocast("cpu", dtype=torch.bfloat16):
    assert attention(q, k, v).dtype is torch.bfloat16
with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
    assert torch.allclose(attention(q, k, v), exact(q, k, v), atol=1e-5)
meta = torch.empty(1, 2, 8, 16, device="meta")
assert attention(meta, meta, meta).shape == meta.shape
class Mine(torch.Tensor): pass
assert type(attention(q.as_subclass(Mine), k, v)) is Mine
""",
}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """part -> None if it worked, else what it raised; one process runs all."""
    script = BOOTSTRAP + "before = F.scaled_dot_product_attention\n"
    script += "exact_before = lambda q, k, v: before(q.double(), k.double(), v.double()).to(q.dtype)\n"
    script += f"parts = {PARTS!r}\nimport traceback\nfor name, code in parts.items():\n"
    script += "    try:\n        exec(code)\n        said.setdefault(name, None)\n"
    script += "    except BaseException:\n        said[name] = traceback.format_exc()\nprint(json.dumps(said))\n"
    done = children.run(script, env={"FASTATTN_CACHE_DIR": str(tmp_path_factory.mktemp("private") / "store")})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_private_name_was_missing(said):
    elsewhere = ("comptime", "tracing_context", "strict_range", "init_amx")  # while tracing, and on a CPU with AMX
    on_the_cpu = [
        name for name in torch_private.PRIVATE if not name.startswith("cuda_") and name not in elsewhere
    ]  # CUDA's are asked for when loaded
    assert said["missing"] >= len(on_the_cpu) - 2  # nor the kernels', which load when first a candidate
    assert said["native"] is False


@pytest.mark.parametrize("part", [name for name in PARTS if name != "missing"])
def test_without_private_names(said, part):
    assert said[part] is None, said[part]


def test_a_kernel_that_lives_below_the_dispatcher_is_out(said):
    assert not said["served"].startswith("torch_")


@pytest.mark.parametrize("name", torch_private.PRIVATE)
def test_every_row_is_a_name_of_this_torch(name):
    """The table is of names that exist; a typo would silently turn the stand-in on for ever."""
    assert torch_private.private(name) is not None
