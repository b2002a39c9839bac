"""Twenty models of Hugging Face, tiny and random: a row each, made from a configuration and never downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers

TEXT = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
GQA = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 24,
    "patch_size": 6,
}  # fmt: skip
BOTH_KINDS = ["sliding_attention", "full_attention"]
ENCODER = {**TEXT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass(frozen=True)
class Row:
    """settings: of the configuration; inputs: what a call is given; generates: whether generate() is tried."""

    name: str
    config: str
    model: str
    settings: dict[str, Any]
    inputs: str = "text"
    generates: bool = False
    only_5: bool = False  # in 4.57 it does not ask for an attention function
    logits: str = "logits"
    stock: str = "sdpa"  # what it is compared with: eager where their sdpa cannot do it


def lm(name: str, config: str, settings: dict[str, Any], **more: Any) -> Row:
    return Row(name, f"{config}Config", f"{config}ForCausalLM", settings, generates=True, **more)


ROWS = (
    lm("Llama", "Llama", GQA),
    lm("Mistral, a window", "Mistral", {**GQA, "sliding_window": 8}),
    lm("Gemma 2, softcap and windows", "Gemma2", {**GQA, "sliding_window": 8, "attn_logit_softcapping": 5.0,
       "query_pre_attn_scalar": 8, "layer_types": BOTH_KINDS}, stock="eager"),
    Row("Gemma 3, windows", "Gemma3TextConfig", "Gemma3ForCausalLM", {**GQA, "sliding_window": 8,
        "query_pre_attn_scalar": 8, "layer_types": BOTH_KINDS}, generates=True),
    lm("Qwen 2", "Qwen2", GQA),
    lm("Qwen 3", "Qwen3", GQA),
    lm("Phi 3", "Phi3", {**GQA, "sliding_window": 12}),
    lm("gpt-oss, sinks", "GptOss", {**GQA, "sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1,
       "layer_types": BOTH_KINDS}, stock="eager"),
    Row("Llama 4 text, chunks", "Llama4TextConfig", "Llama4ForCausalLM", {**GQA, "attention_chunk_size": 8,
        "num_local_experts": 2, "intermediate_size_mlp": 48, "layer_types": ["chunked_attention", "full_attention"],
        "no_rope_layers": [1, 0], "interleave_moe_layer_step": 2}, generates=True),
    lm("Cohere 2, windows", "Cohere2", {**GQA, "sliding_window": 8, "layer_types": BOTH_KINDS}),
    Row("GPT-2", "GPT2Config", "GPT2LMHeadModel", {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4,
        "n_positions": 128, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1,
        "eos_token_id": None, "pad_token_id": 0}, generates=True),
    Row("BERT", "BertConfig", "BertForMaskedLM", ENCODER, only_5=True),
    Row("RoBERTa", "RobertaConfig", "RobertaForMaskedLM", ENCODER, only_5=True),
    Row("ModernBERT, windows", "ModernBertConfig", "ModernBertForMaskedLM", {**TEXT, "local_attention": 8,
        "global_attn_every_n_layers": 2, "attention_dropout": 0.0, "cls_token_id": 1, "sep_token_id": 2}, only_5=True),
    Row("ViT", "ViTConfig", "ViTForImageClassification", VISION, "image"),
    Row("DINOv2", "Dinov2Config", "Dinov2ForImageClassification", VISION, "image"),
    Row("CLIP", "CLIPConfig", "CLIPModel", {"text_config": {**TEXT, "eos_token_id": 96}, "vision_config": VISION,
        "projection_dim": 16},
        "image and text", logits="logits_per_image"),
    Row("Whisper", "WhisperConfig", "WhisperForConditionalGeneration", {"vocab_size": 97, "d_model": 32,
        "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_source_positions": 24, "max_target_positions": 64,
        "num_mel_bins": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
        "dropout": 0.0, "suppress_tokens": None, "begin_suppress_tokens": None}, "audio"),
    Row("T5, a position bias", "T5Config", "T5ForConditionalGeneration", {"vocab_size": 97, "d_model": 32, "d_kv": 8,
        "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0, "decoder_start_token_id": 0,
        "pad_token_id": 0, "eos_token_id": 1}, "text to text", generates=True, only_5=True),
    Row("BART", "BartConfig", "BartForConditionalGeneration", {"vocab_size": 97, "d_model": 32, "encoder_layers": 2,
        "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48, "max_position_embeddings": 128, "dropout": 0.0, "forced_eos_token_id": None},
        "text to text", generates=True),
)  # fmt: skip


def build(row: Row, implementation: str) -> Any:
    """The model of a row, always with the same weights."""
    made = getattr(transformers, row.config)(**row.settings)
    made._experts_implementation = "eager"  # the others take no float64
    torch.manual_seed(0)
    model = getattr(transformers, row.model)._from_config(made, attn_implementation=implementation)
    torch.manual_seed(1)
    with torch.no_grad():  # scores that differ, sinks that take part
        for name, weight in model.named_parameters():
            if weight.dim() > 1 or "sinks" in name:
                weight.copy_(torch.randn(weight.shape) * (0.3 if weight.dim() > 1 else 1.0))
    return model.eval()


def inputs(row: Row, padding: str = "") -> dict[str, Any]:
    """What a call of the model is given; padding: "left" or "right", of a batch of texts."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 97, (2, 20), generator=g)
    mask = torch.ones_like(ids)
    if padding:
        mask[1, slice(0, 7) if padding == "left" else slice(13, 20)] = 0
        ids = ids * mask
    text = {"input_ids": ids, "attention_mask": mask} if padding else {"input_ids": ids}
    image = {"pixel_values": torch.randn(2, 3, 24, 24, generator=g)}
    return {
        "text": text,
        "image": image,
        "image and text": {**text, **image},
        "audio": {"input_features": torch.randn(2, 8, 48, generator=g), "decoder_input_ids": ids[:, :9]},
        "text to text": {**text, "decoder_input_ids": ids[:, :9]},
    }[row.inputs]


def run(model: Any, row: Row, given: dict[str, Any]) -> torch.Tensor:
    return getattr(model(**given), row.logits)
