"""Models that transformers serves eagerly alone: what no mask means, their layers do not say."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import hf_models
from hf_models import ENCODER, GQA, Row, build, inputs, run

import fastattn
import fastattn.integrations.transformers  # noqa: F401  makes the name known
from fastattn.integrations.transformers import attend, library

pytestmark = pytest.mark.usefixtures("untuned", "one_thread")
IS_5 = int(transformers.__version__.split(".")[0]) >= 5
SEQ2SEQ = {
    "vocab_size": 97, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0, "eos_token_id": 1,
    "bos_token_id": 2, "decoder_start_token_id": 2, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
    "max_position_embeddings": 128, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0,
}  # fmt: skip


def seq2seq(name, **more):
    settings = {**SEQ2SEQ, **more}
    return Row(name, f"{name}Config", f"{name}ForConditionalGeneration", settings, "text to text", stock="eager")


def encoder(name):
    return Row(name, f"{name}Config", f"{name}Model", ENCODER, logits="last_hidden_state", stock="eager")


DECODERS = (
    seq2seq("NllbMoe", num_experts=2, encoder_sparse_step=0, decoder_sparse_step=0),
    seq2seq("BigBirdPegasus", attention_type="original_full"),
    seq2seq("PegasusX", num_global_tokens=4, block_size=8, stagger_local_blocks=False),
)
ENCODERS = (encoder("Splinter"), encoder("ClapText"), encoder("AlignText"))


class ByPlace(torch.nn.Module):
    """A model that torch.jit.trace takes: its arguments have no names."""

    def __init__(self, model, row, names):
        super().__init__()
        self.model, self.row, self.names = model, row, names

    def forward(self, *values):
        return run(self.model, self.row, dict(zip(self.names, values, strict=True)))


only_5 = pytest.mark.skipif(not IS_5, reason="in 4.57 these do not ask for an attention function")


@only_5
@pytest.mark.parametrize("door", ["eager", "compiled", "traced"])
@pytest.mark.parametrize("row", [*DECODERS, *ENCODERS], ids=lambda row: row.name)
def test_a_triangle_is_one_and_all_keys_are_all(row, door):
    if door != "eager" and row.name not in ("NllbMoe", "Splinter"):
        pytest.skip("one of each kind says it")
    stock, ours, given = build(row, "eager"), build(row, "fastattn"), inputs(row)
    with torch.no_grad():
        want = run(stock, row, given)
        if door == "compiled":
            ours = torch.compile(ours, backend="eager")
        if door == "traced":
            values = tuple(given.values())
            ours = torch.jit.trace(ByPlace(ours, row, tuple(given)), values, check_trace=False)
            got = ours(*values)
        else:
            got = run(ours, row, given)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


GEMMA_4 = hf_models.lm("Gemma 4, shared keys", "Gemma4", {
    **GQA, "num_hidden_layers": 4, "global_head_dim": 8, "sliding_window": 8, "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 16, "tie_word_embeddings": False,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}, stock="eager")  # fmt: skip


@pytest.mark.skipif(not hasattr(transformers, "Gemma4TextConfig"), reason="this transformers has no Gemma 4")
@pytest.mark.parametrize("keep", [1, 2, 5, 0])
@pytest.mark.parametrize("is_static", [False, True], ids=["no cache", "static cache"])
def test_rows_that_a_model_leaves_out_keep_their_places(keep, is_static):
    row = Row(**{**vars(GEMMA_4), "config": "Gemma4TextConfig"})
    found = []
    for implementation in ("eager", "fastattn"):
        model = build(row, implementation)
        cache = (
            {"past_key_values": transformers.StaticCache(config=model.config, max_cache_len=40)} if is_static else {}
        )
        with torch.no_grad():
            found.append(model(**inputs(row), logits_to_keep=keep, **cache).logits)
    torch.testing.assert_close(found[1], found[0], atol=2e-5, rtol=2e-5)


def constant(found):
    def file_is_for_sdpa(name):
        return found

    file_is_for_sdpa._dynamo_marked_constant = True
    return file_is_for_sdpa


@pytest.mark.parametrize(("is_causal", "said", "hides"), [
    (None, None, False), (None, True, True), (True, None, True), (True, False, False), (False, None, False),
])  # fmt: skip
def test_no_mask_at_all_is_what_a_layer_says_or_what_its_models_were_written_for(is_causal, said, hides, monkeypatch):
    class Layer(torch.nn.Module):
        pass

    layer = Layer()
    if is_causal is not None:
        layer.is_causal = is_causal
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    for written_for_sdpa in (False, True):
        monkeypatch.setattr(library, "file_is_for_sdpa", constant(written_for_sdpa))
        out, _ = attend(layer, q, k, v, None, is_causal=said)
        causal = hides or (is_causal is said is None and written_for_sdpa)
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        torch.testing.assert_close(out, want.transpose(1, 2))
        compiled = torch.compile(lambda *x: attend(layer, *x, None, is_causal=said)[0], backend="eager", fullgraph=True)
        torch._dynamo.reset()
        torch.testing.assert_close(compiled(q, k, v), want.transpose(1, 2))


@only_5
def test_which_files_were_written_for_sdpa():
    for name, file_is_for_sdpa in {"llama": True, "bert": True, "nllb_moe": False, "splinter": False}.items():
        file = f"transformers.models.{name}.modeling_{name}"
        __import__(file)
        assert library.file_is_for_sdpa(file) is file_is_for_sdpa, name
    assert library.models_are_for_sdpa(transformers.LlamaConfig())
    assert not library.models_are_for_sdpa(object())
