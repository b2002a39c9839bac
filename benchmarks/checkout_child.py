"""One checkout's side of `overhead.py --against`: what it adds to F.sdpa, in ns, by its public functions alone.

PYTHONPATH names the checkout; FASTATTN_MODE=cached and an empty store let F.sdpa serve, bound as it is.
"""

from __future__ import annotations

import argparse
import json
from statistics import median

import torch
from rounds import interleave
from tiny import decoding, in_turn, many, tensors

import fastattn


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--seconds", type=float, default=1.5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base, found = torch.nn.functional.scaled_dot_product_attention, {}
    for name, hit, problems in (
        ("1 problem", fastattn.attention, [tensors()]),
        ("4 problems in turn", fastattn.attention, many(4)),
        ("64 problems in turn", fastattn.attention, many(64)),
        ("decode, kv_len + 1 a call", fastattn.attention, decoding(100, 112)),
        ("sdpa(), the drop-in", fastattn.sdpa, [tensors()]),
    ):
        calls = {"base": in_turn(base, problems), "hit": in_turn(hit, problems)}
        for _ in range(20):  # entries are made, and the one that is asked first is settled
            calls["hit"]()
        samples = interleave(calls, rounds=args.rounds, seconds=args.seconds, sample_s=2e-3)
        pairs = zip(samples["hit"], samples["base"], strict=True)
        found[name] = median((h - b) / len(problems) * 1e9 for h, b in pairs)
    print(json.dumps({"file": fastattn.__file__, "over_ns": found}))


if __name__ == "__main__":
    main()
