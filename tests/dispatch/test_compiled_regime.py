"""`fastattn.tune(compiled=True)`: candidates timed in compiled code, whose verdict serves compiled code and nobody else."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from fakes import Clock, turn
from graphs import Graphs, exact, qkv

import fastattn
from fastattn import attention, masks
from fastattn.dispatch import compiled_region
from fastattn.dispatch.session import session
from fastattn.environment.device import Device
from fastattn.environment.settings import current_settings
from fastattn.planning import binding, candidates
from fastattn.planning.decision import Accepted
from fastattn.verdicts.verdict import Outcome, Trial, Verdict

pytestmark = pytest.mark.usefixtures("untuned")
EAGER = {"default": 4e-3, "matmul": 1e-3}  # seconds
IN_A_GRAPH = {"default": 4e-3, "torch_math": 1e-3}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def made_up(monkeypatch):
    """A made-up clock, by which torch_math is fast in a graph and matmul outside; nothing is compiled in a tuning."""
    clock = turn(monkeypatch, Clock(dict(EAGER)))

    def compiled(function):
        def run(*given):
            clock.costs = IN_A_GRAPH
            try:
                return function(*given)
            finally:
                clock.costs = EAGER

        return run

    monkeypatch.setattr(compiled_region, "compiled", compiled)
    return clock


def traced(call, *given):
    graphs = Graphs()
    return torch.compile(call, backend=graphs, fullgraph=True)(*given), graphs


def store(winner, *given, compiled, lengths="exact", **options):
    """The first candidate of this kernel won, in compiled code or in eager code."""
    said = fastattn.explain(*given, **options)
    problem = said.problem.bucketed(lengths).replace(compiled=compiled)
    winner = next(row.candidate for row in said.rows if row.candidate.split("+")[0] == winner)
    verdict = Verdict(problem, winner, (Trial("default", time_us=9.0), Trial(winner, time_us=1.0)))
    session.store(current_settings()).put(verdict, Device.of(given[0].device))
    fastattn.clear()


def test_what_wins_in_a_graph_serves_graphs_alone(made_up):
    given = qkv()
    eager = fastattn.explain(*given).problem
    assert [v.winner.split("+")[0] for v in fastattn.tune(eager)] == ["matmul"]
    [verdict] = fastattn.tune(eager, compiled=True)
    assert (verdict.problem, verdict.winner.split("+")[0]) == (eager.replace(compiled=True), "torch_math")
    fastattn.clear()  # from the files alone
    assert fastattn.explain(*given).served_by.startswith("matmul")
    said = fastattn.explain(*given, compiled=True)
    assert said.served_by.startswith("torch_math") and str(said.problem).endswith(", compiled")


def test_a_graph_takes_its_own_verdict_first_and_else_that_of_eager_code():
    given = qkv()
    store("matmul", *given, compiled=False)
    out, graphs = traced(lambda q, k, v: attention(q, k, v), *given)
    assert graphs.has("baddbmm") and torch.allclose(out, exact(*given), atol=1e-5)
    said = fastattn.explain(*given, compiled=True)
    assert said.served_by == "matmul" and "nothing is tuned for compiled code" in said.why
    store("torch_math", *given, compiled=True)
    torch._dynamo.reset()
    out, graphs = traced(lambda q, k, v: attention(q, k, v), *given)
    assert graphs.has("_scaled_dot_product_attention_math") and not graphs.has("baddbmm")
    assert torch.allclose(out, exact(*given), atol=1e-5)


def test_where_the_default_won_in_a_graph_it_serves_graphs():
    given = qkv()
    store("matmul", *given, compiled=False)
    store("default", *given, compiled=True)
    _, graphs = traced(lambda q, k, v: attention(q, k, v), *given)
    assert graphs.has("scaled_dot_product_attention>")


def test_eager_code_does_not_look_for_it():
    given = qkv()
    store("torch_math", *given, compiled=True)
    store("matmul", *given, compiled=False)
    attention(*given)
    assert fastattn.explain(*given).served_by == "matmul"
    assert not any(problem.compiled for _, _, problem in session.verdicts)


def test_a_bucket_takes_the_verdict_of_compiled_code_first():
    store("matmul", *qkv(40), compiled=False, lengths="all")
    store("torch_math", *qkv(40), compiled=True, lengths="all")
    given = qkv(40)
    for x in given:
        torch._dynamo.mark_dynamic(x, 2)
    _, graphs = traced(lambda q, k, v: attention(q, k, v), *given)
    assert graphs.count == 1 and graphs.has("_scaled_dot_product_attention_math") and not graphs.has("baddbmm")


@pytest.mark.parametrize("options", [{"window": (5, 0)}, {"mask": masks.Causal() & masks.Document((10, 14))}], ids=str)
def test_the_operator_serves_by_the_verdict_of_compiled_code(options):
    given = qkv()
    store("torch_math", *given, compiled=False, **options)
    store("matmul", *given, compiled=True, **options)
    fastattn.stats.reset()
    out, graphs = traced(lambda q, k, v: attention(q, k, v, **options), *given)
    if graphs.has("fastattn.attend"):
        assert [name.split("+")[0] for name in fastattn.stats()["served_by"]] == ["matmul"]
    else:
        assert graphs.has("bmm")
    assert torch.allclose(out, exact(*given, **options), atol=1e-5)
    fastattn.stats.reset()
    attention(*given, **options)
    assert [name.split("+")[0] for name in fastattn.stats()["served_by"]] == ["torch_math"]


def accepted(problem):
    found = candidates.decisions(problem, Device.of(torch.device("cpu")), current_settings())
    return {d.name: d for d in found if isinstance(d, Accepted)}


def test_a_candidate_that_breaks_the_graph_is_timed_by_the_operator(monkeypatch):
    """A loop over blocks would be unrolled; a mask with a meaning is never a mask of queries by keys."""
    graphs = Graphs()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
    cases = {
        "matmul": ({"is_causal": True}, False), "matmul+chunks": ({"is_causal": True}, True),
        "default": ({"window": (5, 0)}, True), "torch_flash": ({}, False),
    }  # fmt: skip
    given = qkv(700, batch=1)
    for name, (options, is_operator) in cases.items():
        problem = fastattn.explain(*given, **options).problem
        found = accepted(problem)
        candidate = found.get(name) or next(d for each, d in found.items() if each.startswith(name.split("+")[0]))
        call = binding.bind(candidate, problem, None)
        graphs.count = 0
        graphs.operators.clear()
        out = compiled_region.Region(problem)(candidate, problem, None, call)(*given, None)
        assert graphs.has("fastattn.attend") is is_operator, name
        assert graphs.count == 1 and torch.allclose(out, exact(*given, **options), atol=1e-5), name


def test_what_the_compiler_makes_of_a_candidate_is_judged(made_up, monkeypatch):
    """Were the compiler wrong, no time would make that candidate a winner."""
    right = compiled_region.compiled

    def wrong(function):
        run = right(function)

        def call(*given):
            out = run(*given)
            return out * 1.01 if made_up.ran[-1].startswith("torch_math") else out

        return call

    monkeypatch.setattr(compiled_region, "compiled", wrong)
    problem = fastattn.explain(*qkv()).problem
    [verdict] = fastattn.tune(problem, compiled=True)
    out = [t for t in verdict.trials if t.candidate.startswith("torch_math")]
    assert out and all(t.outcome is Outcome.INACCURATE for t in out) and not verdict.winner.startswith("torch_math")


def test_compiling_is_no_part_of_a_run(made_up, monkeypatch):
    """The first run of a graph compiles it: it is the candidate's first call, and not in its time."""
    faster = compiled_region.compiled

    def compiled(function):
        run, is_new = faster(function), [True]

        def call(*given):
            made_up.seconds += 5.0 if is_new.pop() else 0.0
            is_new.append(False)
            return run(*given)

        return call

    monkeypatch.setattr(compiled_region, "compiled", compiled)
    problem = fastattn.explain(*qkv()).problem
    [verdict] = fastattn.tune(problem, compiled=True)
    trial = verdict.trial(verdict.winner)
    assert trial.candidate.startswith("torch_math") and trial.time_us < 2e3 and trial.first_call_us >= 5e6


def test_training_in_compiled_code(made_up):
    given = qkv(grad=True)
    problem = fastattn.explain(*given, is_causal=True).problem
    [verdict] = fastattn.tune(problem, compiled=True)
    assert verdict.winner.startswith("torch_math") and verdict.trial(verdict.winner).backward is not None


def test_what_trains_by_the_operator_makes_its_forward_twice():
    given = qkv(grad=True)
    problem = fastattn.explain(*given, is_causal=True).problem
    candidate, calls = accepted(problem)["matmul+recompute"], []
    bound = binding.bind(candidate, problem, None)

    def call(*tensors):
        calls.append(torch.is_grad_enabled())
        return bound(*tensors)

    out = compiled_region.Region(problem)(candidate, problem, None, call)(*given, None)
    assert calls == [False, True] and torch.allclose(out, exact(*given, is_causal=True), atol=1e-5)
    out.sum().backward()


def test_a_model_is_run_for_its_problems(made_up):
    """A compiled model too: it is run as it was before."""

    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, is_causal=True)

    for model in (Model(), torch.compile(Model(), backend=Graphs())):
        fastattn.clear()
        [verdict] = fastattn.tune(model, *qkv(), compiled=True)
        assert verdict.problem.compiled and verdict.problem.causal == "top_left"


def test_dropout_is_refused():
    problem = fastattn.explain(*qkv(), dropout_p=0.1).problem
    with pytest.raises(ValueError, match="draws its own dropout"):
        fastattn.tune(problem, compiled=True)


@pytest.mark.long
@pytest.mark.parametrize("grad", [False, True])
def test_inductor_compiles_all_candidates(monkeypatch, grad):
    """For real: each candidate's numbers pass in compiled code, or it is out for a reason that eager code gives too."""
    given = qkv(grad=grad)
    problem = fastattn.explain(*given, is_causal=True).problem
    [eager], [verdict] = fastattn.tune(problem, force=True), fastattn.tune(problem, compiled=True)
    slow = (Outcome.TIMED, Outcome.TOO_SLOW)
    for t in verdict.trials:
        before = eager.trial(t.candidate)
        assert t.outcome is before.outcome or (t.outcome in slow and before.outcome in slow), t
