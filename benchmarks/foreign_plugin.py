"""A pytest plugin of foreign_suites.py: the tests of another project run with fastattn in the place of F.sdpa.

FOREIGN_HOW "string": in the place of transformers' "sdpa" instead, by the functions of attn_implementation="fastattn".
FOREIGN_STATS names a folder: what each process's calls came to is written into it, as JSON.
"""

from __future__ import annotations

import json
import os
import tempfile
from typing import Any

import fastattn


def pytest_configure(config: Any) -> None:
    """Before a test's module is imported, so that names it binds are ours."""
    if os.environ["FOREIGN_HOW"] != "string":
        fastattn.patch()
        return
    from fastattn.integrations import transformers as ours

    ours.library.AttentionInterface.register("sdpa", ours.attend)
    ours.library.AttentionMaskInterface.register("sdpa", ours.make_mask)


def pytest_sessionfinish(session: Any) -> None:
    stats = {name: value for name, value in fastattn.stats().items() if name != "untuned"}
    file, _ = tempfile.mkstemp(suffix=".json", dir=os.environ["FOREIGN_STATS"])
    with os.fdopen(file, "w", encoding="utf-8") as out:
        json.dump(stats, out)
