"""The shapes that real models call attention with, as data."""

from __future__ import annotations

from dataclasses import replace

from fastattn.problems.masks import Causal, Document, Padding, Window
from fastattn.problems.shapes import SAME, Shape, shape

# What transformers, timm and diffusers pass to F.sdpa. A linear layer's output split into heads is "transposed", a slice of one
# packed QKV product is "packed", a KV cache grown by torch.cat is contiguous (and decoding has one query, whose strides
# have no say).
PRESETS: dict[str, tuple[Shape, ...]] = {
    "vit-b16": (shape(8, 12, 197, 64),),
    "vit-b16-896px": (shape(1, 12, 3137, 64),),
    "clip-text": (shape(8, 8, 77, 64, causal=True),),
    "bert-base": (shape(8, 12, 128, 64),),
    "minilm-padded": (shape(16, 12, 60, 32, mask=("bool", "b1qk")),),
    "t5-small": (shape(2, 8, 512, 64, mask=(SAME, "bhqk"), mask_grad=True),),
    "whisper-small-encoder": (shape(1, 12, 1500, 64),),
    "whisper-small-cross": (shape(1, 12, (5, 1500), 64),),
    "swin-t": (shape(64, 3, 49, 32, "packed", mask=(SAME, "1hqk"), mask_grad=True),),
    "sdxl-self": (shape(2, 10, 4096, 64), shape(2, 20, 1024, 64)),
    "sdxl-cross": (shape(2, 10, (4096, 77), 64), shape(2, 20, (1024, 77), 64)),
    "llama-3-8b-prefill": (
        replace(shape(1, (32, 8), 512, 128, causal=True), strides=("transposed", "contiguous", "contiguous")),
    ),
    "sliding-window": (
        shape(1, 8, 4096, 64, mask=Window(256, 256)),
        shape(1, 8, 4096, 64, mask=Causal() & Window(511, 0)),
    ),
    "packed-documents": (shape(1, 8, 4096, 64, mask=Causal() & Document(512)),),
    "padded-batch": (shape(16, 12, 512, 64, mask=Padding([64 + 25 * i for i in range(16)])),),
    "llama-3-8b-decode": (shape(1, (32, 8), (1, 1024), 128, None), shape(8, (32, 8), (1, 1024), 128, None)),
}
