"""Fault 44: the ranks of a process group choose alike. Nothing is timed, and no collective hides inside attention()."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import rank_processes
import torch
from fakes import FAST, Clock, add, honest, made_up, qkv, turn

import fastattn
from fastattn.dispatch import tune_now
from fastattn.environment.device import Device
from fastattn.environment.settings import reload_settings
from fastattn.verdicts.manifest import export_manifest

SOURCE = Path(fastattn.__file__).parent

SCRIPT = """
import json, logging, os, sys
import torch, torch.distributed as dist
import fastattn
from fastattn.environment import device
from fastattn.environment import settings as config
from fastattn.dispatch import resolve, tune_now
from fastattn.dispatch.session import session
from fastattn.verdicts.verdict import Trial, Verdict

torch.set_num_threads(1)
rank = int(os.environ["RANK"])
lines, said, tuned = [], {}, []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage())
logging.getLogger("fastattn").addHandler(handler)
q, k, v = (torch.randn(1, 2, 24, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
real = tune_now.tune_problem
tune_now.tune_problem = lambda *a, **kw: (tuned.append(1), real(*a, **kw))[1]

def private_store(name):
    "What this rank learnt alone, before there was a group."
    with fastattn.options(mode="cached"):
        mine = fastattn.explain(q, k, v).problem
    verdict = Verdict(mine, name, (Trial("default", time_us=9.0), Trial(name, time_us=1.0)))
    session.store(config.current_settings()).put(verdict, device.Device.of(q.device))
    fastattn.clear()

def serve(when, **options):
    with fastattn.options(**options):
        fastattn.attention(q, k, v)
        out = fastattn.attention(q, k, v)
        said[when] = fastattn.explain(q, k, v).served_by
    said[when + " sum"] = out.double().sum().item()

BODY
print(json.dumps({**said, "tuned": len(tuned), "lines": lines}))
sys.stdout.flush()
if dist.is_initialized():
    dist.barrier()
    dist.destroy_process_group()
"""
INIT = 'dist.init_process_group("gloo")\n'


def two_ranks(tmp_path, body, **environment):
    """Run the script on two gloo ranks, each with a store of its own; what each printed."""
    ranks = rank_processes.run(SCRIPT.replace("BODY", body), tmp_path, **environment)
    assert [r.returncode for r in ranks] == [0, 0], [r.stderr for r in ranks]
    return [json.loads(r.stdout.splitlines()[-1]) for r in ranks]


def test_fault_44_ranks_choose_alike(tmp_path):
    """The ranks of a process group choose alike, whatever each has stored.

    Each knows another winner. Alone it serves; in a group the default does, and after sync() rank 0's.
    """
    found = two_ranks(
        tmp_path,
        'private_store(["sdpa_math", "matmul"][rank])\nserve("alone", mode="cached")\n'
        + INIT
        + """
fastattn.clear()
serve("group")
q2 = q[:, :, :20].contiguous()
fastattn.attention(q2, q2, q2)
said["took"] = fastattn.sync()
serve("synced")
""",
    )
    assert [r["alone"] for r in found] == ["sdpa_math", "matmul"]
    assert [r["group"] for r in found] == ["default", "default"]
    assert [r["synced"] for r in found] == ["sdpa_math", "sdpa_math"]
    assert [(r["took"], r["tuned"]) for r in found] == [(1, 0), (1, 0)]
    assert all(found[0][when] == found[1][when] for when in ("group sum", "synced sum"))
    warnings = [[line for line in r["lines"] if "not tuned" in line] for r in found]
    assert len(warnings[0]) == 1 and not warnings[1]
    assert "process group" in warnings[0][0] and "fastattn tune 1x2x24x24x16 --dtype float32" in warnings[0][0]


def test_a_rank_with_another_fingerprint_uses_the_default(tmp_path):
    body = (
        """
if rank == 1:
    other = device.Device("cpu", "another silicon")
    device.Device.of = staticmethod(lambda _: other)
private_store("sdpa_math")
"""
        + INIT
        + """
said["took"] = fastattn.sync()
serve("synced")
"""
    )
    found = two_ranks(tmp_path, body)
    assert [(r["synced"], r["took"], r["tuned"]) for r in found] == [("sdpa_math", 1, 0), ("default", 0, 0)]
    assert any("another-silicon" in line and "the default serves here" in line for line in found[1]["lines"])


def test_a_manifest_serves_all_ranks(tmp_path):
    with fastattn.options(mode="cached"):
        x = torch.randn(1, 2, 24, 16)
        problem = fastattn.explain(x, x, x).problem.replace(threads=1)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(export_manifest([verdict(problem, "sdpa_math")], silicon()))
    body = 'private_store("matmul") if rank else None\n' + INIT + 'serve("group")\n'
    found = two_ranks(tmp_path, body, FASTATTN_MANIFEST=str(manifest))
    assert [(r["group"], r["tuned"]) for r in found] == [("sdpa_math", 0)] * 2
    assert not any("not tuned" in line for r in found for line in r["lines"])


def verdict(problem, winner):
    from fastattn.verdicts.verdict import Trial, Verdict

    return Verdict(problem, winner, (Trial("default", time_us=9.0), Trial(winner, time_us=1.0)))


def silicon():
    return Device.of(torch.device("cpu"))


@pytest.fixture
def one_rank_of_two(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: 0)
    monkeypatch.setattr(tune_now, "tune_and_keep", lambda *_, **__: pytest.fail("tuned"))


def test_attention_calls_no_collective(one_rank_of_two, monkeypatch):
    for name in collectives():
        monkeypatch.setattr(torch.distributed, name, lambda *_, name=name, **__: pytest.fail(f"called {name}"))
    x = torch.randn(1, 2, 24, 16)
    out = fastattn.attention(x, x, x)
    assert torch.equal(out, torch.nn.functional.scaled_dot_product_attention(x, x, x))


def test_calls_from_before_the_group_are_forgotten_at_the_first_miss_in_it(request, monkeypatch):
    """They chose by this rank's own clock. No hit asks about groups: the first call of a new kind does."""
    ran = []
    add(monkeypatch, made_up("mine", lambda *given: ran.append(1) or honest(*given)))
    turn(monkeypatch, Clock({"default": 4e-3, "mine": FAST}))
    q, k, v = qkv(48)
    fastattn.attention(q, k, v)
    assert fastattn.explain(q, k, v).served_by == "mine"
    request.getfixturevalue("one_rank_of_two")
    fastattn.attention(*qkv(40))
    ran.clear()
    for _ in range(3):
        fastattn.attention(q, k, v)
    assert not ran and fastattn.explain(q, k, v).served_by == "default"


def test_a_manifest_made_elsewhere_is_said_once_and_not_used(one_rank_of_two, tmp_path, monkeypatch, caplog):
    manifest = tmp_path / "manifest.json"
    manifest.write_text(export_manifest(iter([]), Device("cpu", "another silicon")))
    monkeypatch.setenv("FASTATTN_MANIFEST", str(manifest))
    reload_settings()
    for n in (20, 21, 22):
        x = torch.randn(1, 2, n, 16)
        fastattn.attention(x, x, x)
    said = [
        r.getMessage() for r in caplog.records if "FASTATTN_MANIFEST" in r.getMessage() and "made for" in r.getMessage()
    ]
    assert len(said) == 1


def test_sync_without_a_process_group_says_so():
    with pytest.raises(RuntimeError, match="not initialised"):
        fastattn.sync()


# --- the law: collectives in ranks.py alone


def collectives():
    """Names of torch.distributed that send or wait."""
    words = ("all_", "broadcast", "gather", "scatter", "reduce", "barrier", "send", "recv", "monitored")
    return sorted(
        n for n in dir(torch.distributed) if any(w in n for w in words) and callable(getattr(torch.distributed, n))
    )


def calls_of_collectives(source):
    names = set(collectives())
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in names:
            yield node.attr
        module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
        if module.startswith("torch.distributed") and module != "torch.distributed.tensor":  # types of tensors alone
            yield module


def test_collectives_appear_only_in_ranks():
    found = {p.name for p in SOURCE.rglob("*.py") if list(calls_of_collectives(p.read_text()))}
    assert found == {"ranks.py"}


def test_the_guard_would_see_one():
    assert list(calls_of_collectives("torch.distributed.all_reduce(x)")) == ["all_reduce"]
    assert list(calls_of_collectives("from torch.distributed import barrier")) == ["torch.distributed"]
