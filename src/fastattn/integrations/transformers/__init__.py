"""Hugging Face transformers: attn_implementation="fastattn".

    import fastattn.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fastattn")

Importing it registers an attention function and a mask function; transformers looks for no entry points. Their masks are read
as values of fastattn.masks where they are made (read_masks.py, make_mask.py), travel through the model as a tensor without
memory (told_mask.py), and are told to attention() in each layer (attend.py). docs/transformers.md is the page.
"""

from __future__ import annotations

from fastattn.integrations.transformers import library
from fastattn.integrations.transformers.attend import attend
from fastattn.integrations.transformers.make_mask import make_mask
from fastattn.integrations.transformers.told_mask import ToldMask

NAME = "fastattn"

__all__ = ["NAME", "ToldMask", "attend", "make_mask"]

library.AttentionInterface.register(NAME, attend)
library.AttentionMaskInterface.register(NAME, make_mask)
