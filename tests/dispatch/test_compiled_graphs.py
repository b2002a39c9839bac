"""What stands in a graph of torch.compile: the stored winner of a bucket of lengths, one operator for what cannot, no warning.

Most graphs run by an eager backend: what is asked is which operators they hold, how often Dynamo traced, and the numbers.
"""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from graphs import Graphs, compiled, exact, fresh, qkv, store  # noqa: F401  (fresh is used by its name)
from torch.nn.attention.bias import causal_lower_right

import fastattn
from fastattn import attention, masks
from fastattn.dispatch.session import session
from fastattn.problems.spelling import command_line

TORCHS = F.scaled_dot_product_attention


# --- warnings

MASK = torch.rand(24, 24, generator=torch.Generator().manual_seed(3)) > 0.3
BIAS = causal_lower_right(24, 24)
CALLS = {
    "attention": lambda q, k, v: attention(q, k, v, is_causal=True),
    "sdpa": lambda q, k, v: fastattn.sdpa(q, k, v, enable_gqa=True),
    "patched": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    "Causal": lambda q, k, v: attention(q, k, v, masks.Causal("bottom_right")),
    "a bias of torch": lambda q, k, v: attention(q, k, v, BIAS),
    "dense": lambda q, k, v: attention(q, k, v, MASK),
    "dense float": lambda q, k, v: attention(q, k, v, MASK[None, None].float()),
    "documents": lambda q, k, v: attention(q, k, v, masks.Causal() & masks.Document((10, 14))),
    "dropout and documents": lambda q, k, v: attention(q, k, v, masks.Document((10, 14)), dropout_p=0.5),
    "softcap": lambda q, k, v: attention(q, k, v, softcap=3.0, return_lse=True),
}


AT_LENGTH = ("softcap", "dropout and documents")


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.long if name in AT_LENGTH else []) for name in CALLS
])  # fmt: skip
def test_tracing_warns_of_nothing(name, dynamic):
    run, graphs = compiled(CALLS[name], dynamic=dynamic)
    with fastattn.patch(), warnings.catch_warnings():
        warnings.simplefilter("error")
        run(*qkv())
    assert graphs.count == 1


@pytest.mark.parametrize(
    "winner", ["torch_flash", "matmul", "torch_math", pytest.param("flex", marks=pytest.mark.long)]
)
def test_a_winner_in_the_graph_warns_of_nothing(winner):
    given = qkv()
    store(winner, *given, is_causal=True)
    run, graphs = compiled(CALLS["attention"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = run(*given)
    assert not graphs.has("scaled_dot_product_attention>")
    assert torch.allclose(out, exact(*given, is_causal=True), atol=1e-5)


def test_a_frame_that_dynamo_gave_up_does_not_have_our_code_compiled():
    """Else each function of a miss becomes a graph of its own, with warnings of caches and of posix.stat."""

    def call(q, k, v):
        def parts():
            torch._dynamo.graph_break()
            yield attention(q, k, v)
            yield fastattn.sdpa(q, k, v, enable_gqa=True)

        return list(parts())

    graphs, given = Graphs(), qkv()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = torch.compile(call, backend=graphs)(*given)
    assert graphs.count == 0
    assert all(torch.allclose(out, exact(*given), atol=1e-5) for out in found)


def test_layers_with_different_winners_stand_in_one_graph():
    given = qkv()
    store("matmul", *given)
    store("torch_math", *given, is_causal=True)

    def call(q, k, v):
        return attention(attention(q, k, v), k, v, is_causal=True)

    run, graphs = compiled(call)
    assert torch.allclose(run(*given), exact(exact(*given), *given[1:], is_causal=True), atol=1e-5)
    assert graphs.has("baddbmm") and graphs.has("_scaled_dot_product_attention_math")


def test_a_second_model_does_not_have_the_first_one_compiled_again():
    given = qkv()
    store("matmul", *given)
    runs = [compiled(lambda q, k, v, n=n: attention(q, k, v) * n) for n in (1, 2)]
    for _ in range(2):
        for run, _ in runs:
            run(*given)
    assert [graphs.count for _, graphs in runs] == [1, 1]


# --- a winner of a bucket where lengths are symbols


def lengths_of(*pairs, **more):
    return [qkv(*pair, **more) for pair in pairs]


def traced_on(call, given, *, dynamic=None, mark=()):
    """(outputs, graphs) of calls on these inputs, the dimensions `mark` of all of them being symbols."""
    run, graphs = compiled(call, dynamic=dynamic)
    outs = []
    for tensors in given:
        for dim in mark:
            for x in tensors:
                torch._dynamo.mark_dynamic(x, dim)
        outs.append(run(*tensors))
    return outs, graphs


WINNERS = ["torch_flash", "torch_flash+gqa_fold", "matmul", "torch_math", "sdpa_math"]


BUCKETS = [  # each winner once, the rest for -m long
    pytest.param(winner, layout, marks=[] if (i - j) % 3 == 0 else pytest.mark.long)
    for i, winner in enumerate(WINNERS)
    for j, layout in enumerate(("bhsd", "bshd", "sbhd"))
]


@pytest.mark.parametrize(("winner", "layout"), BUCKETS)
def test_a_stored_bucket_serves_all_its_lengths_by_one_graph(winner, layout):
    def call(q, k, v):
        return attention(q, k, v, layout=layout)

    store(winner, *qkv(40, layout=layout), lengths="all", layout=layout)
    given = lengths_of((40,), (37,), (48,), (33,), layout=layout)
    outs, graphs = traced_on(call, given, mark=[layout.index("s")])
    assert graphs.count == 1
    assert not graphs.has("scaled_dot_product_attention>")
    for tensors, out in zip(given, outs, strict=True):
        assert torch.allclose(out, exact(*tensors, layout=layout), atol=1e-5)


def test_one_graph_for_each_bucket_with_a_winner_and_one_for_the_rest():
    for length, winner in ((40, "matmul"), (60, "torch_math")):
        store(winner, *qkv(length), lengths="all")
    lengths = (20, 33, 48, 49, 64, 65, 200, 22)
    _, graphs = traced_on(lambda q, k, v: attention(q, k, v), lengths_of(*((n,) for n in lengths)), mark=[2])
    assert graphs.count == 4  # below, 33 to 48, 49 to 64, above
    assert graphs.has("_scaled_dot_product_attention_math") and graphs.has("baddbmm")


def test_neighbours_with_the_same_winner_are_one_graph():
    for length in (20, 40, 60):
        store("torch_math", *qkv(length), lengths="all")
    given = lengths_of(*((n,) for n in (17, 32, 33, 48, 49, 64)))
    _, graphs = traced_on(lambda q, k, v: attention(q, k, v), given, mark=[2])
    assert graphs.count == 1 and graphs.has("_scaled_dot_product_attention_math")


def test_a_decode_takes_the_winner_of_its_bucket_of_keys():
    store("torch_flash+gqa_fold", *qkv(1, 40), lengths="kv")
    given = lengths_of((1, 34), (1, 35), (1, 48), (1, 49), (1, 70))
    counts = []
    for call in (lambda q, k, v: attention(q, k, v), lambda q, k, v: TORCHS(q, k, v, enable_gqa=True)):
        torch._dynamo.reset()
        outs, graphs = traced_on(call, given)
        counts.append(graphs.count)
        for tensors, out in zip(given, outs, strict=True):
            assert torch.allclose(out, exact(*tensors), atol=1e-5)
    assert counts[0] <= counts[1] + 1


def test_a_slice_of_a_cache_is_looked_up_as_what_it_is():
    def sliced(n):
        q, k, v = qkv(1, 128)
        return q, k[:, :, :n], v[:, :, :n]

    store("torch_flash+gqa_fold", *sliced(40), lengths="kv")
    given = [sliced(n) for n in (33, 40, 48)]
    outs, graphs = traced_on(lambda q, k, v: attention(q, k, v), given, dynamic=None)
    assert graphs.count == 2 and graphs.has("_scaled_dot_product_flash_attention_for_cpu")  # the first is static
    assert all(torch.allclose(out, exact(*x), atol=1e-5) for out, x in zip(outs, given, strict=True))


def test_a_batch_that_is_a_symbol_is_in_a_bucket_too():
    store("matmul", *qkv(40, batch=4), lengths="all")
    given = [qkv(n, batch=batch) for n, batch in ((40, 3), (41, 4), (40, 5))]
    outs, graphs = traced_on(lambda q, k, v: attention(q, k, v), given, mark=[0, 2])
    assert graphs.count == 2  # a batch of 5 is of another bucket
    assert all(torch.allclose(out, exact(*x), atol=1e-5) for out, x in zip(outs, given, strict=True))


def test_a_square_problem_is_no_other_of_its_bucket():
    store("matmul", *qkv(40), lengths="all", is_causal=True)
    given = lengths_of((40, 44), (40, 40))
    for tensors, has in zip(given, (False, True), strict=True):
        torch._dynamo.reset()
        [out], graphs = traced_on(lambda q, k, v: attention(q, k, v, is_causal=True), [tensors], mark=[2])
        assert graphs.has("baddbmm") is has
        assert torch.allclose(out, exact(*tensors, is_causal=True), atol=1e-5)


def test_a_candidate_that_cannot_do_an_end_of_the_bucket_does_not_serve_it(monkeypatch):
    from fastattn.dispatch import compiled_buckets

    store("matmul", *qkv(40), lengths="all")
    real = compiled_buckets.candidates.decide

    def decide(kernel, problem, *more, **options):
        return [] if problem.q_len == 48 and kernel.name == "matmul" else real(kernel, problem, *more, **options)

    monkeypatch.setattr(compiled_buckets.candidates, "decide", decide)
    _, graphs = traced_on(lambda q, k, v: attention(q, k, v), lengths_of((40,)), mark=[2])
    assert not graphs.has("baddbmm")


def test_a_miss_is_recorded_for_the_bucket_that_would_serve():
    _, graphs = traced_on(lambda q, k, v: attention(q, k, v), lengths_of((40,), (60,)), mark=[2])
    assert graphs.count == 1  # nothing is stored, so nothing is compared
    [missed] = session.misses
    assert command_line(missed).endswith("--bucket")
    assert (missed.lengths, missed.q_len, missed.kv_len, missed.batch) == ("all", 47, 47, 2)
    fastattn.clear()
    torch._dynamo.reset()
    traced_on(lambda q, k, v: attention(q, k, v), lengths_of((1, 40), (1, 60)))
    assert {(p.lengths, p.kv_len) for p in session.misses} == {("exact", 40), ("kv", 63)}


def test_a_range_that_the_caller_gave_stays_one_graph():
    """mark_dynamic with min and max makes an error of a narrower guard."""
    store("matmul", *qkv(40), lengths="all")
    run, graphs = compiled(lambda q, k, v: attention(q, k, v))
    given = qkv(40)
    for x in given:
        torch._dynamo.mark_dynamic(x, 2, min=8, max=4096)
    run(*given)
    run(*qkv(400))
    assert graphs.count == 1 and not graphs.has("baddbmm")


def test_training_takes_a_bucket_too():
    store("torch_flash", *qkv(40, grad=True), lengths="all", is_causal=True)
    given = lengths_of((40,), (47,), grad=True)
    run = torch.compile(lambda q, k, v: attention(q, k, v, is_causal=True), backend="aot_eager", fullgraph=True)
    for tensors in given:
        for x in tensors:
            torch._dynamo.mark_dynamic(x, 2)
        run(*tensors).square().sum().backward()
        wide = [x.detach().double().requires_grad_() for x in tensors]
        attention(*wide, is_causal=True).square().sum().backward()
        assert all(torch.allclose(x.grad.double(), y.grad, atol=1e-4) for x, y in zip(tensors, wide, strict=True))
