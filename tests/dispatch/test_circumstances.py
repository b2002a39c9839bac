"""What a miss may do under every circumstance: the table exhaustively, then each circumstance for real.

For real means: the output is F.sdpa's, and nothing was tuned.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn import attention
from fastattn.dispatch import entries as entries_module
from fastattn.dispatch import resolve, tune_now
from fastattn.dispatch.attention import entries
from fastattn.dispatch.circumstances import (
    PASS,
    RULES,
    STORED,
    TUNE,
    Circumstances,
    is_restricted,
    may_remember,
    read_circumstances,
    what_is_allowed,
)
from fastattn.dispatch.session import session
from fastattn.environment.device import Device
from fastattn.environment.settings import current_settings, reload_settings
from fastattn.tuning.tune import tune_problem
from fastattn.verdicts.verdict import Outcome

F_sdpa = torch.nn.functional.scaled_dot_product_attention
EXPECTED = {  # written down once more, so that a changed row is a decision
    "off": PASS, "foreign": PASS, "other_device": PASS, "function_mode": PASS, "dispatch_mode": PASS, "functorch": PASS,
    "forward_ad": PASS, "jit_tracing": PASS, "restricted": PASS, "empty": PASS, "in_graph": STORED,
    "capturing": STORED, "deterministic": STORED, "distributed": STORED, "switched_off": STORED,
    "cached": STORED, "spent": STORED,
}  # fmt: skip
NAMES = [name for name, _, _ in RULES]


def test_an_ordinary_call_is_tuned_and_remembered():
    assert what_is_allowed(Circumstances())[0] == TUNE
    assert may_remember(Circumstances())


def test_every_row_has_an_expected_action():
    assert {name: action for name, action, _ in RULES} == EXPECTED
    reasons = [reason for _, _, reason in RULES]
    assert all(reasons) and len(set(reasons)) == len(RULES)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_first_row_that_holds_decides(size):
    for held in itertools.combinations(NAMES, size):  # combinations keep the order of the table
        action, why = what_is_allowed(Circumstances(**dict.fromkeys(held, True)))
        assert (action, why) == next((a, r) for name, a, r in RULES if name == held[0]), held


def test_passing_always_beats_serving_what_is_stored():
    for a, b in itertools.product(NAMES, NAMES):
        action = what_is_allowed(Circumstances(**{a: True, b: True}))[0]
        assert action == (PASS if PASS in (EXPECTED[a], EXPECTED[b]) else STORED), (a, b)


def test_nothing_is_remembered_that_passes_or_is_captured_or_compiled():
    for held in itertools.chain(itertools.combinations(NAMES, 1), itertools.combinations(NAMES, 2)):
        passing = any(EXPECTED[name] == PASS or name in ("capturing", "in_graph") for name in held)
        assert may_remember(Circumstances(**dict.fromkeys(held, True))) == (not passing), held


# --- for real


@pytest.fixture
def qkv():
    return tuple(torch.randn(1, 4, 20, 32) for _ in range(3))


@pytest.fixture
def never_tuned(monkeypatch):
    """Any tuning fails the test."""
    monkeypatch.setattr(tune_now, "tune_and_keep", lambda *_, **__: pytest.fail("tuned"))


def circumstances(*tensors):
    settings = current_settings()
    return read_circumstances([x for x in tensors if x is not None], settings, session.is_spent(settings))


def holds(name, *tensors):
    found = circumstances(*tensors)
    assert getattr(found, name), found
    return what_is_allowed(found)[0]


def serves_something():
    """Whether an entry of attention() leads to anything but a call that is passed on."""
    return any(not guard.leads_to[1] for guards in entries.table.values() for guard in guards)


def test_mode_off(qkv, never_tuned):
    with fastattn.options(mode="off"):
        assert holds("off", *qkv) == PASS
        assert torch.equal(attention(*qkv), F_sdpa(*qkv))
        assert torch.equal(attention(*qkv, kernel="sdpa_math"), F_sdpa(*qkv))  # plain F.sdpa everywhere
    assert not serves_something()


def test_mode_off_from_the_environment(qkv, never_tuned, monkeypatch):
    monkeypatch.setenv("FASTATTN_MODE", "off")
    reload_settings()
    assert torch.equal(attention(*qkv), F_sdpa(*qkv))
    assert not serves_something()


def test_mode_cached_records_the_miss(qkv, never_tuned):
    with fastattn.options(mode="cached"):
        assert holds("cached", *qkv) == STORED
        assert torch.equal(attention(*qkv), F_sdpa(*qkv))
    assert len(session.misses) == 1


def test_a_spent_budget(qkv, never_tuned, caplog):
    with fastattn.options(tune_budget=0.0):
        assert holds("spent", *qkv) == STORED
        for n in (18, 19, 20):
            cut = [x[:, :, :n] for x in qkv]
            assert torch.equal(attention(*cut), F_sdpa(*cut))
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1, "one warning a process and cause"
    assert "budget is spent" in warnings[0] and "fastattn tune 1x4x18x18x32" in warnings[0]


def test_a_stored_winner_serves_where_nothing_may_be_tuned(qkv, monkeypatch):
    verdict = fastattn.tune(problem_of(*qkv))[0]
    chosen = next(name for name in ("matmul", "torch_flash", "default") if verdict.trial(name) is not None)
    session.store(current_settings()).put(winning(verdict, chosen), Device.of(torch.device("cpu")))
    monkeypatch.setattr(tune_now, "tune_and_keep", lambda *_, **__: pytest.fail("tuned"))
    fastattn.clear()
    for change in ({"mode": "cached"}, {"tune_budget": 0.0}):
        with fastattn.options(**change):
            assert fastattn.explain(*qkv).served_by == chosen
            assert torch.allclose(attention(*qkv), F_sdpa(*qkv), atol=1e-5)


def problem_of(*args, **options):
    with fastattn.options(mode="cached"):
        return fastattn.explain(*args, **options).problem


def winning(verdict, name):
    """The verdict as if a candidate had won by far."""

    won = {"outcome": Outcome.TIMED, "reason": None, "time_us": 0.001}
    trials = tuple(t._replace(**won) if t.candidate == name else t for t in verdict.trials)
    return verdict._replace(winner=name, trials=trials)


def test_inside_sdpa_kernel_nothing_is_learnt(qkv, never_tuned):
    q, k, v = (x.bfloat16() for x in qkv)
    with sdpa_kernel(SDPBackend.MATH):
        assert holds("restricted", q, k, v) == PASS
        assert torch.equal(attention(q, k, v), F_sdpa(q, k, v))
    assert not serves_something() and not session.misses


def test_a_scope_with_an_order_restricts_a_gpu_alone():
    everything = [
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
        SDPBackend.CUDNN_ATTENTION,
    ]
    with sdpa_kernel(everything):
        assert not is_restricted("cuda", False) and not is_restricted("cpu", False) and is_restricted("cpu", True)
    with sdpa_kernel(everything[::-1], set_priority=True):
        assert is_restricted("cuda", False) and not is_restricted("cpu", False)
    assert not is_restricted("cuda", True), "outside of a scope"


def test_a_switched_off_backend_removes_that_kernel_and_nothing_else(qkv):
    before = {t.candidate: t.reason for t in fastattn.explain(*qkv).rows}
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        assert what_is_allowed(circumstances(*qkv))[0] == STORED, "F.sdpa is not what it usually is"
        after = {t.candidate: t.reason for t in fastattn.explain(*qkv).rows}
        with pytest.raises(fastattn.NoKernelError, match="switched off by torch.backends.cuda.enable_flash_sdp"):
            attention(*qkv, kernel="torch_flash")
        assert torch.allclose(attention(*qkv), F_sdpa(*qkv), atol=1e-5)
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
    assert before.pop("torch_flash") is None and "switched off" in after.pop("torch_flash")
    flash = [name for name in before if name.startswith("torch_flash+")]
    assert {n: r for n, r in before.items() if n not in flash} == {n: r for n, r in after.items() if n not in flash}


TRANSFORMS = {
    "vmap": lambda f, q: torch.func.vmap(f)(torch.stack([q, 2 * q])),
    "vmap in_dims 1": lambda f, q: torch.func.vmap(f, in_dims=1, out_dims=1)(torch.stack([q, 2 * q], 1)),
    "grad": lambda f, q: torch.func.grad(lambda x: f(x).square().sum())(q),
    "vjp": lambda f, q: torch.func.vjp(f, q)[1](torch.ones_like(q))[0],
    "functionalize": lambda f, q: torch.func.functionalize(f)(q),
    "vmap of grad": lambda f, q: torch.func.vmap(torch.func.grad(lambda x: f(x).square().sum()))(torch.stack([q, q])),
    "make_fx": lambda f, q: make_fx(f)(q)(2 * q),
    "jit.trace": lambda f, q: torch.jit.trace(f, (q,), check_trace=False)(2 * q),
    "jacrev": lambda f, q: torch.func.jacrev(lambda x: f(x).sum())(q),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("armed", [False, True], ids=["new", "armed"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore:There is a perf")
def test_fault_29_inside_a_transform(qkv, transform, armed, never_tuned):
    """Inside torch.func's transforms, make_fx and torch.jit.trace a call gives what F.sdpa gives, and nothing is kept of it."""
    q, k, v = qkv
    if armed:
        with fastattn.options(mode="cached"):
            attention(q, k, v, is_causal=True)
    before = sum(map(len, entries.table.values()))
    run = TRANSFORMS[transform]
    got = run(lambda x: attention(x, k, v, is_causal=True), q)
    want = run(lambda x: F_sdpa(x, k, v, is_causal=True), q)
    assert torch.equal(got, want)
    assert sum(map(len, entries.table.values())) == before


def test_jvp_and_dual_tensors(qkv, never_tuned):
    """Forward-mode AD: torch differentiates only its math kernel; ours passes on whatever F.sdpa does."""
    q, k, v = qkv
    with sdpa_kernel(SDPBackend.MATH):
        for run in (attention, F_sdpa):
            out, tangent = torch.func.jvp(lambda x: run(x, k, v), (q,), (torch.ones_like(q),))
            if run is attention:
                found = out, tangent
        assert torch.equal(found[0], out) and torch.equal(found[1], tangent)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(q, torch.ones_like(q))
            assert holds("forward_ad", dual, k, v) == PASS
            assert torch.equal(forward_ad.unpack_dual(attention(dual, k, v)).tangent, tangent)


def test_make_fx_keeps_sdpa_in_the_graph(qkv, never_tuned):
    graph = make_fx(lambda q: attention(q, *qkv[1:]))(qkv[0]).graph
    assert any("scaled_dot_product" in str(node.target) for node in graph.nodes)


def test_make_fx_with_fake_tensors(qkv, never_tuned):
    graph = make_fx(lambda q, k, v: attention(q, k, v, is_causal=True), tracing_mode="fake")(*qkv)
    assert torch.equal(graph(*qkv), F_sdpa(*qkv, is_causal=True))


def test_fake_tensors(never_tuned):
    with FakeTensorMode():
        q = torch.randn(2, 8, 20, 32, dtype=torch.bfloat16)
        k = torch.randn(2, 2, 30, 32, dtype=torch.bfloat16)
        out = attention(q, k, k)
        seen = attention(q.transpose(1, 2), k.transpose(1, 2), k.transpose(1, 2), layout="bshd")
    assert out.shape == (2, 8, 20, 32) and out.dtype is torch.bfloat16
    assert seen.shape == (2, 20, 8, 32)
    assert holds("foreign", q, k, k) == PASS


def test_meta_tensors(never_tuned):
    q, k = torch.randn(2, 8, 20, 32, device="meta"), torch.randn(2, 2, 30, 32, device="meta")
    assert holds("other_device", q, k, k) == PASS
    out = attention(q, k, k, is_causal=True)
    assert out.shape == (2, 8, 20, 32) and out.device.type == "meta"
    out = attention(q, k, k, fastattn.masks.Causal("bottom_right"))
    assert out.shape == (2, 8, 20, 32) and out.device.type == "meta"


def test_deterministic_mode(qkv, never_tuned):
    torch.use_deterministic_algorithms(True)
    try:
        assert holds("deterministic", *qkv) == STORED
        assert torch.equal(attention(*qkv), F_sdpa(*qkv))
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(session.misses) == 1


def test_fault_28_export(qkv, never_tuned):
    """torch.export takes a model that calls attention(), and the program gives F.sdpa's bits on other inputs."""

    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, is_causal=True)

    program = torch.export.export(Model(), qkv)
    other = tuple(torch.randn_like(x) for x in qkv)
    assert torch.equal(program.module()(*other), F_sdpa(*other, is_causal=True))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_that_are_not_jagged(never_tuned):
    x = torch.nested.nested_tensor([torch.randn(4, 5, 8), torch.randn(4, 3, 8)])
    assert holds("foreign", x, x, x) == PASS
    for got, want in zip(attention(x, x, x).unbind(), F_sdpa(x, x, x).unbind(), strict=True):
        assert torch.equal(got, want)


def test_fault_30_subclasses_reach_their_own_torch_function(never_tuned):
    """A Tensor subclass is asked by its own `__torch_function__`, and the output is of its class."""
    seen = []

    class Mine(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    x = torch.randn(1, 4, 20, 32).as_subclass(Mine)
    out = attention(x, x, x)
    assert type(out) is Mine
    assert any("scaled_dot_product" in str(f) for f in seen)


def test_a_default_device_is_no_mode_to_keep_away_from(qkv):
    with torch.device("cpu"):
        assert what_is_allowed(read_circumstances(list(qkv), current_settings(), False))[0] == TUNE
        torch.testing.assert_close(attention(*qkv), F_sdpa(*qkv))


@pytest.mark.parametrize("lengths", [(0, 4), (4, 0), (0, 0)])
def test_empty_inputs(lengths, never_tuned):
    q, k = torch.randn(2, 4, lengths[0], 8), torch.randn(2, 4, lengths[1], 8)
    assert holds("empty", q, k, k) == PASS
    assert torch.equal(attention(q, k, k), torch.zeros(2, 4, lengths[0], 8))


@pytest.mark.parametrize("reentrant", [False, True])
def test_fault_34_checkpointing_recomputes_with_the_same_kernel(reentrant, monkeypatch):
    """Activation checkpointing recomputes with the kernel that ran before, also with a tuner that would choose another.

    A tuner that flips: each tuning crowns another kernel. The recomputation must not meet the second one.
    """
    real, crowned = tune_problem, iter(["torch_math", "default", "torch_math", "default"])
    order = []

    def flipping(problem, settings, **how):
        verdict = winning(real(problem, settings, **how), next(crowned))
        order.append(verdict.winner)
        return verdict

    ran = []
    real_resolve = resolve.resolve_key

    def watched(*args):
        resolved = real_resolve(*args)
        return resolved._replace(call=lambda *a: (ran.append(resolved.candidate), resolved.call(*a))[1])

    monkeypatch.setattr(tune_now, "tune_problem", flipping)
    monkeypatch.setattr(resolve, "resolve_key", watched)
    q = torch.randn(1, 2, 20, 16, requires_grad=True)
    k, v = torch.randn(1, 2, 20, 16), torch.randn(1, 2, 20, 16)
    out = checkpoint(lambda x: attention(x * 1.0, k, v), q, use_reentrant=reentrant)
    out.sum().backward()
    exact = q.detach().double().requires_grad_()
    F_sdpa(exact, k.double(), v.double()).sum().backward()
    assert torch.allclose(q.grad.double(), exact.grad, atol=1e-5)
    trial = fastattn.explain(torch.randn(1, 2, 20, 16, requires_grad=True), k, v).verdict.trial("torch_math")
    assert trial.outcome is not Outcome.DEMOTED, "the end of the recomputation was taken for a failing kernel"
    if not reentrant:  # grad mode is the same both times: the same Call serves
        assert len(ran) == 2 and ran[0] == ran[1], ran
        assert len(order) == 1
    else:  # the first pass runs without gradients, which is another problem: both are tuned once
        assert len(ran) == 2 and len(order) == 2


def test_checkpointing_survives_a_clear_of_other_problems(monkeypatch):
    """Filling the table between forward and recomputation changes no choice: the verdict stays."""
    q, k = torch.randn(1, 2, 20, 16, requires_grad=True), torch.randn(1, 2, 20, 16)
    attention(q, k, k)
    before = fastattn.explain(q, k, k).served_by
    monkeypatch.setattr(entries_module, "LIMIT", 1)
    with fastattn.options(mode="cached"):
        attention(k, k, k)
    monkeypatch.setattr(tune_now, "tune_and_keep", lambda *_, **__: pytest.fail("tuned again"))
    attention(q, k, k)
    assert fastattn.explain(q, k, k).served_by == before
