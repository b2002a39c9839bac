"""Hugging Face models with attn_implementation="fastattn" and under patch(): the same numbers and tokens, all calls served.

The models are tiny and random (tests/support/hf_models.py). No kernel needs to win: the default serves, or a made-up clock
says who does.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from inspect import signature

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import fakes
import hf_models
from hf_models import ROWS, build, inputs, run

import fastattn
import fastattn.integrations.transformers  # noqa: F401  makes the name known
from fastattn import masks
from fastattn.integrations.transformers import ToldMask, library
from fastattn.integrations.transformers.told_mask import Told

IS_5 = int(transformers.__version__.split(".")[0]) >= 5
BY_STRING = [row for row in ROWS if IS_5 or not row.only_5]
IN_DOUBLE = [
    row for row in BY_STRING if IS_5 or row.name != "CLIP"
]  # 4.57 masks its text with float64's lowest, in float32
in_double = pytest.mark.parametrize("row", IN_DOUBLE, ids=lambda row: row.name)
pytestmark = pytest.mark.usefixtures("untuned", "one_thread")


def paddings(row):
    return ("", "left", "right") if "text" in row.inputs else ("",)


def real(row, given, x):
    """The rows of the result that are of real tokens: what a padding token attends to is no two implementations' same."""
    mask = given.get("attention_mask")
    return x if mask is None or x.shape[:2] != mask.shape else x[mask.bool()]


def passed_on():
    return dict(fastattn.stats()["passed_on"])


def within_budget(got, stock, reference):
    """The gate's rule for float32: four times the error that stock has, and the last bits."""
    error = (stock.double() - reference).abs().max() + 2**-23 * reference.abs().max()
    return bool((got.double() - reference).abs().max() <= 4 * error)


@in_double
def test_logits_are_those_of_stock(row):
    stock, ours = build(row, row.stock), build(row, "fastattn")
    exact = build(row, row.stock).double()
    for padding in paddings(row):
        if padding == "left" and row.stock == "eager":
            continue  # where a token sees nothing their eager path adds float64's lowest number, in float32: NaN
        given = inputs(row, padding)
        wide = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
        with torch.no_grad():
            reference, want = run(exact, row, wide), run(stock, row, given)
            fastattn.stats.reset()
            got = run(ours, row, given)
        assert within_budget(*(real(row, given, x) for x in (got, want, reference))), padding
        stats = fastattn.stats()
        assert stats["calls"] >= 2 and not stats["passed_on"], stats


@in_double
def test_gradients_are_those_of_stock(row):
    given = inputs(row, "right" if "text" in row.inputs else "")
    found = []
    for implementation, double in ((row.stock, True), (row.stock, False), ("fastattn", False)):
        model = build(row, implementation)
        use = given
        if double:
            model = model.double()
            use = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
        fastattn.stats.reset()
        out = real(row, given, run(model, row, use))
        out.mul(torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    exact, stock, ours = found
    assert exact.keys() == stock.keys() == ours.keys()
    worst = [name for name in ours if not within_budget(ours[name], stock[name], exact[name])]
    assert worst == []
    assert passed_on() == {}


PATCHED = [row for row in ROWS if row.stock == "sdpa" and (IS_5 or row.inputs != "text to text" or row.name == "BART")]


@pytest.mark.parametrize("row", PATCHED, ids=lambda row: row.name)
def test_patched_models_are_served(row):
    model, given = build(row, "sdpa"), inputs(row, "left" if "text" in row.inputs else "")
    with torch.no_grad():
        want = run(model, row, given)
        fastattn.stats.reset()
        with fastattn.patch():
            got = run(model, row, given)
    assert torch.equal(got, want)  # the default serves, as nothing is tuned
    stats = fastattn.stats()
    if IS_5 or not row.only_5:
        assert stats["calls"] >= 2
    assert sum(stats["passed_on"].values()) <= 0.05 * stats["calls"], stats


# --- generate(): token for token

GENERATING = [row for row in BY_STRING if row.generates]
DECODERS = [row for row in GENERATING if row.inputs == "text"]
SEARCHES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static cache": {"cache_implementation": "static"},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "eos_token_id": 1},
}


def tokens(model, row, padding, **more):
    given = {name: x for name, x in inputs(row, padding).items() if name != "decoder_input_ids"}
    if more.get("prompt_lookup_num_tokens"):  # one sequence at a time
        given = {name: x[:1] for name, x in given.items()}
    return model.generate(**given, max_new_tokens=14, do_sample=False, **more)


EVERY_RUN = ("Llama", "Mistral", "GPT-2", "Whisper")  # the others are for -m long


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("row", [
    pytest.param(row, id=row.name, marks=[] if row.name in EVERY_RUN else pytest.mark.long) for row in GENERATING
])  # fmt: skip
def test_generate_gives_the_same_tokens(row, search):
    more = SEARCHES[search]
    if search in ("prompt lookup", "static cache") and row not in DECODERS:
        pytest.skip("for models of one stack")
    for padding in ("", "left"):
        want = tokens(build(row, row.stock), row, padding, **more)
        fastattn.stats.reset()
        got = tokens(build(row, "fastattn"), row, padding, **more)
        assert torch.equal(got, want), padding
        stats = fastattn.stats()
        assert stats["calls"] >= 8 and not stats["passed_on"], stats
        if row.stock == "sdpa":
            with fastattn.patch():
                assert torch.equal(tokens(build(row, "sdpa"), row, padding, **more), want), padding


@pytest.mark.parametrize(
    "row", [row for row in DECODERS if "Llama" in row.name or "Mistral" in row.name], ids=lambda r: r.name
)
def test_assisted_decoding_gives_the_same_tokens(row):
    given = {name: x[:1] for name, x in inputs(row).items()}
    found = []
    for implementation in (row.stock, "fastattn"):
        model, assistant = build(row, implementation), build(row, implementation)
        with torch.no_grad():
            for p in assistant.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
        found.append(model.generate(**given, max_new_tokens=14, do_sample=False, assistant_model=assistant))
    assert torch.equal(*found)
    assert not passed_on()


@pytest.mark.skipif(
    not hasattr(transformers.cache_utils, "Fp8QuantizedLayer"), reason="needs a library for quantised caches"
)
@pytest.mark.parametrize("row", [row for row in DECODERS if row.name in ("Llama", "GPT-2")], ids=lambda row: row.name)
def test_a_quantised_cache_gives_the_same_tokens(row):
    more = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    want, got = (tokens(build(row, name), row, "left", **more) for name in (row.stock, "fastattn"))
    assert torch.equal(got, want)
    assert not passed_on()


def test_a_long_generation_runs_over_its_windows():
    for row in (row for row in DECODERS if "Mistral" in row.name or "Gemma" in row.name or "chunks" in row.name):
        given = inputs(row, "left")
        want, got = (
            build(row, implementation).generate(**given, max_new_tokens=24, do_sample=False)
            for implementation in (row.stock, "fastattn")
        )
        assert torch.equal(got, want), row.name


def test_chunked_prefill_and_a_cache_that_goes_on():
    for row in DECODERS:
        given = inputs(row)["input_ids"]
        found = []
        for implementation in (row.stock, "fastattn"):
            model, out = build(row, implementation), []
            name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"  # until 5.20 or so
            cache = {name: transformers.DynamicCache(config=model.config)}
            with torch.no_grad():
                for part in given.split(7, dim=1):
                    out.append(model(input_ids=part, use_cache=True, **cache).logits)
            found.append(torch.cat(out, 1))
        torch.testing.assert_close(*found, msg=row.name)


@pytest.mark.parametrize("static", [False, True])
def test_decoding_is_a_hit_from_the_second_token_on(static):
    row = next(row for row in ROWS if row.name == "Llama")
    model, given = build(row, "fastattn"), inputs(row, "left")
    more = {"cache_implementation": "static"} if static else {}
    model.generate(**given, max_new_tokens=28, do_sample=False, **more)
    fastattn.stats.reset()
    model.generate(**given, max_new_tokens=28, do_sample=False, **more)
    stats = fastattn.stats()
    assert stats["misses"] <= 4, stats


# --- packed sequences, dropout, weights


def test_packed_sequences_are_documents():
    row = next(row for row in ROWS if row.name == "Mistral, a window")
    ids = inputs(row)["input_ids"][:1]
    positions = torch.cat([torch.arange(n) for n in (9, 4, 7)])[None]
    with torch.no_grad():
        want = build(row, "sdpa")(input_ids=ids, position_ids=positions, use_cache=False).logits
        seen = []
        ours = build(row, "fastattn")
        attention_of(ours).register_forward_pre_hook(
            lambda m, a, kw: seen.append(kw.get("attention_mask")), with_kwargs=True
        )
        got = ours(input_ids=ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(got, want)
    assert "Document((9, 4, 7))" in repr(seen[0])


TILED = [
    pytest.param(row, marks=() if "Mistral" in row.name else pytest.mark.long, id=row.name)
    for row in BY_STRING
    if any(word in row.name for word in ("Mistral", "chunks", "ModernBERT"))
]


@pytest.mark.parametrize("row", TILED)
def test_where_tiles_win_only_they_are_computed(row, monkeypatch):
    """On a machine where tiles are faster: the model's numbers are the same, forward and backward."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 97, (2, 600), generator=g)
    mask = (torch.arange(600) < torch.tensor([600, 410])[:, None]).long()
    row = replace(row, settings={**row.settings, "max_position_embeddings": 1024})
    given, rows = {"input_ids": ids * mask, "attention_mask": mask}, []

    def seen(q, k, v, mask, a):
        rows.append((q.shape[2], k.shape[2]))
        return fakes.honest(q, k, v, mask, a)

    def results(model):
        out = real(row, given, run(model, row, given))
        out.mul(torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
        return {"": out.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}

    exact, stock = results(build(row, "sdpa").double()), results(build(row, "sdpa"))
    fakes.add(monkeypatch, fakes.made_up("tiler", seen, tiles=True))
    fakes.turn(
        monkeypatch, fakes.Clock({"default": 4e-3, "tiler": 8e-3, "tiler+tiles": 1e-3, "tiler+tiles+mask_dense": 1e-3})
    )
    with fastattn.options.scope(mode="auto", kernels="tiler"):
        ours = results(build(row, "fastattn"))
    assert any("tiles" in name for name in fastattn.stats()["served_by"]), fastattn.stats()
    assert any(q_len < 600 for q_len, _ in rows)
    assert [name for name in exact if not within_budget(ours[name], stock[name], exact[name])] == []


def attention_of(model):
    return next(m for m in model.modules() if type(m).__name__.endswith("Attention"))


def test_dropout_drops(monkeypatch):
    row = next(row for row in ROWS if row.name == "Llama")
    given = inputs(row)
    model = build(
        hf_models.Row(row.name, row.config, row.model, {**row.settings, "attention_dropout": 0.5}), "fastattn"
    ).train()
    a, b = (run(model, row, given) for _ in range(2))
    assert not torch.equal(a, b)
    model.eval()
    a, b = (run(model, row, given) for _ in range(2))
    assert torch.equal(a, b) and not passed_on()


def call(module=None, mask=None, *, heads=4, q_len=6, kv_len=None, **more):
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, h, n, 8, generator=g)
        for h, n in ((4, q_len), (heads, kv_len or q_len), (heads, kv_len or q_len))
    )
    return fastattn.integrations.transformers.attend(module or torch.nn.Module(), q, k, v, mask, **more), (q, k, v)


def test_weights_come_from_their_eager_path(caplog):
    row = next(row for row in ROWS if row.name == "Llama")
    library._said.clear()
    module = attention_of(build(row, "fastattn"))
    out, weights = call(module, output_attentions=True, scaling=0.3, heads=2)[0]
    assert weights.shape == (2, 4, 6, 6)
    assert torch.equal(weights.triu(1), torch.zeros_like(weights)), "the triangle is theirs too"
    torch.testing.assert_close(out, call(module, scaling=0.3, heads=2)[0][0])
    assert passed_on() == {"transformers: the weights are asked for (output_attentions): eager": 1}
    assert caplog.text.count("the weights are asked for") == 1


def test_a_call_without_a_mask_is_theirs():
    def theirs(module, mask, q, k, v, **more):
        return library.sdpa(module, q, k, v, mask, **more)[0]

    decoder, encoder = torch.nn.Module(), torch.nn.Module()
    decoder.is_causal, encoder.is_causal = True, False
    for module in (decoder, encoder):
        for lengths in ({}, {"q_len": 1, "kv_len": 9}, {"q_len": 4, "kv_len": 9}):
            for more in ({}, {"is_causal": False}, {"scaling": 0.2}):
                if not IS_5 and lengths.get("q_len") == 4:
                    continue  # 4.57 does not cut an empty cache of fixed length off
                (out, _), qkv = call(module, **lengths, **more)
                torch.testing.assert_close(out, theirs(module, None, *qkv, **more))
    mask = torch.rand(2, 1, 6, 6) < 0.7
    (out, _), qkv = call(decoder, mask)
    torch.testing.assert_close(out, theirs(decoder, mask, *qkv))


def test_sinks_take_their_share():
    sinks = torch.tensor([-2.0, 0.0, 1.0, 30.0])
    (out, _), (q, k, v) = call(s_aux=sinks, scaling=0.5)
    scores = (q @ k.mT * 0.5).masked_fill(torch.ones(6, 6).triu(1).bool(), float("-inf"))
    scores = torch.cat([scores, sinks.view(1, 4, 1, 1).expand(2, 4, 6, 1)], -1)
    torch.testing.assert_close(out, (scores.softmax(-1)[..., :-1] @ v).transpose(1, 2))


@pytest.mark.parametrize("name", ["indices", "block_indices", "read_index"])
def test_what_chooses_keys_is_refused_in_words(name):
    with pytest.raises(
        NotImplementedError, match=rf'"fastattn" does not serve .*\({name}\); use this model with "sdpa"'
    ):
        call(**{name: torch.zeros(1)})
    call(**{name: None})


def test_a_told_mask_is_copied_and_moved_as_it_is_and_cannot_be_written_into():
    mask = ToldMask(Told((0, 6), masks.Causal("bottom_right")), 2, 5, 6, "cpu")
    for other in (copy.deepcopy(mask), mask.detach(), mask.to("meta"), mask.to("cpu")):
        assert isinstance(other, ToldMask) and other.told == mask.told and other.lengths == (5, 6)
    plain = mask.clone()
    assert not isinstance(plain, ToldMask) and torch.equal(plain, mask.dense())
    plain[..., 0] = False
    for write in (lambda: mask.fill_(False), lambda: mask.__setitem__((..., 0), False), lambda: mask.logical_not_()):
        with pytest.raises(NotImplementedError, match="cannot be written into"):
            write()


def test_a_mask_for_another_number_of_queries_is_an_error():
    mask = ToldMask(Told((0, 6), None), 2, 5, 6, "cpu")
    with pytest.raises(RuntimeError, match="does not broadcast"):
        call(mask=mask)


def test_queries_of_batch_one_are_broadcast():
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 4, 3, 8, generator=g),
        torch.randn(2, 4, 5, 8, generator=g),
        torch.randn(2, 4, 5, 8, generator=g),
    )
    module = torch.nn.Module()
    out, _ = fastattn.integrations.transformers.attend(module, q, k, v, None, is_causal=False)
    assert torch.equal(out, fastattn.attention(q.expand(2, 4, 3, 8), k, v).transpose(1, 2))


def test_a_model_that_attends_by_itself_gets_their_eager_mask(caplog):
    library._said.clear()
    settings = {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    row = hf_models.Row("BLOOM", "BloomConfig", "BloomForCausalLM", settings)
    given = inputs(row, "left")
    with torch.no_grad():
        want, got = (run(build(row, name), row, given) for name in ("eager", "fastattn"))
    assert torch.equal(got, want)
    if IS_5:  # 4.57 makes this mask by itself
        assert "BloomConfig: its models do not ask for an attention function" in caplog.text


def test_reasons_are_logged_once(caplog):
    library._said.clear()
    caplog.set_level(logging.WARNING, logger="fastattn")
    for _ in range(3):
        call(attention_of(build(ROWS[0], "fastattn")), output_attentions=True, scaling=0.3, heads=2)
    assert caplog.text.count("output_attentions") == 1


@pytest.mark.skipif(not IS_5, reason="4.57 makes masks with data-dependent branches")
def test_a_compiled_model_is_one_graph():
    row = next(row for row in ROWS if row.name == "Mistral, a window")
    model, given = build(row, "fastattn"), inputs(row)
    with torch.no_grad():
        want = run(model, row, given)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        got = run(compiled, row, given)
    torch.testing.assert_close(got, want)
