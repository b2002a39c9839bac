"""A second process compiles from torch's caches: nothing of ours in a graph is of one process."""

from __future__ import annotations

import json

import children
import pytest

MODEL = """
import json, sys
import torch
from torch._dynamo.utils import counters
import fastattn
from fastattn import attention, masks
from fastattn.dispatch.session import session
from fastattn.environment.device import Device
from fastattn.environment.settings import current_settings
from fastattn.verdicts.verdict import Trial, Verdict

is_first = sys.argv[1] == "first"
g = torch.Generator().manual_seed(0)
x, weight = torch.randn(2, 24, 4, 8, generator=g), torch.ones(8, requires_grad=True)

def model(x):
    q = (x * weight).transpose(1, 2)
    q = attention(q, q, q, is_causal=True)  # the stored winner's own operator
    q = attention(q, q, q, masks.Causal() & masks.Window(5, 0))  # fastattn::attend
    return attention(q, q, q, return_lse=True)[0].sum()  # nothing is stored: plain math

if is_first:
    q = (x * weight).transpose(1, 2)
    problem = fastattn.explain(q, q, q, is_causal=True).problem
    verdict = Verdict(problem, "torch_flash", (Trial("default", time_us=9.0), Trial("torch_flash", time_us=1.0)))
    session.store(current_settings()).put(verdict, Device.of(q.device))
    fastattn.clear()
torch.compile(model, fullgraph=True)(x).backward()
hits = counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"]
print(json.dumps([*hits, counters["aot_autograd"]["autograd_cache_hit"], weight.grad.tolist()]))
"""


@pytest.mark.long
def test_the_second_process_compiles_from_the_cache(tmp_path):
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "FASTATTN_MODE": "cached",
                   "FASTATTN_LOG": "error", "FASTATTN_CACHE_DIR": str(tmp_path / "store")}  # fmt: skip
    found = []
    for which in ("first", "second"):
        ran = children.run(MODEL, which, env=environment, fresh=True, timeout=300)
        assert ran.returncode == 0, ran.stderr
        found.append(json.loads(ran.stdout.splitlines()[-1]))
    first, second = found
    assert first[:3] == [0, 2, 0]  # forward and backward are a graph each
    assert second[:3] == [2, 0, 1]
    assert first[3] == second[3]


STOCK = """
import sys
import torch, fastattn
import torch.nn.functional as F
before = {name for name in sys.modules if name.startswith("fastattn")}
q = torch.randn(1, 2, 8, 8)
seen = []
def backend(graph, inputs):
    seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
    return graph.forward
torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q), backend=backend, fullgraph=True)(q)
assert {name for name in sys.modules if name.startswith("fastattn")} == before, "tracing stock code came by fastattn"
assert len(seen) == 1 and "scaled_dot_product_attention" in seen[0], seen
"""


@pytest.mark.long
def test_stock_code_is_traced_as_if_fastattn_were_not_imported():
    """No clock: nothing of ours is run, or imported, while stock code is traced. benchmarks/compiled.py has the times."""
    ran = children.run(STOCK, timeout=300)
    assert ran.returncode == 0, ran.stderr
