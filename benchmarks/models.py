"""Whole Hugging Face models, random weights at real sizes, cut in depth: sdpa, attn_implementation="fastattn", and patch().

    python benchmarks/models.py [--only REGEX] [--dtype bfloat16] [--seconds 20] [--smoke] [--results docs/results]

Nothing is downloaded. The three share their weights, and stock stands in the rounds twice (A/A); times are medians of one
interleaved run. Every model starts from an empty store, and tunes before it is timed. "none" is the model without any
attention, its queries passed on in the place of the output: what no kernel can beat. "differs" is how far the two outputs
are from stock's, as a part of its largest number. Exit code 1 where that is too far.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import transformers
from machine import add_results, environment, in_one_line, keep, open_console
from report import plain_table
from rich.table import Table
from rounds import interleave, spread

import fastattn
import fastattn.integrations.transformers

STOCK, AGAIN, STRING, PATCH, NONE = "sdpa", "sdpa again", "string", "patch()", "none"
FAR = {"float32": 1e-3, "bfloat16": 0.1}
Run = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """settings: of the configuration. use(model, settings) -> what is timed. smoke: settings of a tiny one."""

    name: str
    model: str
    settings: dict[str, Any]
    use: Callable[[Any, int], Run]
    size: int  # tokens, or images
    grad: bool = False


@dataclass(frozen=True)
class Result:
    name: str
    dtype: str
    ms: dict[str, float]
    spread: float
    error: float
    served: dict[str, list[str]]


def ids_of(model: Any, *shape: int) -> torch.Tensor:
    return torch.randint(3, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def prefill(model: Any, tokens: int) -> Run:
    ids = ids_of(model, 1, tokens)
    return lambda: model(input_ids=ids, **_no_cache(model)).last_hidden_state


def padded(model: Any, tokens: int) -> Run:
    """16 texts, padded to the longest; on average they are half as long."""
    ids = ids_of(model, 16, tokens)
    mask = (torch.arange(tokens) < torch.linspace(tokens // 8, tokens, 16)[:, None]).long()
    return lambda: model(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]


def decode(model: Any, tokens: int) -> Run:
    """One token over a cache of `tokens`."""
    cache, ids, c = transformers.DynamicCache(config=model.config), ids_of(model, 1, 1), model.config
    fill(cache, c, tokens, model.dtype)
    at = torch.tensor([[tokens]])

    def run() -> torch.Tensor:
        out = model(input_ids=ids, position_ids=at, past_key_values=cache, use_cache=True).last_hidden_state
        cache.crop(tokens - cache.get_seq_length()) if IS_CUT_BY else cache.crop(tokens)
        return out

    return run


IS_CUT_BY = "tokens_to_remove" in transformers.Cache.crop.__code__.co_varnames  # newer ones are told how many go


def fill(cache: Any, c: Any, tokens: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    for layer in range(c.num_hidden_layers):
        cache.update(
            *(torch.randn(1, c.num_key_value_heads, tokens, c.head_dim, generator=g).to(dtype) for _ in "kv"), layer
        )


def packed(model: Any, tokens: int) -> Run:
    """A training step on documents of 100 to 900 tokens in one row."""
    draw, lengths = torch.Generator().manual_seed(0), []
    while sum(lengths) < tokens:
        lengths.append(min(int(torch.randint(100, 900, (), generator=draw)), tokens - sum(lengths)))
    positions, ids = torch.cat([torch.arange(n) for n in lengths])[None], ids_of(model, 1, tokens)

    def run() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        out = model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        out.float().square().mean().backward()
        return out.detach()

    return run


def images(model: Any, count: int) -> Run:
    size = model.config.image_size
    x = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    return lambda: model(pixel_values=x).last_hidden_state


def sound(model: Any, frames: int) -> Run:
    x = torch.randn(1, model.config.num_mel_bins, 2 * frames, generator=torch.Generator().manual_seed(0)).to(
        model.dtype
    )
    return lambda: model(x).last_hidden_state


def text_pairs(model: Any, tokens: int) -> Run:
    ids = ids_of(model, 2, tokens)
    return lambda: model(input_ids=ids).last_hidden_state


def _no_cache(model: Any) -> dict[str, bool]:
    return {"use_cache": False} if hasattr(model.config, "num_key_value_heads") else {}


def text(hidden: int, inner: int, heads: int, kv_heads: int = 0, head_dim: int = 0, **more: Any) -> dict[str, Any]:
    found = {"vocab_size": 1000, "hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads,
             "num_hidden_layers": 2, "max_position_embeddings": 16_384, "pad_token_id": 0, **more}  # fmt: skip
    return {**found, "num_key_value_heads": kv_heads, "head_dim": head_dim} if kv_heads else found


BERT = text(768, 3072, 12) | {"max_position_embeddings": 512}
GEMMA = {"sliding_window": 512, "layer_types": ["sliding_attention"] * 5 + ["full_attention"], "num_hidden_layers": 6}
T5 = {"vocab_size": 1000, "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 2, "num_heads": 12, "pad_token_id": 0}
VIT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "image_size": 224,
}
WHISPER = {
    "d_model": 1280,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "encoder_layers": 2,
    "num_mel_bins": 128,
}
MODERN = {
    "local_attention": 128,
    "global_attn_every_n_layers": 3,
    "num_hidden_layers": 3,
    "cls_token_id": 1,
    "sep_token_id": 2,
}

CASES = (
    Case("ModernBERT base, 3 layers, 8,192 tokens", "ModernBert", text(768, 1152, 12, **MODERN), prefill, 8192),
    Case("Gemma 3 270M, 6 layers, window 512, 4,096 tokens", "Gemma3Text", text(640, 2048, 4, 1, 256, **GEMMA), prefill, 4096),
    Case("Mistral, a quarter as wide, window 1,024, 4,096 tokens", "Mistral",
         text(1024, 3584, 8, 2, 128, sliding_window=1024), prefill, 4096),
    Case("BERT base, 16 x 512 padded to half", "Bert", BERT, padded, 512),
    Case("Llama 3.2 1B, a token over a cache of 8,192", "Llama", text(2048, 8192, 32, 8, 64), decode, 8192),
    Case("SmolLM 135M, training, packed into 4,096 tokens", "Llama", text(576, 1536, 9, 3, 64), packed, 4096, grad=True),
    Case("ViT base, 8 images", "ViT", VIT, images, 8),
    Case("T5 base encoder, 2 x 512", "T5Encoder", T5, text_pairs, 512),
    Case("Whisper large encoder, 1,500 frames", "WhisperEncoder", WHISPER, sound, 1500),
)  # fmt: skip
SMOKE = (
    Case("a tiny Mistral", "Mistral", text(32, 32, 4, 2, 8, sliding_window=64), prefill, 400),
    Case("a tiny Llama, packed", "Llama", text(32, 32, 4, 2, 8), packed, 600, grad=True),
)


def no_attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **more: Any) -> tuple[torch.Tensor, None]:
    """An output of attention's shape, and gradients of all its inputs, for next to no work."""
    out = query[..., : value.size(3)].transpose(1, 2).contiguous()
    return (out + 0 * (key.sum() + value.sum()) if out.requires_grad else out), None


transformers.AttentionInterface.register("none", no_attention)
transformers.AttentionMaskInterface.register("none", lambda **given: None)
CLASSES = {"T5Encoder": ("T5Config", "T5EncoderModel"), "Gemma3Text": ("Gemma3TextConfig", "Gemma3TextModel")}


def build(case: Case, implementation: str, dtype: torch.dtype) -> Any:
    found, model = CLASSES.get(case.model, (f"{case.model}Config", f"{case.model}Model"))
    if case.model == "WhisperEncoder":
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        return WhisperEncoder._from_config(
            transformers.WhisperConfig(**case.settings), attn_implementation=implementation
        ).to(dtype)
    made = getattr(transformers, found)(**case.settings)
    return getattr(transformers, model)._from_config(made, attn_implementation=implementation).to(dtype)


def measure(case: Case, dtype: torch.dtype, seconds: float) -> Result:
    torch.manual_seed(0)
    stock = build(case, "sdpa", dtype).train(case.grad)
    told, none = (build(case, name, dtype).train(case.grad) for name in ("fastattn", "none"))
    for model in (told, none):
        model.load_state_dict(stock.state_dict(), assign=True)
    for model in (stock, told, none):
        model.requires_grad_(case.grad)
    plain, string, again, bare = (case.use(model, case.size) for model in (stock, told, stock, none))

    def patched() -> torch.Tensor:
        with fastattn.patch():
            return again()

    runs, outputs, served = {STOCK: plain, STRING: string, PATCH: patched, AGAIN: plain, NONE: bare}, {}, {}
    with tempfile.TemporaryDirectory() as directory, torch.set_grad_enabled(case.grad):
        fastattn.options(cache_dir=directory, tune_budget=1e6)
        fastattn.clear()
        for name in (STOCK, STRING, PATCH):
            runs[name]()  # tunes
            fastattn.stats.reset()
            outputs[name] = runs[name]().float()
            served[name] = sorted(fastattn.stats()["served_by"]) + [
                f"passed on: {why}" for why in fastattn.stats()["passed_on"]
            ]
        found = interleave(runs, rounds=15, seconds=seconds)
    scale = outputs[STOCK].abs().max()
    error = max(float((outputs[name] - outputs[STOCK]).abs().max() / scale) for name in (STRING, PATCH))
    ms = {name: 1e3 * median(samples) for name, samples in found.items()}
    return Result(case.name, str(dtype)[6:], ms, spread(found, STOCK, AGAIN), error, served)


def table(results: Iterable[Result]) -> Table:
    shown = plain_table("whole models over stock sdpa")
    shown.add_column("")
    for heading in ("dtype", "sdpa", "string", "", "patch()", "", "none", "A/A", "differs"):
        shown.add_column(heading, justify="right")
    shown.add_column("string: served by")
    for r in results:
        cells = [r.name, r.dtype, f"{r.ms[STOCK]:.0f} ms"]
        for name in (STRING, PATCH):
            cells += [f"{r.ms[name]:.0f}", f"{r.ms[STOCK] / r.ms[name]:.2f}x"]
        cells.append(f"{r.ms[STOCK] / r.ms[NONE]:.2f}x")
        shown.add_row(*cells, f"{100 * r.spread:.0f}%", f"{r.error:.1g}", "; ".join(r.served[STRING]))
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name it finds")
    parser.add_argument("--dtype", action="append", choices=list(FAR))
    parser.add_argument("--seconds", type=float, default=20.0, help="of each model's rounds")
    parser.add_argument("--smoke", action="store_true", help="two tiny models")
    add_results(parser, "models.txt and models.json")
    args = parser.parse_args()
    console, facts = open_console(160), {**environment(), "transformers": transformers.__version__}
    console.print(in_one_line(facts))
    results = []
    for case in SMOKE if args.smoke else [case for case in CASES if re.search(args.only, case.name)]:
        for dtype in args.dtype or list(FAR):
            print(f"{case.name}, {dtype} ...", file=sys.stderr)
            results.append(measure(case, getattr(torch, dtype), 0.5 if args.smoke else args.seconds))
    console.print(table(results))
    keep(args, facts, "models", console, results)
    wrong = [r for r in results if not r.error <= FAR[r.dtype]]
    for r in wrong:
        console.print(f"differs: {r.name}, {r.dtype}: {r.error:.2g}", style="red")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
