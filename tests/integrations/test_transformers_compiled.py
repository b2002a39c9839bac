"""Hugging Face models under torch.compile, patched and with attn_implementation="fastattn": one graph, stock's numbers.

Stock compiles all of these with fullgraph=True in transformers 5.24. The models are tiny and random; graphs run as they are.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from graphs import Graphs
from hf_models import GQA, ROWS, build, inputs, lm, run

import fastattn
import fastattn.integrations.transformers  # noqa: F401  makes the name known
from fastattn.dispatch import fallback
from fastattn.dispatch.session import session
from fastattn.environment.device import Device
from fastattn.environment.settings import current_settings
from fastattn.planning import candidates
from fastattn.planning.decision import Accepted
from fastattn.verdicts.verdict import Trial, Verdict

IS_5 = int(transformers.__version__.split(".")[0]) >= 5
pytestmark = [
    pytest.mark.usefixtures("untuned", "one_thread"),
    pytest.mark.skipif(not IS_5, reason="the models of transformers 4.57 break the graph themselves"),
]
WANTED = (
    "Llama", "Mistral, a window", "Gemma 2, softcap and windows", "Gemma 3, windows", "Qwen 2", "GPT-2", "BERT",
    "ModernBERT, windows", "ViT", "CLIP", "Whisper", "T5, a position bias", "DINOv2",
)  # fmt: skip
EVERY_RUN = ("ViT, by the string", "ViT, patched")  # the others are for -m long
MODELS = [row for row in ROWS if row.name in WANTED]
assert len(MODELS) == len(WANTED)
HOW = ("patched", "by the string")
CASES = [
    pytest.param(row, how, id=f"{row.name}, {how}", marks=[] if f"{row.name}, {how}" in EVERY_RUN else pytest.mark.long)
    for row in MODELS
    for how in HOW
    if row.stock == "sdpa" or how == "by the string"  # eager models do not call F.sdpa
]


def shorter(given):
    """The same with fewer tokens, where there are tokens; not fewer tokens of a picture or a sound."""
    return {name: x[:, :15] if x.dim() == 2 and x.shape[1] == 20 else x for name, x in given.items()}


def train(row, implementation, patched=False):
    """(graphs, logits and gradients of two calls), compiled whole."""
    torch._dynamo.reset()
    graphs, model = Graphs(), build(row, implementation)
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    given, found = inputs(row, "left" if "text" in row.inputs else ""), []
    if row.stock == "eager":  # where a token sees nothing eager models have other numbers
        given = inputs(row)
    with fastattn.patch() if patched else nullcontext(), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*Dynamo.*")
        for some in (given, shorter(given)):
            mask = some.get("attention_mask")
            out = run(compiled, row, some)
            out = out[mask.bool()] if mask is not None and out.shape[:2] == mask.shape else out
            out.mul(torch.arange(out.numel()).reshape(out.shape).cos()).sum().backward()
            found += [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    return graphs, found


def is_close(mine, theirs):
    return all(
        float((x - y).abs().max()) <= 1e-4 * (1 + float(y.abs().max())) for x, y in zip(mine, theirs, strict=True)
    )


def store_another_winner():
    """For each problem that was met and is not stored: a kernel whose operators can stand in a graph, other than F.sdpa."""
    missed, settings = list(session.misses), current_settings()
    for p in missed:
        device = Device.of(torch.device(p.device))
        found = candidates.decisions(p, device, settings)
        for d in found:
            is_other = isinstance(d, Accepted) and d.kernel.name in ("torch_flash", "torch_math", "sdpa_math")
            if is_other and fallback.stands_in_graph(d.kernel, d.name, p):
                trials = (Trial("default", time_us=9.0), Trial(d.name, time_us=1.0))
                session.store(settings).put(Verdict(p, d.name, trials), device)
                break
    fastattn.clear()
    return len(missed)


@pytest.mark.parametrize(("row", "how"), CASES)
def test_a_compiled_model_trains_as_stock_does(row, how):
    stock, want = train(row, row.stock)
    implementation, patched = ("fastattn", False) if how == "by the string" else (row.stock, True)
    ours, got = train(row, implementation, patched)
    assert ours.count <= stock.count  # nothing is stored: no bucket needs a graph of its own
    assert is_close(got, want)
    if row.stock == "sdpa":
        layers = stock.calls("scaled_dot_product_attention")
        assert layers and ours.calls("scaled_dot_product_attention") == layers
    assert store_another_winner()
    ours, got = train(row, implementation, patched)
    assert ours.count <= stock.count + 2  # a bucket of lengths
    assert is_close(got, want)
    assert ours.calls("_scaled_dot_product_flash_attention_for_cpu") + ours.calls(
        "_scaled_dot_product_attention_math"
    ) or (
        row.stock == "eager"  # softcap is plain math: with a winner and without
    )


def whole(row, implementation, given, patched=False):
    """(operators of the graph that AOTAutograd leaves, logits) without padding, as a batch of whole sequences is run."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.compilers import nop

    torch._dynamo.reset()
    graphs, model = Graphs(), build(row, implementation)

    def keep(graph, inputs):
        return nop(graphs.of(graph), inputs)

    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    with torch.no_grad():
        return graphs, run(compiled, row, given)


OPERATORS = {  # how many of two layers are the operator; the others are F.sdpa
    "Llama": 0, "Mistral, a window": 2, "Mistral, a window that holds all": 0, "Gemma 3, windows": 1, "Qwen 2": 0, "GPT-2": 0,
    "ModernBERT, windows": 1, "Llama 4 text, chunks": 0,
}  # fmt: skip
BY_NAME = {row.name: row for row in ROWS}
BY_NAME["Mistral, a window that holds all"] = lm("", "Mistral", {**GQA, "sliding_window": 20})


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name == "Mistral, a window" else pytest.mark.long) for name in OPERATORS
])  # fmt: skip
def test_a_mask_without_padding_is_told_in_a_graph(name):
    """A triangle is is_causal, a window the operator; no mask of queries by keys is left in the graph, but of chunks."""
    row = BY_NAME[name]
    given = inputs(row)
    graphs, got = whole(row, "fastattn", given)
    with torch.no_grad():
        want = run(build(row, row.stock), row, given)
    assert is_close([got], [want])
    assert (graphs.calls("fastattn.attend"), graphs.calls("aten._scaled_dot")) == (OPERATORS[name], 2 - OPERATORS[name])
    assert graphs.has("aten.le") is ("chunks" in name), graphs.operators  # position j <= position i


@pytest.mark.long
def test_a_told_mask_takes_no_more_graphs_than_stock():
    row, counts = BY_NAME["Mistral, a window"], []
    given = inputs(row)
    for implementation in ("sdpa", "fastattn"):
        torch._dynamo.reset()
        graphs, model = Graphs(), build(row, implementation)
        compiled = torch.compile(model, backend=graphs, fullgraph=True)
        with torch.no_grad():
            found = [run(compiled, row, shorter(given) if i else given) for i in range(3)]
            want = [run(build(row, "sdpa"), row, shorter(given) if i else given) for i in range(3)]
        assert is_close(found, want)
        counts.append(graphs.count)
    assert counts[1] <= counts[0]


@pytest.mark.long
def test_an_exported_model_has_their_dense_masks():
    row = BY_NAME["Mistral, a window"]
    model, given = build(row, "fastattn"), inputs(row)
    program = torch.export.export(model, (), {**given, "use_cache": False}, strict=False)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("fastattn" in name for name in names) and "aten.scaled_dot_product_attention.default" in names


@pytest.mark.parametrize("padding", ["", "left", "right"])
def test_layers_that_are_compiled_one_by_one_take_the_masks_that_were_made_outside(padding):
    row = next(row for row in ROWS if row.name == "Mistral, a window")
    stock, ours = build(row, "sdpa"), build(row, "fastattn")
    given = inputs(row, padding)
    torch._dynamo.reset()  # all layers are one code, which is compiled 8 times at most
    for layer in ours.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    with torch.no_grad():
        for n in (20, 14):
            some = {name: x[:, :n] for name, x in given.items()}
            real = some.get("attention_mask", torch.ones(2, n)).bool()
            torch.testing.assert_close(ours(**some).logits[real], stock(**some).logits[real], atol=2e-5, rtol=2e-5)


def test_layers_that_are_compiled_one_by_one_generate():
    """Each token may be a graph anew, until Dynamo gives up; two strides that are each other's product by 1 were none."""
    row = next(row for row in ROWS if row.name == "Llama")
    stock, ours, given = build(row, "sdpa"), build(row, "fastattn"), inputs(row, "left")
    torch._dynamo.reset()
    for layer in ours.model.layers:
        layer.compile(backend="eager")
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(**given, **options), stock.generate(**given, **options))
