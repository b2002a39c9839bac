"""Fault 85 of reference/faults2.md: what is public either pickles, and works in another process, or says what to do instead."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from fakes import FAST, Clock, add, honest, made_up, qkv, turn
from torch.nn.attention.flex_attention import create_block_mask

import fastattn
from fastattn.environment.settings import reload_settings
from fastattn.kernels import registry

OFF_HERE = "flash_attn_2"  # a kernel that no CPU has: to order it raises NoKernelError


@pytest.fixture
def matmul_wins(monkeypatch):
    """matmul is four times as fast as the default, by a clock that says so."""
    return turn(monkeypatch, Clock({"default": 4e-3, "matmul": FAST}))


def again(value, protocol=pickle.HIGHEST_PROTOCOL):
    return pickle.loads(pickle.dumps(value, protocol))


def no_kernel_error():
    with pytest.raises(fastattn.NoKernelError) as caught:
        fastattn.attention(*qkv(), kernel=OFF_HERE)
    return caught.value


def said(error):
    return [(d.name, getattr(d, "reasons", None)) for d in error.decisions]


def test_fault_85_a_process_pool_returns_errors_and_takes_plans(matmul_wins, monkeypatch):
    """What fastattn raises and returns goes from one process to another, a plan as what it was made from."""
    q, k, v = qkv()
    plan = fastattn.plan(q, k, v)
    assert plan.candidate == "matmul"
    monkeypatch.setenv("FASTATTN_MODE", "cached")  # the child finds the verdict in the store, or serves the default
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        failed = pool.submit(fastattn.attention, q, k, v, kernel=OFF_HERE)
        repeated = pool.submit(repr, plan)
        answered = pool.submit(plan, q, k, v)
        explained = pool.submit(fastattn.explain, q, k, v)
        error = failed.exception(120)
        assert repeated.result(120).startswith("Plan(matmul)\n")
        assert torch.equal(answered.result(120), plan(q, k, v))
        assert explained.result(120) == fastattn.explain(q, k, v)
    assert type(error) is fastattn.NoKernelError and OFF_HERE in str(error)
    assert said(error) == said(no_kernel_error())


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_fault_85_values_come_back_equal(protocol, matmul_wins):
    fastattn.attention(*qkv())
    found = fastattn.explain(*qkv())
    stats = fastattn.stats()
    for value in (found, found.problem, found.verdict, found.rows, fastattn.masks.Causal("bottom_right"), stats):
        assert again(value, protocol) == value
        assert copy.deepcopy(value) == value
    assert repr(again(stats)) == repr(stats) and repr(again(found)) == repr(found)
    for name in fastattn.__all__:
        value = getattr(fastattn, name)
        if name not in ("masks", "stats"):
            assert again(value, protocol) is value, name
    assert again(fastattn.stats)()["misses"] == stats["misses"]


def test_fault_85_an_error_keeps_its_reasons_and_its_rows():
    error = no_kernel_error()
    for other in (again(error), copy.copy(error), copy.deepcopy(error)):
        assert (type(other), str(other), other.decisions) == (type(error), str(error), error.decisions)
    assert isinstance(again(error), RuntimeError)
    assert str(again(fastattn.FastattnError("no"))) == "no"


def test_fault_85_an_error_about_a_kernel_that_the_other_process_lacks_can_still_be_read(monkeypatch):
    with monkeypatch.context() as here:
        add(here, made_up("mine", honest, dtypes=("float64",)))
        with pytest.raises(fastattn.NoKernelError) as caught:
            fastattn.attention(*qkv(), kernel="mine")
        sent = pickle.dumps(caught.value)
    other = pickle.loads(sent)
    assert not registry.is_known("mine")
    assert said(other) == said(caught.value) and "mine" in dict(said(other))
    with pytest.raises(ImportError, match="'mine'.*register it in this process"):
        next(d for d in other.decisions if d.name == "mine").kernel.load()


CALLS = {
    "bshd causal": {"layout": "bshd", "is_causal": True},
    "decode": {"q_len": 1, "kv_len": 70},
    "GQA bottom right": {"kv_heads": 2, "kv_len": 80, "mask": fastattn.masks.Causal("bottom_right")},
    "bool mask": {"mask": torch.rand(64, 64, generator=torch.Generator().manual_seed(1)) > 0.3},
    "gradients": {"grad": True},
    "an order": {"kernel": "sdpa_math", "scale": 0.3, "softcap": 9.0, "window": (7, 0), "return_lse": True},
    "rung": {"dtype": torch.bfloat16, "accuracy": "dtype"},
}


def made(grad=False, layout="bhsd", **how):
    """(q, k, v), options of one of CALLS."""
    shape = {name: how.pop(name) for name in ("q_len", "kv_len", "kv_heads", "dtype") if name in how}
    tensors = qkv(**shape, grad=grad)
    if layout == "bshd":
        tensors = [x.transpose(1, 2).contiguous() for x in tensors]
    return tensors, {**how, "layout": layout}


@pytest.mark.parametrize("call", CALLS)
def test_fault_85_a_plan_resolves_anew_what_it_was_made_from(call, matmul_wins):
    tensors, options = made(**CALLS[call])
    plan = fastattn.plan(*tensors, **options)
    other = again(plan)
    assert (other.candidate, other.kv_lens) == (plan.candidate, plan.kv_lens)
    assert other.explanation == fastattn.plan(*tensors, **options).explanation
    mask = options.get("mask")
    ours, theirs = (torch.utils._pytree.tree_leaves(p(*tensors, mask)) for p in (plan, other))
    assert all(map(torch.equal, ours, theirs))


def test_fault_85_a_plan_follows_what_the_loading_process_has_found(matmul_wins, tmp_path):
    sent = pickle.dumps(fastattn.plan(*qkv()))
    assert pickle.loads(sent).candidate == "matmul"
    with fastattn.options.scope(mode="off"):
        assert pickle.loads(sent).candidate == "default"
    matmul_wins.costs["matmul"] = 9e-3
    with fastattn.options.scope(cache_dir=str(tmp_path)):  # nothing is stored there: it tunes, as plan() would
        assert pickle.loads(sent).candidate == "default"


def test_fault_85_a_plan_keeps_the_options_it_was_made_under(matmul_wins):
    with fastattn.options.scope(kernels="torch_math", accuracy="dtype"):
        plan = fastattn.plan(*qkv())
    assert plan.candidate != "matmul" == fastattn.plan(*qkv()).candidate
    with torch.autocast("cpu", torch.bfloat16):
        cast = fastattn.plan(*qkv(), kernel="matmul")
    for each in (plan, cast):
        other = again(each)
        assert other.candidate == each.candidate
        assert other.explanation.problem == each.explanation.problem
        assert other(*qkv()).dtype == each(*qkv()).dtype
    assert again(plan).explanation.problem.accuracy == "dtype"
    assert again(cast)(*qkv()).dtype is torch.bfloat16


def test_fault_85_a_plan_keeps_that_its_kernel_is_trainings():
    with fastattn.options.scope(same_kernel_in_training=True, mode="cached"):
        plan = fastattn.plan(*qkv())
    assert plan.explanation.problem.needs_grad, "as in training"
    with fastattn.options.scope(mode="cached"):
        assert again(plan).explanation.problem.needs_grad


def test_fault_85_a_model_that_holds_a_plan_is_copied_without_resolving_it_again(matmul_wins):
    plan = fastattn.plan(*qkv())
    misses = fastattn.stats()["misses"]
    assert copy.deepcopy(plan) is plan and copy.copy(plan) is plan
    assert fastattn.stats()["misses"] == misses


def test_fault_85_what_cannot_go_to_another_process_says_what_to_do_there():
    with fastattn.patch() as handle:
        with pytest.raises(TypeError, match=r"fastattn.patch\(\) in the other process"):
            pickle.dumps(handle)
        assert copy.deepcopy(handle) is handle
    with pytest.raises(TypeError, match=r"fastattn.options\(\.\.\.\) in the other process"):
        pickle.dumps(fastattn.options(tune_budget=7.0))
    reload_settings()
    scope = fastattn.options.scope(tune_budget=7.0)
    with again(scope) as settings:
        assert settings.tune_budget == 7.0
    with scope, pytest.raises(TypeError, match=r"before it is entered"):
        pickle.dumps(scope)


def halved(score, b, h, q, kv):
    return score / 2


@pytest.mark.usefixtures("untuned")
def test_fault_85_a_plan_with_a_function_of_the_callers_own():
    plan = fastattn.plan(*qkv(), score_mod=halved)
    assert again(plan).candidate == plan.candidate == "flex"
    mask = create_block_mask(lambda b, h, q, kv: q >= kv, None, None, 64, 64, device="cpu")
    for nameless in ({"score_mod": lambda score, *at: score / 2}, {"mask": mask}):
        with pytest.raises(TypeError, match=r"fastattn.plan\(\) in the other process"):
            pickle.dumps(fastattn.plan(*qkv(), **nameless))
