"""First calls on extreme problems: their time and their memory, each in a process of its own, against bounds."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import first_call_child
import starts
from report import plain_table
from rich.table import Table

MIB = 2**20
FLOOR_S, FACTOR = 1.0, 60.0  # a first call takes at most the larger of a second and 60 x the default
ROOM, SHARE = 256 * MIB, 2.0  # its memory: 256 MiB and twice the problem's own tensors
EXTREMES: dict[str, dict[str, Any]] = {
    "1 query on 1,000,000 keys": {"q": [1, 1, 1, 64], "kv": [1, 1, 1_000_000, 64]},
    "decode on 131,072, GQA 32/8": {"q": [1, 32, 1, 128], "kv": [1, 8, 131_072, 128], "dtype": "bfloat16"},
    "one head of d 512": {"q": [1, 1, 4096, 512], "kv": [1, 1, 4096, 512]},
    "batch 70,000": {"q": [70_000, 2, 8, 32], "kv": [70_000, 2, 8, 32]},
    "batch 8,192": {"q": [8192, 4, 16, 64], "kv": [8192, 4, 16, 64]},
    "Perceiver, 512 on 50,176": {"q": [1, 8, 512, 64], "kv": [1, 8, 50_176, 64]},
    "16,384 causal": {"q": [1, 2, 16_384, 64], "kv": [1, 2, 16_384, 64], "causal": True},
    "512 heads": {"q": [1, 512, 256, 64], "kv": [1, 512, 256, 64]},
    "head_dim 8": {"q": [1, 8, 4096, 8], "kv": [1, 8, 4096, 8]},
    "a float mask per head": {"q": [1, 8, 2048, 64], "kv": [1, 8, 2048, 64], "mask": [1, 8, 2048, 2048]},
    "training, 4096, bfloat16": {"q": [1, 4, 4096, 64], "kv": [1, 4, 4096, 64], "dtype": "bfloat16", "grad": True},
    "half a million queries on 16": {"q": [1, 1, 524_288, 64], "kv": [1, 1, 16, 64]},
}


@dataclass(frozen=True)
class FirstCall:
    """One extreme problem: seconds, and bytes of resident memory beyond those before. own: bytes of q, k, v, mask and out."""

    name: str
    default_s: float
    default_peak: int
    first_s: float
    peak: int
    own: int
    served_by: str
    tried: int

    @property
    def most_s(self) -> float:
        return max(FLOOR_S, FACTOR * self.default_s)

    @property
    def most_bytes(self) -> float:
        return SHARE * self.own + ROOM

    @property
    def is_met(self) -> bool:
        return self.first_s <= self.most_s and self.peak <= self.most_bytes


def chosen(words: list[str] | None) -> list[str]:
    """The extremes with one of the words in their name; without words all."""
    return [name for name in EXTREMES if not words or any(word in name for word in words)]


def first_calls(names: list[str]) -> list[FirstCall]:
    """Each in a process of its own; what it is doing goes to stderr."""
    found = []
    for name in names:
        print(f"first call: {name} ...", file=sys.stderr)
        command = [sys.executable, first_call_child.__file__, json.dumps(EXTREMES[name])]
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=starts.as_installed())
        found.append(FirstCall(name, **json.loads(run.stdout)))
    return found


def table(found: list[FirstCall]) -> Table:
    title = f"first calls: at most max({FLOOR_S:g} s, {FACTOR:g} x the default) and {SHARE:g} x the problem + {ROOM // MIB} MiB"
    shown = plain_table(title)
    shown.add_column("")
    for heading in ("default", "first call", "at most", "problem", "default's peak", "its peak", "at most", "tried"):
        shown.add_column(heading, justify="right")
    for heading in ("", "served by"):
        shown.add_column(heading)
    for one in found:
        shown.add_row(
            one.name,
            *(f"{s:,.3f} s" for s in (one.default_s, one.first_s, one.most_s)),
            *(f"{b / MIB:,.0f} MiB" for b in (one.own, one.default_peak, one.peak, one.most_bytes)),
            str(one.tried),
            "met" if one.is_met else "missed",
            one.served_by,
        )
    return shown
