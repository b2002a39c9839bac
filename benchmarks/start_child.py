"""What a process pays at its start, as one line of JSON: starts.py starts it, with the store in FASTATTN_CACHE_DIR."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

LIBRARIES = ("flash_attn", "xformers", "sageattention", "flashinfer", "transformer_engine", "triton")


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    found: dict[str, Any] = {"torch_s": seconds(lambda: __import__("torch"))}
    before = {name for name in LIBRARIES if name in sys.modules}
    found["fastattn_s"] = seconds(lambda: __import__("fastattn"))
    found["loaded"] = sorted({name for name in LIBRARIES if name in sys.modules} - before)
    print(json.dumps(found | calls(int(sys.argv[1]))))


def calls(count: int) -> dict[str, Any]:
    """The first call on each of `count` stored problems, and the kernel's own time: a later call."""
    import torch
    from tiny import many

    import fastattn

    torch.set_num_threads(1)
    first, own = [], []
    problems = many(count)
    for q, k, v in problems:  # torch's own first times are none of ours
        torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for q, k, v in problems:
        run = lambda q=q, k=k, v=v: fastattn.attention(q, k, v)  # noqa: E731
        first.append(seconds(run))
        own.append(median(seconds(run) for _ in range(5)))
    stats = fastattn.stats()
    return {"first_s": first, "own_s": own, "tunings": stats["tunings"], "served_by": sorted(stats["served_by"])}


if __name__ == "__main__":
    main()
