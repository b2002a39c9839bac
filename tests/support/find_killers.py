"""Write killers.json: for each mutation of an adapter the kernel and the grid call that turn red.

    python tests/support/find_killers.py

It keeps what still kills and searches the rest, and fails where nothing kills a mutation. Run it when the mutation run warns.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from library_grid import KILLERS, MUTATIONS, broken, find_killer, installed, is_red, known_killers


def main() -> None:
    torch.set_num_threads(1)  # the grid's tensors are small
    known = known_killers()
    found = {}
    for name, (stub, text, other) in MUTATIONS.items():
        with pytest.MonkeyPatch.context() as patch, installed(stub, patch):
            kernels = broken(stub, text, other)
            kernel, case = known.get(name, ("", ""))
            if any(row.name == kernel and is_red(row, stub, case) for row in kernels):
                found[name] = (kernel, case)
            else:
                found[name] = find_killer(stub, kernels)
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    lines = [f"  {json.dumps(name)}: {json.dumps(killer)}" for name, killer in sorted(found.items()) if killer]
    KILLERS.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    alive = [name for name, killer in found.items() if killer is None]
    if alive:
        raise SystemExit("nothing turns red for:\n" + "\n".join(alive))


if __name__ == "__main__":
    main()
