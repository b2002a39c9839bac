"""Fault 80: torch's default dtype and default device never matter, as no tensor is made without its own."""

from __future__ import annotations

import ast
import contextlib
from pathlib import Path

import children
import pytest
import torch
from changes import changed
from fakes import Clock, add, honest, made_up, problem, qkv, turn
from torch.utils import _device

import fastattn
from fastattn.environment.settings import current_settings
from fastattn.tuning.accuracy import judge, probes
from fastattn.tuning.accuracy.judge import judges_of_problem
from fastattn.tuning.tune import tune_problem
from fastattn.verdicts.verdict import Outcome

SOURCE = Path(fastattn.__file__).parent

# --- the lint

# what else makes a tensor, beside torch's own list of functions that a default device reaches
MAKERS = {"tensor", "as_tensor", "asarray", "scalar_tensor", "normal", "from_file", "complex", "Tensor", "FloatTensor",
          "HalfTensor", "BFloat16Tensor", "DoubleTensor", "LongTensor", "BoolTensor"}  # fmt: skip
FACTORIES = {f.__name__ for f in _device._device_constructors() if getattr(torch, f.__name__, None) is f} | MAKERS


def made_without(source):
    """(line, call) of every tensor that a source makes without naming its dtype and its device."""
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "torch"]
    imported = {alias.asname or alias.name for node in imports for alias in node.names if alias.name in FACTORIES}
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    named = set()
    for node in calls:
        if {"dtype", "device"} <= {word.arg for word in node.keywords}:
            is_partial = node.args and ast.unparse(node.func) in ("partial", "functools.partial")
            named.add(id(node.args[0] if is_partial else node.func))
    called = {id(node.func) for node in calls}
    for node in nodes:
        text = ast.unparse(node) if isinstance(node, (ast.Attribute, ast.Name)) else ""
        name = text.removeprefix("torch.") if text not in imported else text
        is_one = text in imported or (text.startswith("torch.") and name in FACTORIES)
        is_type = name.endswith("Tensor") and id(node) not in called  # in an annotation, say
        if is_one and not is_type and id(node) not in named:
            yield node.lineno, text


def test_fault_80_no_tensor_is_made_without_dtype_and_device():
    """torch's default dtype and default device never change a verdict: every tensor is made with its own dtype and device."""
    found = [(str(p.relative_to(SOURCE)), *each) for p in SOURCE.rglob("*.py") for each in made_without(p.read_text())]
    assert not found


@pytest.mark.parametrize("bad", [
    "torch.zeros(3)", "torch.zeros(3, dtype=torch.int8)", "torch.arange(4, device=x.device)", "torch.tensor(0.5)",
    "f = torch.randn", "partial(torch.ones, device='cpu')",
    "from torch import full\nfull((2,), 0)", "torch.Tensor(3)", "torch.eye(n).to(x)",
])  # fmt: skip
def test_fault_80_the_lint_sees_it(bad):
    assert list(made_without(bad))


@pytest.mark.parametrize("good", [
    "torch.zeros(3, dtype=x.dtype, device=x.device)", "torch.zeros_like(x)", "x.new_empty(3)", "def f(x: torch.Tensor): ...",
    "partial(torch.ones, dtype=t, device='cpu')", "from torch import Tensor, arange\narange(3, dtype=t, device=d)",
])  # fmt: skip
def test_fault_80_the_lint_lets_it_pass(good):
    assert not list(made_without(good))


# --- what a tuning finds


def default_dtype(dtype):
    return changed(torch.get_default_dtype, torch.set_default_dtype, dtype)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


DEFAULTS = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "set_default_device(meta)": lambda: default_device("meta"),
    "with torch.device(meta)": lambda: torch.device("meta"),
}
PROBLEMS = {
    "dropout in float64": {"dtype": "float64", "dropout": True},
    "dropout in float32, training": {"dropout": True, "needs_grad": True},
    "training with a bias that asks for a gradient": {
        "needs_grad": True, "mask": "float32", "mask_shape": "1hqk", "mask_grad": True},
    "a bool mask in bfloat16": {"dtype": "bfloat16", "mask": "bool", "mask_shape": "b11k"},
    "rows that are sampled": {"q_len": 1500, "kv_len": 64, "q_heads": 1, "kv_heads": 1, "head_dim": 8, "head_dim_v": 8},
    "log-sum-exp, window, broadcast heads": {
        "lse": True, "window": (5, 5), "strides": ("contiguous", "expanded", "expanded")},
}  # fmt: skip


def found(p):
    """What every candidate came to."""
    trials = tune_problem(p, current_settings(), thorough=True).trials
    return {t.candidate: (t.outcome, t.forward, t.backward) for t in trials}


@pytest.mark.parametrize("name", PROBLEMS)
def test_fault_80_defaults_change_no_number_of_a_verdict(name, monkeypatch):
    turn(monkeypatch, Clock(other=4e-3))
    monkeypatch.setattr(judge, "ROW_LIMIT", 2**14)  # 1500 rows on 64 keys are many
    p = problem(**PROBLEMS[name])
    assert (judge.row_sample(p, torch.device("cpu")) is not None) is (name == "rows that are sampled")
    usual = found(p)
    assert any(outcome is Outcome.TIMED for outcome, *_ in usual.values()), usual
    assert any(forward for _, forward, _ in usual.values())
    for default, context in DEFAULTS.items():
        with context():
            assert found(p) == usual, default


@pytest.mark.parametrize("needs_grad", [False, True])
def test_fault_80_dropout_in_float64_is_judged_in_float64(needs_grad, monkeypatch):
    turn(monkeypatch, Clock(other=4e-3))
    for candidate, (outcome, forward, _) in found(
        problem(dtype="float64", dropout=True, needs_grad=needs_grad)
    ).items():
        assert outcome is not Outcome.INACCURATE, (candidate, forward)


@pytest.mark.parametrize("default", DEFAULTS)
def test_fault_80_the_first_call_under_a_default_is_served_and_stored_as_any(default, monkeypatch, own_store):
    turn(monkeypatch, Clock({"default": 4e-3, "quick": 1e-3}))
    add(monkeypatch, made_up("quick", honest))
    q, k, v = qkv(48, grad=True)
    with DEFAULTS[default]():
        out = fastattn.attention(q, k, v)
        assert out.dtype is torch.float32 and out.device.type == "cpu"
        assert fastattn.explain(q, k, v).served_by == "quick"
    assert len(list(own_store.rglob("*.json"))) == 1


# --- the probes see rounding


def rounding(to):
    def run(q, k, v, mask, a):
        return honest(*(x.to(to).to(x.dtype) for x in (q, k, v)), mask, a)

    return run


ROUNDS = {"float64": torch.float32, "float32": torch.bfloat16, "float16": torch.bfloat16}


@pytest.mark.parametrize("default", ["usual", *DEFAULTS])
@pytest.mark.parametrize("dtype", ROUNDS)
def test_fault_80_inputs_that_a_kernel_rounds_are_seen(dtype, default, monkeypatch):
    """Its arithmetic is exact: only numbers with more digits than it keeps can tell."""
    add(monkeypatch, made_up("rounding", rounding(ROUNDS[dtype])))
    turn(monkeypatch, Clock(other=4e-3))
    with DEFAULTS[default]() if default in DEFAULTS else contextlib.nullcontext():
        assert found(problem(dtype=dtype))["rounding"][0] is Outcome.INACCURATE


@pytest.mark.parametrize("dtype, digits", [("float64", 40), ("float32", 20), ("bfloat16", 7)])
def test_fault_80_probes_use_the_digits_of_their_dtype(dtype, digits):
    p = problem(dtype=dtype, mask=dtype, mask_shape="11qk")
    with DEFAULTS["bfloat16"]():
        sample = judges_of_problem(p, torch.device("cpu"))[0].sample
        plain = probes.plain_sample(p, torch.device("cpu"))
    for x in (sample.q, sample.k, sample.v, plain.q, plain.v):
        mantissa, _ = torch.frexp(x.double()[x != 0])
        assert (torch.remainder(mantissa * 2.0**digits, 1) != 0).any(), "its numbers end before that digit"


IMPORTED = """
import torch
{set_up}
import fastattn
from fastattn.dispatch import guard
from fastattn.cli.doctor import command
assert guard.NATIVE
q = torch.randn(1, 2, 8, 16, dtype=torch.float32, device="cpu")
fastattn.attention(q, q, q); fastattn.attention(q, q, q)
assert fastattn.stats()["hits"] == 1
"""


@pytest.mark.parametrize("set_up", [
    "torch.set_default_dtype(torch.bfloat16)", "torch.set_default_device('meta')",
    pytest.param("torch.set_default_dtype(torch.float64)", marks=pytest.mark.long),
])  # fmt: skip
def test_fault_80_fastattn_may_be_imported_under_any_default(set_up):
    done = children.run(IMPORTED.format(set_up=set_up), env={"FASTATTN_MODE": "cached"})
    assert done.returncode == 0, done.stderr
