"""One problem's first call in a process of its own, as one line of JSON: first_calls.py starts it.

    python benchmarks/first_call_child.py '{"q": [1, 1, 1, 64], "kv": [1, 1, 1000000, 64]}'

Peaks are of resident memory (VmHWM of /proc/self/status, which writing 5 to /proc/self/clear_refs sets back).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastattn


def main() -> None:
    how = json.loads(sys.argv[1])
    q, k, v = tensors(how)
    mask = torch.randn(how["mask"]) if "mask" in how else None
    causal, gqa = how.get("causal", False), how["q"][1] != how["kv"][1]
    stock = torch.nn.functional.scaled_dot_product_attention

    def default() -> Any:
        return backward(stock(q, k, v, mask, is_causal=causal, enable_gqa=gqa), how)

    def ours() -> Any:
        return backward(fastattn.attention(q, k, v, mask, is_causal=causal), how)

    with tempfile.TemporaryDirectory() as directory:
        fastattn.options(cache_dir=directory)
        _, default_peak = measured(default)
        default_s = min(measured(default)[0] for _ in range(2))
        first_s, peak = measured(ours)
        found = fastattn.explain(q, k, v, mask, is_causal=causal)
    own = q.nbytes + k.nbytes + v.nbytes + q.nbytes // how["q"][3] * how["kv"][3] + (0 if mask is None else mask.nbytes)
    tried = sum(1 for trial in found.verdict.trials if trial.first_call_us) if found.verdict is not None else 0
    print(json.dumps({
        "default_s": default_s, "default_peak": default_peak, "first_s": first_s, "peak": peak, "own": own,
        "served_by": found.served_by, "tried": tried,
    }))  # fmt: skip


def tensors(how: dict[str, Any]) -> list[torch.Tensor]:
    dtype = getattr(torch, how.get("dtype", "float32"))
    made = []
    for shape in (how["q"], how["kv"], how["kv"]):
        flat = torch.randn(min(2**20, torch.Size(shape).numel()), dtype=torch.float32)
        x = flat.to(dtype).repeat(-(-torch.Size(shape).numel() // flat.numel()))[: torch.Size(shape).numel()]
        made.append(x.clone().view(shape).requires_grad_(how.get("grad", False)))
    return made


def backward(out: torch.Tensor, how: dict[str, Any]) -> torch.Tensor:
    if how.get("grad"):
        out.sum().backward()
    return out


def measured(run: Callable[[], object]) -> tuple[float, int]:
    """(seconds, bytes of resident memory at the peak beyond those before)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = resident("VmRSS")
    start = time.perf_counter()
    run()
    return time.perf_counter() - start, max(0, resident("VmHWM") - before)


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
