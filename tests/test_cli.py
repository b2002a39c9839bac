"""The command line: what it parses, that it asks exactly what attention() asks, and what it prints."""

from __future__ import annotations

import json
from dataclasses import replace

import building
import pytest
import torch
from click.testing import CliRunner

import fastattn
from fastattn import cli, config, inputs, learnt, masks, presets, resolve, store
from fastattn.cli import asking, tables
from fastattn.device import Device
from fastattn.problem import Problem

TINY = "1x2x16x8"


def qkv(**how):
    return building.qkv(**{"b": 2, "hq": 4, "sq": 37, "d": 16, **how})


def run(*words, code=0):
    result = CliRunner().invoke(cli.main, [str(w) for w in words])
    assert result.exit_code == code, result.output
    return result.output


def asked(*words):
    """The problems that `fastattn tune WORDS` would tune."""
    with cli.tune.make_context("tune", " ".join(words).split()) as context:
        return list(asking.problems(**{k: v for k, v in context.params.items() if k not in ("as_json", "force", "compiling")}))


def of_call(q, k, v, mask=None, layout="bhsd", **options):
    """What attention() asks for this very call."""
    key = inputs.call_key(q, k, v, mask, layout, inputs.parse(options))
    return Problem.from_key(key, config.current().accuracy)


CALLS = {
    "2x4x37x16": {},
    "2x4/2x5x33x16/8": {"hkv": 2, "sq": 5, "skv": 33, "dv": 8},
    "1x4/1x1x40x16": {"b": 1, "hkv": 1, "sq": 1, "skv": 40},
    "2x4x37x16 --dtype bfloat16": {"dtype": torch.bfloat16},
    "2x4x37x16 --dtype float16 --grad": {"dtype": torch.float16, "grad": True},
    "2x4x37x16 --layout bshd": {"layout": "bshd", "memory": "transposed"},
    "2x4x37x16 --layout bshd --strides contiguous": {"layout": "bshd"},
    "2x4x37x16 --layout sbhd": {"layout": "sbhd", "memory": "seq_first"},
    "2x4x37x16 --strides transposed": {"memory": "transposed"},
    "2x4x37x16 --strides packed,cache,cache_bshd": {"memory": ("packed", "cache", "cache_bshd")},
    "2x4x37x16 --strides seq_first,expanded,other": {"memory": ("seq_first", "expanded_heads", "dims_before_rows")},
}


@pytest.mark.parametrize("words", CALLS)
def test_a_shape_means_exactly_the_problem_that_the_call_asks(words):
    how = CALLS[words]
    assert asked(words) == [of_call(*qkv(**how), layout=how.get("layout", "bhsd"))]


MASKS = {
    "bool:b11k": ((2, 1, 1, 37), torch.bool, False),
    "bool:11qk": ((37, 37), torch.bool, False),
    "same:1hqk": ((1, 4, 37, 37), torch.float32, False),
    "float32:bhqk:grad": ((2, 4, 37, 37), torch.float32, True),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("word", MASKS)
def test_a_mask_means_exactly_the_problem_that_the_call_asks(word, causal):
    size, dtype, wanted = MASKS[word]
    mask = torch.ones(size, dtype=dtype).requires_grad_(wanted)
    grad = ["--grad"] if wanted else []
    corner = ["--causal top_left"] if causal else []
    assert asked("2x4x37x16", f"--mask {word}", *grad, *corner) == [
        of_call(*qkv(grad=wanted), mask, is_causal=causal)
    ]


@pytest.mark.parametrize("corner", masks.CORNERS)
def test_causal_is_the_corner_named(corner):
    assert asked("2x4x5x33x16", "--causal", corner) == [of_call(*qkv(sq=5, skv=33), masks.Causal(corner))]


@pytest.mark.parametrize("accuracy", ["dtype", "0.01"])
def test_accuracy_is_the_rung_of_the_call(accuracy):
    rung = accuracy if accuracy == "dtype" else float(accuracy)
    assert asked("2x4x37x16", "--accuracy", accuracy) == [of_call(*qkv(), accuracy=rung)]


def test_threads_and_precision_are_this_process(monkeypatch):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert asked(TINY)[0].threads == 1
    finally:
        torch.set_num_threads(before)
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert asked("2x4x37x16") == [of_call(*qkv())]
        changed = asked("2x4x37x16")[0].precision
    finally:
        torch.set_float32_matmul_precision(precision)
    assert asked("2x4x37x16")[0].precision != changed


@pytest.mark.parametrize("name", presets.PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_preset_is_a_problem_whose_command_line_gives_it_back(name, dtype):
    for shape in presets.PRESETS[name]:
        problem = presets.problem(replace(shape, strides=None), dtype, grad=False)
        assert asked(learnt.command_line(problem)) == [problem]


@pytest.mark.parametrize("words", [
    "2x4/2x5x33x16/8", "3x4x37x16 --dtype bfloat16 --grad", "2x4x5x33x16 --causal bottom_right",
    "2x4x37x16 --mask bool:b11k", "2x4x37x16 --mask float32:1hqk --causal top_left",
])  # fmt: skip
def test_command_line_is_parsed_back_to_the_same_problem(words):
    problem = asked(words)[0]
    assert asked(learnt.command_line(problem)) == [problem]


@pytest.mark.parametrize("words", [
    "2x4x37x16 --strides transposed", "2x4x37x16 --strides packed,cache,contiguous",
    "2x4x37x16 --layout bshd", "2x4x37x16 --layout sbhd --strides transposed", "2x4x37x16 --grad --mask same:bhqk:grad",
])  # fmt: skip
def test_command_line_names_the_strides(words):
    problem = asked(words)[0]
    assert asked(learnt.command_line(problem)) == [problem]


def test_the_hint_of_an_untuned_call_tunes_that_call(caplog):
    q, k, v = qkv(b=1, hq=2, sq=33, d=8)
    with caplog.at_level("WARNING", "fastattn"), fastattn.options(mode="cached"):
        fastattn.attention(q, k, v)
    words = caplog.messages[0].split("fastattn tune ")[1].split()
    run("tune", *words)
    fastattn.clear()
    with fastattn.options(mode="cached"):
        explained = fastattn.explain(q, k, v)
    assert explained.verdict is not None and explained.verdict.problem == of_call(q, k, v)


BAD = [
    (["2x3x4"], "SHAPE '2x3x4' cannot be read"),
    (["0x2x16x8"], "SHAPE '0x2x16x8' cannot be read"),
    (["1x6/4x16x8"], "q_heads 6 must be a multiple of kv_heads 4"),
    (["1x2x16x8/4/2"], "cannot be read"),
    ([TINY, "--mask", "bool"], "--mask 'bool' must be DTYPE:PATTERN"),
    ([TINY, "--mask", "bool:kqhb"], "a mask's pattern is 'bhqk' with 1 where it is broadcast"),
    ([TINY, "--mask", "int8:b11k"], "a mask's dtype is one of bool, same"),
    ([TINY, "--mask", "float16:b11k"], "a mask beside float32 inputs is bool, float32"),
    ([TINY, "--mask", "bool:b11k", "--causal", "bottom_right"], "cannot be combined with a mask"),
    ([TINY, "--strides", "sideways"], "strides must be one of contiguous, transposed"),
    ([TINY, "--strides", "packed,packed"], "one class, or three"),
    ([TINY, "--accuracy", "perfect"], "accuracy must be 'exact', 'dtype' or a number above 0"),
    ([TINY, "--causal", "middle"], "'top_left', 'bottom_right'"),
    ([TINY, "--dtype", "int8"], "'float32'"),
    (["--preset", "gpt-9"], "--preset 'gpt-9' is not known; there are all, vit-b16"),
    (["--preset", "vit-b16", "--causal", "top_left"], "--causal does not go with --preset"),
    ([], "nothing to do: give a SHAPE"),
]


@pytest.mark.parametrize("command", ["tune", "explain"])
@pytest.mark.parametrize(("words", "sentence"), BAD)
def test_a_mistake_is_a_sentence_that_says_what_would_be_right(command, words, sentence):
    output = run(command, *words, code=2)
    assert sentence in output
    assert "Traceback" not in output


def test_a_bad_environment_variable_is_a_usage_error(monkeypatch):
    monkeypatch.setenv("FASTATTN_MODE", "fast")
    config.forget()
    output = run("cache", "path", code=2)
    assert "FASTATTN_MODE must be one of auto, cached, off, got 'fast'" in output


def test_tune_explain_show_export_and_clear_tell_one_story(own_store, tmp_path):
    found = json.loads(run("tune", TINY, "--dtype", "float32", "--dtype", "bfloat16", "--json"))
    assert [v["problem"]["dtype"] for v in found] == ["float32", "bfloat16"]
    fastattn.clear()  # what follows is read from disk
    explained = json.loads(run("explain", TINY, "--dtype", "bfloat16", "--json"))[0]
    assert explained["served_by"] == found[1]["winner"]
    assert explained["speedup"] == found[1]["speedup"]
    shown = json.loads(run("cache", "show", "--json"))
    assert sorted(v["winner"] for v in shown) == sorted(v["winner"] for v in found)
    assert json.loads(run("cache", "path", "--json"))["written"] == str(own_store)
    manifest = tmp_path / "verdicts.json"
    assert json.loads(run("cache", "export", manifest, "--json"))["verdicts"] == 2
    assert len(store.read_manifest(manifest, Device.of(torch.device("cpu")))) == 2
    assert json.loads(run("cache", "clear", "--json")) == {"deleted": 2}
    assert json.loads(run("cache", "show", "--json")) == []


def test_what_has_a_verdict_is_tuned_again_only_by_force():
    first = json.loads(run("tune", TINY, "--json"))[0]["created"]
    tunings = []
    real = resolve.tuning.tune

    def counted(problem, *args, **kwargs):
        tunings.append(problem)
        return real(problem, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resolve.tuning, "tune", counted)
        assert json.loads(run("tune", TINY, "--json"))[0]["created"] == first
        assert tunings == []
        run("tune", TINY, "--json", "--force")
        assert len(tunings) == 1


@pytest.mark.parametrize("columns", [80, 100])
def test_tables_fit_the_width_and_show_every_problem(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    shapes = (TINY, "1x4/2x16x8", "1x2x1x40x8")
    outputs = [run("tune", *shapes), run("explain", *shapes), run("cache", "show")]
    for output in outputs[:2]:
        assert max(map(len, output.splitlines())) <= columns
    for text in ("1 x 2 x 16 d8", "1 x 4/2 x 16 d8", "1 x 2 x 1 on ~47 d8", "geometric mean"):
        assert text in outputs[0]
    for name in ("default", "torch_flash", "sdpa_math", "torch_cudnn"):
        assert name in outputs[1]
    assert "3 verdicts" in outputs[2]


def test_explain_measures_only_when_told():
    before = json.loads(run("explain", TINY, "--json"))[0]
    assert before["why"] == "not tuned yet: the first call will"
    assert all(row["time_us"] is None for row in before["candidates"])
    after = json.loads(run("explain", TINY, "--tune", "--json"))[0]
    assert any(row["time_us"] for row in after["candidates"])
    assert {row["candidate"].split("+")[0] for row in after["candidates"]} == set(fastattn.config.kernel_names())


def test_version_is_the_package_version():
    assert run("--version").strip() == f"fastattn, version {fastattn.__version__}"


def test_the_geometric_mean_is_the_root_of_the_product():
    assert tables.geomean([2.0, 8.0]) == pytest.approx(4.0, rel=1e-12)


@pytest.mark.parametrize("cls", ["contiguous", "transposed", "seq_first", "cache", "cache_bshd", "packed",
                                 "interleaved", "expanded"])  # fmt: skip
def test_strides_of_a_class_are_of_that_class(cls):
    size = (2, 3, 5, 7)
    assert fastattn.problem.stride_class(size, presets.strides(size, cls)) == cls
