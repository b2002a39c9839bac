"""Write docs/masks.md, with pictures that the masks make: python docs/make_masks.py. A test compares the page with it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import torch

from fastattn import masks
from fastattn.problems.masks.written import KINDS

PAGE = Path(__file__).with_name("masks.md")
HEAD = """# Masks with a meaning

Made by `python docs/make_masks.py`. `fastattn.masks` has values that say which keys a query sees. What they hide is not
computed, and no tensor of queries by keys is made: the scores are cut into the rectangles that are left, forward and
backward.

```python
import torch
from fastattn import attention, masks

q, k, v = (torch.randn(1, 4, 600, 32) for _ in range(3))
out = attention(q, k, v, masks.Causal() & masks.Document([250, 200, 150]))  # three packed sequences

ids = torch.arange(600)[None] // 200  # or the document of each token, [batch, tokens]
assert masks.Document(ids=ids) == masks.Document([[200, 200, 200]])
```

They are small and frozen, compare by value, and but for Bias hold no tensor of yours: what a tensor says is read once, when the
value is made. `a & b` shows what both show, `a | b` what either does. `is_causal` and `window` say Causal and Window briefly,
and hold beside any of them. A dense mask is looked at in every call, and what it hides is left out as well
([how](from-a-dense-mask.md)): say what you mean where you can, as a value is cheaper than a look and needs no memory.

A mask speaks of positions. The position p of query i is i, or i + kv_len - q_len where the mask holds a
`Causal("bottom_right")`. `mask.show(q_len, kv_len)` is a picture: print it, `.save("mask.png")` it, or let a notebook
show it; `mask.dense(batch, q_len, kv_len)` is the same as a bool tensor, and `masks.parse(repr(mask)) == mask`.
`fastattn tune 1x8x4096x64 --mask "Causal() & Document(512)"` tunes ahead.

Each picture has a row for each of 32 queries and a column for each of 32 keys."""
N = 32
EXAMPLES = {
    "Causal": masks.Causal(),
    "Window": masks.Window(6, 2),
    "Dilated": masks.Dilated(4),
    "Chunked": masks.Chunked(8),
    "Document": masks.Document([14, 6, 12]),
    "Padding": masks.Padding([24]),
    "Packed": masks.Packed((14, 6, 12), (10, 10, 12), "bottom_right"),
    "Filled": masks.Filled(26, 32),
    "PackedUnread": masks.PackedUnread(12, 12, "top_left", are_same=True),
    "FilledUnread": masks.FilledUnread(26, 32),
    "FilledPagesUnread": masks.FilledPagesUnread(26, 32, page=16),
    "Prefix": masks.Prefix(8),
    "Global": masks.Global((0, 17)),
    "ALiBi": masks.ALiBi([0.15]),
    "Neighborhood": masks.Neighborhood((4, 8), 1),
    "Static": masks.Static(torch.arange(N)[:, None] * 5 % 7 > torch.arange(N) % 7),
    "Bias": masks.Bias(-(torch.arange(N)[:, None] - torch.arange(N)).abs().float()) & masks.Window(5, 5),
}
MODELS = {
    "Mistral, Gemma: a window that looks back": masks.Causal() & masks.Window(7, 0),
    "ModernBERT: local attention in a padded batch": masks.Window(5, 5) & masks.Padding([26]),
    "Longformer: a window and global tokens": masks.Window(3, 3) | masks.Global(2),
    "Longformer, dilated": masks.Dilated(3) & masks.Window(9, 9) | masks.Global(1),
    "Packed documents, causal": masks.Causal() & masks.Document([14, 6, 12]),
    "Packed documents in a window": masks.Causal() & masks.Document([14, 6, 12]) & masks.Window(4, 0),
    "A prefix language model": masks.Causal() | masks.Prefix(8),
    "Llama 4: chunks": masks.Causal() & masks.Chunked(8),
    "Left padding, causal": masks.Causal() & masks.Padding([24], "left"),
}
FOOT = """## What they cost

`python benchmarks/masks.py` measures what each is worth over F.sdpa with the dense mask on your machine
([results](results/README.md)). Tuning decides as always: every candidate is checked against float64, with tiles and
with the dense mask, and timed. Masks that are alike (documents of about one length, batches padded to about one share)
share a verdict; which keys are seen is read from the value of each call.

The dense form serves with dropout, in an export, where nothing may be learnt, and below 256 queries or 2^18 pairs
of a query and a key, where tiles cost what they save. A Bias and what stands beside it are made one float mask in each
call, in which what is hidden is found. `fastattn tune --compile` also tries flex_attention: what a mask says becomes its
BlockMask, square by square, and no tensor of queries by keys is made. A Filled mask is always served in tiles, as what
lies behind must not be read. Packed and Filled are what [layout "thd" and kv_lens](packing.md) come to, PackedUnread,
FilledUnread and FilledPagesUnread where their lengths lie on a GPU: those are never looked at, and no tile is made of them."""


def page() -> str:
    missing = {*KINDS, "Bias", "Static"} - set(EXAMPLES)
    assert not missing, f"no example of {missing}"
    parts = [HEAD]
    for name, mask in EXAMPLES.items():
        parts += [f"## {name}", f"`masks.{mask!r}`. {said(getattr(masks, name))}", shown(mask)]
    parts.append("## As models combine them")
    for what, mask in MODELS.items():
        parts += [f"**{what}**: `{mask!r}`", shown(mask)]
    return "\n\n".join([*parts, FOOT]).rstrip() + "\n"


def said(kind: type[masks.Mask]) -> str:
    """Its docstring, in one paragraph."""
    return re.sub(r"\s+", " ", inspect.cleandoc(kind.__doc__ or "")).replace("|p - j|", "\\|p - j\\|")


def shown(mask: masks.Mask) -> str:
    return f"```\n{mask.show(N)}\n```"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
