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
from hf_models import ROWS, build, inputs, run

import fastattn
import fastattn.integrations.transformers  # noqa: F401  makes the name known
from fastattn.dispatch import fallback
from fastattn.dispatch.service import Asked
from fastattn.dispatch.session import session
from fastattn.environment.device import Device
from fastattn.environment.settings import current_settings
from fastattn.planning import candidates
from fastattn.planning.decision import Accepted
from fastattn.problems.call_facts import ordinary_facts
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
EVERY_RUN = ("Llama, by the string", "ViT, patched")  # the others are for -m long
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
        asked = Asked(p, ordinary_facts(p), device, settings, None)
        found = candidates.decisions(p, device, settings)
        for d in found:
            is_other = isinstance(d, Accepted) and d.kernel.name in ("torch_flash", "torch_math", "sdpa_math")
            if is_other and fallback.stands_in_graph(d.kernel, d.name, asked):
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
