"""A small causal language model of symbols, as users of nanoGPT write it: pre-norm blocks, F.sdpa inside, tied embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Size:
    """nanoGPT's recipe for a CPU (4 layers of 128, 768 tokens a step), with a longer context and the head_dim of GPT-2."""

    symbols: int
    layers: int = 4
    heads: int = 2
    width: int = 128
    context: int = 256
    batch: int = 3


class CausalSelfAttention(nn.Module):
    def __init__(self, size, attend_in):
        super().__init__()
        self.heads, self.attend_in = size.heads, attend_in
        self.qkv = nn.Linear(size.width, 3 * size.width, bias=False)
        self.out = nn.Linear(size.width, size.width, bias=False)

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = self.qkv(x).to(self.attend_in).split(width, dim=2)
        q, k, v = (y.view(batch, length, self.heads, -1).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, width).to(x.dtype))


class Block(nn.Module):
    def __init__(self, size, attend_in):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(size.width, bias=False), nn.LayerNorm(size.width, bias=False)
        self.attention = CausalSelfAttention(size, attend_in)
        self.up = nn.Linear(size.width, 4 * size.width, bias=False)
        self.down = nn.Linear(4 * size.width, size.width, bias=False)

    def forward(self, x):
        x = x + self.attention(self.norm_1(x))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class GPT(nn.Module):
    def __init__(self, size, attend_in):
        super().__init__()
        self.symbols = nn.Embedding(size.symbols, size.width)
        self.places = nn.Embedding(size.context, size.width)
        self.blocks = nn.Sequential(*(Block(size, attend_in) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width, bias=False)
        self.head = nn.Linear(size.width, size.symbols, bias=False)
        self.head.weight = self.symbols.weight  # tied
        for name, weight in self.named_parameters():
            if weight.dim() == 2:  # what adds to the residual stream starts smaller: 2 of them per layer
                adds = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * size.layers) ** 0.5 if adds else 0.02)

    def forward(self, tokens, targets):
        """The mean loss of predicting `targets` [batch, length] from `tokens` [batch, length]."""
        x = self.symbols(tokens) + self.places(torch.arange(tokens.shape[1]))
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
