"""Fault 67, what shows only on the second start: the same work cold, warm in the process, and warm in a new process."""

from __future__ import annotations

import json

import children
import pytest

SCRIPT = """
import hashlib, json, sys
import pytest, torch, fastattn
from fakes import Clock, turn
from fastattn import masks
from fastattn.dispatch import tune_now
from fastattn.dispatch import resolve


torch.set_num_threads(1)
tuned = []
# the clock is made up: which kernels are fast here, and whether any is, is not what this is about
turn(pytest.MonkeyPatch(), Clock({"default": 4e-3, "matmul": 1e-3, "torch_flash": 2e-3, "sdpa_math": 3e-3}))
real = tune_now.tune_problem
tune_now.tune_problem = lambda problem, *a, **kw: (tuned.append(str(problem)), real(problem, *a, **kw))[1]

def make(*shape, seed=0, dtype=torch.float32, grad=False):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.requires_grad_(grad)

def calls():
    "name -> (tensors, options) of each kind of problem."
    bf16 = torch.bfloat16
    qkv = [make(2, 4, 40, 32, seed=i) for i in range(3)]
    yield "plain", qkv, {}
    yield "causal bf16", [x.to(bf16) for x in qkv], {"is_causal": True}
    yield "gradients", [x.clone().requires_grad_() for x in qkv], {}
    yield "gradients fp16 causal", [x.half().requires_grad_() for x in qkv], {"is_causal": True}
    few = [make(2, 2, 40, 32, seed=i, grad=True) for i in (1, 2)]
    yield "gradients GQA", [qkv[0].clone().requires_grad_(), *few], {}
    bias = make(1, 4, 40, 40, seed=7)
    yield "bias", [*qkv, bias], {}
    yield "gradients bias", [*(x.clone().requires_grad_() for x in qkv), bias.clone().requires_grad_()], {}
    yield "GQA causal mask", [qkv[0].to(bf16), *(x.detach().to(bf16) for x in few), bias > -1], {"is_causal": True}
    mask = torch.rand(2, 1, 1, 40, generator=torch.Generator().manual_seed(9)) > 0.3
    yield "padding mask", [*qkv, mask], {}
    yield "bottom right", [make(1, 4, 20, 32), make(1, 2, 50, 32), make(1, 2, 50, 32), masks.Causal("bottom_right")], {}
    yield "bshd", [x.transpose(1, 2).contiguous() for x in qkv], {"layout": "bshd"}
    yield "rung dtype", [x.to(bf16) for x in qkv], {"accuracy": "dtype"}
    for n in (70, 71, 89):  # one decode bucket
        yield f"decode {n}", [make(1, 8, 1, 32, dtype=bf16), *(make(1, 2, n, 32, seed=i, dtype=bf16) for i in (1, 2))], {}
    for n in (30, 31, 32, 33, 34, 35, 36):  # lengths that churn
        yield f"length {n}", [make(1, 2, n, 16, seed=i) for i in range(3)], {}

def run():
    found = {}
    tuned.clear()
    for name, args, options in calls():
        outs = [fastattn.attention(*args, **options) for _ in range(2)]
        if outs[0].requires_grad:
            outs += torch.autograd.grad(outs[1].square().sum(), args)
        bits = [x.detach().float().contiguous().numpy().tobytes() for x in outs]
        explanation = fastattn.explain(*args, **options)
        found[name] = [explanation.served_by, hashlib.sha256(b"".join(bits[1:])).hexdigest(), bits[0] == bits[1]]
    return {"found": found, "tuned": list(tuned)}

result = [run()]
if sys.argv[1] == "cold":
    result.append(run())
    fastattn.clear()
    result.append(run())
print(json.dumps(result))
"""


WARM = ["warm", "cleared", "restarted", "server"]


@pytest.fixture
def runs(tmp_path):
    """What a cold process did, the same process again, after clear(), a new process on the same store, and a server on it."""

    def start(how, fresh=False, **extra):
        told = {"FASTATTN_CACHE_DIR": str(tmp_path / "store"), "PYTHONPATH": children.PATH, **extra}
        done = children.run(SCRIPT, how, env=told, fresh=fresh)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    cold, warm, cleared = start("cold")
    (restarted,) = start("warm", fresh=True)  # with hashes of its own
    (server,) = start("warm", FASTATTN_MODE="cached")
    return {"cold": cold, "warm": warm, "cleared": cleared, "restarted": restarted, "server": server}


def test_fault_67_choices_and_outputs_are_identical_cold_warm_and_restarted(runs):
    """Choices and outputs are the same cold, warm, after the tables were cleared, and in a new process."""
    the_cold_run_tunes_every_problem_once(runs["cold"]["tuned"])
    there_was_something_to_choose(runs["cold"]["found"])
    for when in WARM:
        assert runs[when]["tuned"] == [], when
        assert runs[when]["found"] == runs["cold"]["found"], when
    for when, run in runs.items():
        assert [name for name, (_, _, same) in run["found"].items() if not same] == [], (
            f"{when}: the second call differs"
        )


def the_cold_run_tunes_every_problem_once(tuned):
    assert len(tuned) == len(set(tuned))
    # 13 kinds, one of them a decode bucket, then 4 exact lengths and the bucket or buckets of the rest
    assert 17 < len(tuned) <= 13 + 4 + 2


def there_was_something_to_choose(found):
    """Else equal choices would say nothing: several kinds of winners, and not the default alone."""
    served = {name: winner for name, (winner, _, _) in found.items()}
    assert len(set(served.values())) >= 2 and served["decode 70"] != "default"
