"""Write limit_proofs.json: for each limit of each kernel the problems that show where it is.

    python tests/support/find_limit_proofs.py

It keeps what still shows it and searches the rest, and fails where a limit cannot be shown. Run it when test_boundaries warns.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest
from limit_space import PROOFS, Space, all_limits, find_proof, is_proof, known_proofs, shortened


def main() -> None:
    known, found = known_proofs() if PROOFS.exists() else {}, {}
    for name, (kernel, kind, need) in all_limits().items():
        with pytest.MonkeyPatch.context() as patch:
            space = Space(kernel, kind, patch)
            is_known = name in known and is_proof(space, need, known[name])
            found[name] = known[name] if is_known else shortened(space, need, find_proof(space, need))
        print(name, file=sys.stderr, flush=True)
    lines = [f"  {json.dumps(name)}: {json.dumps(proof)}" for name, proof in sorted(found.items())]
    PROOFS.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
