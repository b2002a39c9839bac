"""fastattn::attend, the one operator in a graph for calls whose kernels cannot stand there themselves."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from graphs import compiled, exact, fresh, qkv, store  # noqa: F401  (fresh is used by its name)
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fastattn
from fastattn import attention, masks
from fastattn.dispatch import compiled as traced
from fastattn.dispatch import graph_op

pytestmark = pytest.mark.usefixtures("fresh")
OPERATOR = "fastattn.attend"
CAUSAL = masks.Causal()
LENGTHS = torch.tensor([9, 24])
ENDS = torch.tensor([0, 5, 24], dtype=torch.int32)
PAGES = torch.randperm(6, generator=torch.Generator().manual_seed(1)).reshape(2, 3)


def gradients(run, given, sinks=()):
    given = [x.detach().clone().requires_grad_() for x in given]
    out = run(*given)
    outs = out if isinstance(out, tuple) else (out,)
    sum((x * torch.arange(x.numel()).reshape(x.shape).cos()).sum() for x in outs).backward()
    return outs, [x.grad for x in given]


TOLD = {
    "window": {"mask": CAUSAL & masks.Window(5, 0)},
    "window, the option": {"window": (3, 4)},
    "documents": {"mask": CAUSAL & masks.Document((10, 14))},
    "documents of each entry": {"mask": masks.Document(((10, 14), (4, 20)))},
    "prefix or window": {"mask": (masks.Window(2, 2) | masks.Global(3)) & CAUSAL},
    "padding": {"mask": masks.Padding((20, 24))},
    "biases": {"mask": CAUSAL & masks.ALiBi(4)},
    "filled": {"kv_lens": LENGTHS},
    "filled, a list": {"kv_lens": [9, 24]},
    "filled, lower right": {"kv_lens": LENGTHS, "mask": masks.Causal("bottom_right")},
    "a candidate of training": {"mask": CAUSAL & masks.Document((10, 14)), "kernel": "matmul+mask_dense+recompute"},
    "with the log-sum-exp": {"mask": CAUSAL & masks.Window(5, 0), "return_lse": True, "scale": 0.3},
}


@pytest.mark.parametrize("case", [case for case in TOLD if "training" not in case])
@pytest.mark.parametrize("layout", ["bhsd", pytest.param("bshd", marks=pytest.mark.long)])
def test_a_mask_with_a_meaning_is_one_operator_and_no_mask(case, layout):
    given = qkv(layout=layout)
    call = partial(attention, layout=layout, **TOLD[case])
    run, graphs = compiled(lambda q, k, v: call(q, k, v))
    out, want = run(*given), exact(*given, layout=layout, **TOLD[case])
    pairs = zip(out, want, strict=True) if isinstance(out, tuple) else [(out, want)]
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in pairs)
    assert set(graphs.operators) <= {f"{OPERATOR}", "<built-in function getitem>"}


@pytest.mark.parametrize(
    "case", ["window", "documents of each entry", "biases", "a candidate of training", "with the log-sum-exp"]
)
def test_its_gradients_are_those_of_eager_code(case):
    given = qkv()
    call = partial(attention, **TOLD[case])
    run = torch.compile(lambda q, k, v: call(q, k, v), backend="aot_eager", fullgraph=True)
    for mine, theirs in zip(gradients(run, given), gradients(call, given), strict=True):
        assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(mine, theirs, strict=True))


def test_packed_sequences_pages_and_sinks():
    q, k, v = (torch.randn(24, heads, 16) for heads in (4, 2, 2))

    def packed(q, k, v, ends):
        return attention(q, k, v, layout="thd", cu_seqlens_q=ends, is_causal=True)

    run, graphs = compiled(packed)
    assert torch.allclose(run(q, k, v, ENDS), packed(q, k, v, ENDS), atol=1e-5)
    other = torch.tensor([0, 11, 24], dtype=torch.int32)
    assert torch.allclose(run(q, k, v, other), packed(q, k, v, other), atol=1e-5)
    assert graphs.count == 1 and graphs.operators[OPERATOR] == 1

    q, pages = torch.randn(2, 4, 1, 16), torch.randn(6, 2, 8, 16)

    def paged(q, pages, table, lengths):
        return attention(q, pages, pages, kv_lens=lengths, page_table=table)

    run, graphs = compiled(paged)
    assert torch.allclose(run(q, pages, PAGES, LENGTHS), paged(q, pages, PAGES, LENGTHS), atol=1e-5)
    assert graphs.operators[OPERATOR] == 1

    q, k, v = qkv()
    logits = torch.randn(4)
    call = partial(attention, mask=CAUSAL & masks.Window(5, 0))
    run = torch.compile(lambda q, k, v, s: call(q, k, v, sinks=s), backend="aot_eager", fullgraph=True)
    for mine, theirs in zip(
        gradients(run, (q, k, v, logits)),
        gradients(lambda q, k, v, s: call(q, k, v, sinks=s), (q, k, v, logits)),
        strict=True,
    ):
        assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("kind", ["chunks", "tiles"])
def test_a_winner_in_blocks_is_the_operator(kind):
    given = qkv(1024, batch=1)
    options = {"is_causal": True} if kind == "chunks" else {"mask": torch.ones(1024, 1024, dtype=torch.bool).tril()}
    winner = next(row.candidate for row in fastattn.explain(*given, **options).rows if kind in row.candidate)
    store(winner, *given, **options)
    run, graphs = compiled(lambda q, k, v: attention(q, k, v, **options))
    assert torch.allclose(run(*given), exact(*given, **options), atol=1e-5)
    assert set(graphs.operators) == {OPERATOR, "<built-in function getitem>"}
    assert fastattn.stats()["served_by"].get(winner), fastattn.stats()


def test_the_drop_in_takes_it_too():
    given = qkv(700, batch=1)
    store("matmul+chunks", *given)
    run, graphs = compiled(lambda q, k, v: fastattn.sdpa(q, k, v, enable_gqa=True))
    assert torch.allclose(run(*given), exact(*given), atol=1e-5)
    assert graphs.operators[OPERATOR] == 1


def test_a_log_sum_exp_that_trains_is_the_operator():
    """Its gradient is made in the backward, by a call of autograd that Dynamo does not trace."""
    given = qkv(grad=True)
    call = partial(attention, return_lse=True)
    store("torch_flash", *given, return_lse=True)
    run = torch.compile(lambda q, k, v: call(q, k, v), backend="aot_eager", fullgraph=True)
    for mine, theirs in zip(gradients(run, given), gradients(call, given), strict=True):
        assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(mine, theirs, strict=True))


def test_a_kernel_of_another_library_is_the_operator(monkeypatch):
    from fastattn.dispatch import fallback

    given = qkv()
    store("matmul", *given)
    monkeypatch.setattr(fallback, "stands_in_graph", lambda *_: False)
    run, graphs = compiled(lambda q, k, v: attention(q, k, v))
    assert torch.allclose(run(*given), exact(*given), atol=1e-5)
    assert graphs.operators[OPERATOR] == 1


def test_what_it_cannot_do_stays_a_mask():
    """It draws no dropout, and has no gradient of a mask; a transform has no rule for it."""
    q, k, v = qkv()
    window = CAUSAL & masks.Window(5, 0)
    run, graphs = compiled(lambda q, k, v: attention(q, k, v, window, dropout_p=0.5))
    run(q, k, v)
    assert not graphs.has(OPERATOR)
    bias = torch.randn(24, 24, requires_grad=True)
    run = torch.compile(lambda q, k, v, b: attention(q, k, v, b, window=(5, 0)), backend="aot_eager", fullgraph=True)
    run(q, k, v, bias).sum().backward()
    assert bias.grad is not None
    run, graphs = compiled(torch.vmap(lambda q, k, v: attention(q, k, v, window)))
    given = [x[None].expand(3, *x.shape) for x in (q, k, v)]
    assert torch.allclose(run(*given)[1], exact(q, k, v, window), atol=1e-5)
    with fastattn.options.scope(mode="off"):
        run, graphs = compiled(lambda q, k, v: attention(q, k, v, window))
        run(q, k, v)
        assert not graphs.has(OPERATOR)


def test_lengths_that_are_symbols_are_no_matter_to_it():
    run, graphs = compiled(lambda q, k, v: attention(q, k, v, CAUSAL & masks.Window(5, 0)), dynamic=True)
    for n in (24, 30, 100):
        given = qkv(n)
        assert torch.allclose(run(*given), exact(*given, CAUSAL & masks.Window(5, 0)), atol=1e-5)
    assert graphs.count == 1


def test_autocast_reaches_it():
    given = qkv()
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        run = torch.compile(lambda q, k, v: attention(q, k, v, masks.Window(5, 5)), backend=backend, fullgraph=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = run(*given)
        assert out.dtype is torch.bfloat16
        want = exact(*(x.bfloat16() for x in given), masks.Window(5, 5))
        assert torch.allclose(out.float(), want, atol=2e-2)


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_activation_checkpointing(is_reentrant):
    given = qkv()

    def block(q, k, v):
        return attention(q * 2, k, v, CAUSAL & masks.Window(5, 0)).sin()

    def call(q, k, v):
        return checkpoint(block, q, k, v, use_reentrant=is_reentrant)

    run = torch.compile(call, backend="aot_eager", fullgraph=not is_reentrant)
    for mine, theirs in zip(gradients(run, given), gradients(block, given), strict=True):
        assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(mine, theirs, strict=True))


def test_a_selective_policy_sees_it():
    seen = []

    def policy(context, operator, *_, **__):
        seen.append(str(operator))
        return CheckpointPolicy.MUST_SAVE if "attend" in str(operator) else CheckpointPolicy.PREFER_RECOMPUTE

    def block(q, k, v):
        return attention(q * 2, k, v, masks.Window(5, 0)).sin()

    def call(q, k, v):
        return checkpoint(
            block, q, k, v, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, policy)
        )

    given = qkv()
    run = torch.compile(call, backend="aot_eager", fullgraph=True)
    for mine, theirs in zip(gradients(run, given), gradients(block, given), strict=True):
        assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(mine, theirs, strict=True))
    assert "fastattn.attend.default" in seen


def test_it_is_an_operator_as_torch_wants_them():
    q, k, v = qkv(grad=True)
    words = graph_op.words("Causal() & Window(5, 0)", "bhsd", (False, None, None, 0.0, True, None, None))
    given = (q, k, v, None, None, None, None, None, None, None, words)
    torch.library.opcheck(torch.ops.fastattn.attend.default, given)


MASKS = [
    CAUSAL, masks.Window(3, -1), masks.Causal("bottom_right") & masks.Document((4, 5)), masks.ALiBi(4),
    (masks.Window(2, 2) | masks.Global((1, 5))) & CAUSAL, masks.Padding(torch.arange(18).reshape(2, 9) % 5 > 1),
    masks.Filled((3, 9)), masks.Packed((3, 4), (4, 5), "bottom_right", (2, 0)), masks.Neighborhood((3, 3), 1), masks.Dilated(2),
    masks.Chunked(4), masks.Prefix((2, 3)), masks.Document(((3, 6), (4, 5))),
]  # fmt: skip


@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_a_mask_is_written_as_its_repr_which_can_be_read(mask):
    assert masks.write(mask) == repr(mask)
    assert masks.parse(repr(mask)) == mask


def test_a_graph_has_the_words_of_each_mask():
    traced_words = []

    def backend(graph, _):
        traced_words.extend(node.args[-1] for node in graph.graph.nodes if OPERATOR in str(node.target))
        return graph.forward

    def call(x):
        return [graph_op.attend(x, x, x, mask, "bhsd", traced.CallOptions(), {}) for mask in MASKS]

    torch.compile(call, backend=backend, fullgraph=True)(torch.randn(2, 4, 9, 8))
    assert [graph_op._read(text)[0] for text in traced_words] == MASKS


def test_equal_masks_that_are_other_objects_take_no_other_graph():
    run, graphs = compiled(lambda q, mask: attention(q, q, q, mask))
    q = torch.randn(1, 2, 9, 8)
    for mask in (masks.Window(2, 0), masks.Window(2, 0), masks.Window(3, 0), masks.Window(2, 0), masks.Window(4, 0)):
        assert torch.allclose(run(q, mask), exact(q, q, q, mask), atol=1e-5)
    assert graphs.count <= 3
