"""The command line: what it parses, that it asks exactly what attention() asks, and what it prints."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import replace

import building
import pytest
import torch
from click.testing import CliRunner
from fakes import Clock, quick_wins, turn

import fastattn
from fastattn.cli import main, shape_words, tables
from fastattn.cli import tune as tune_command
from fastattn.dispatch import tune_now
from fastattn.dispatch.render import IN_DOUBT
from fastattn.environment.device import Device
from fastattn.environment.settings import current_settings, reload_settings
from fastattn.kernels import registry
from fastattn.problems import bands, call_key, call_options, masks, presets, shapes
from fastattn.problems.classify import classify
from fastattn.problems.layouts import stride_class
from fastattn.problems.spelling import command_line
from fastattn.tuning import tune as tuning
from fastattn.tuning.tune import tune_problem
from fastattn.verdicts import verdict as verdict_module
from fastattn.verdicts.manifest import read_manifest

TINY = "1x2x16x8"


@pytest.fixture(autouse=True)
def steady(monkeypatch):
    """A machine that keeps its speed, whatever else runs on it: every verdict is stored."""
    monkeypatch.setattr(verdict_module, "DRIFT", math.inf)
    monkeypatch.setattr(verdict_module, "NOISY", math.inf)
    monkeypatch.setattr(tuning, "DRIFT", math.inf)


def qkv(**how):
    return building.qkv(**{"b": 2, "hq": 4, "sq": 37, "d": 16, **how})


def run(*words, code=0):
    result = CliRunner().invoke(main.main, [str(w) for w in words])
    assert result.exit_code == code, result.output
    return result.output


def asked(*words):
    """The problems that `fastattn tune WORDS` would tune."""
    with tune_command.tune.make_context("tune", shlex.split(" ".join(words))) as context:
        own = ("as_json", "force", "compile_kernels", "bucket")
        return list(shape_words.problems(**{k: v for k, v in context.params.items() if k not in own}))


def of_call(q, k, v, mask=None, layout="bhsd", **options):
    """What attention() asks for this very call."""
    key = call_key.call_key(q, k, v, mask, layout, call_options.parse_options(options))
    return classify(key, current_settings().accuracy)[0]


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
    assert asked("2x4x37x16", f"--mask {word}", *grad, *corner) == [of_call(*qkv(grad=wanted), mask, is_causal=causal)]


@pytest.mark.parametrize("corner", bands.CORNERS)
def test_causal_is_the_corner_named(corner):
    assert asked("2x4x5x33x16", "--causal", corner) == [of_call(*qkv(sq=5, skv=33), masks.Causal(corner))]


def test_causal_without_a_corner_is_torchs_triangle():
    assert asked("2x4x5x33x16 --causal") == [of_call(*qkv(sq=5, skv=33), is_causal=True)]


@pytest.mark.parametrize(
    ("word", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_a_dtype_has_a_short_name(word, dtype):
    assert asked("2x4x37x16 --dtype", word) == [of_call(*qkv(dtype=dtype))]


OPTIONS = {
    "2x4x37x16 --window 4,-1": (None, {"window": (4, None)}),
    "2x4x37x16 --window -1,3": (None, {"window": (-1, 3)}),
    "2x4x37x16 --causal --window 4,2": (None, {"window": (4, 0), "is_causal": True}),
    "2x4x5x37x16 --causal bottom_right --window 4,-1": (masks.Causal("bottom_right"), {"window": (4, 0)}),
    "2x4x1x37x16 --causal bottom_right --window 4,0": (masks.Causal("bottom_right"), {"window": (4, 0)}),
    "2x4x37x16 --softcap 30": (None, {"softcap": 30.0}),
    "2x4x37x16 --softcap 0.3 --causal top_left": (None, {"softcap": 0.3, "is_causal": True}),
    "2x4x37x16 --dropout": (None, {"dropout_p": 0.1}),
    "2x4x37x16 --lse": (None, {"return_lse": True}),
    "2x4x37x16 --accuracy dtype": (None, {"accuracy": "dtype"}),
    "2x4x37x16 --accuracy 1e-05": (None, {"accuracy": 1e-5}),
}


def of_options(words):
    mask, options = OPTIONS[words]
    length = words.split()[0].split("x")[2:-1]
    return of_call(*qkv(sq=int(length[0]), skv=int(length[-1])), mask, **options)


@pytest.mark.parametrize("words", OPTIONS)
def test_an_option_means_exactly_the_problem_that_the_call_asks(words):
    assert asked(words) == [of_options(words)]


@pytest.mark.parametrize("words", OPTIONS)
def test_the_command_line_of_an_option_gives_the_problem_back(words):
    problem = of_options(words)
    assert asked(command_line(problem)) == [problem]


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
        changed = asked("2x4x37x16")[0].switches
    finally:
        torch.set_float32_matmul_precision(precision)
    assert asked("2x4x37x16")[0].switches != changed


@pytest.mark.parametrize("name", presets.PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_preset_is_a_problem_whose_command_line_gives_it_back(name, dtype):
    for shape in presets.PRESETS[name]:
        problem = shapes.problem_of_shape(replace(shape, strides=None), dtype, grad=False)
        assert asked(command_line(problem)) == [problem]


@pytest.mark.parametrize("words", [
    "2x4/2x5x33x16/8", "3x4x37x16 --dtype bfloat16 --grad", "2x4x5x33x16 --causal bottom_right",
    "2x4x37x16 --mask bool:b11k", "2x4x37x16 --mask float32:1hqk --causal top_left",
])  # fmt: skip
def test_command_line_is_parsed_back_to_the_same_problem(words):
    problem = asked(words)[0]
    assert asked(command_line(problem)) == [problem]


@pytest.mark.parametrize("words", [
    "2x4x37x16 --strides transposed", "2x4x37x16 --strides packed,cache,contiguous",
    "2x4x37x16 --layout bshd", "2x4x37x16 --layout sbhd --strides transposed", "2x4x37x16 --grad --mask same:bhqk:grad",
])  # fmt: skip
def test_command_line_names_the_strides(words):
    problem = asked(words)[0]
    assert asked(command_line(problem)) == [problem]


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
    (["--causal", TINY], "'top_left', 'bottom_right'"),
    ([TINY, "--dtype", "int8"], "'float32'"),
    ([TINY, "--window", "4"], "--window '4' must be LEFT,RIGHT, as in 256,0; -1 is no limit"),
    ([TINY, "--window", "4,-2"], "window must be (left, right)"),
    ([TINY, "--softcap", "-1"], "softcap must be >= 0"),
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
    reload_settings()
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
    assert len(read_manifest(manifest, Device.of(torch.device("cpu")))) == 2
    assert json.loads(run("cache", "clear", "--json")) == {"deleted": 2}
    assert json.loads(run("cache", "show", "--json")) == []


def test_what_has_a_verdict_is_tuned_again_only_by_force():
    first = json.loads(run("tune", TINY, "--json"))[0]["created"]
    tunings = []
    real = tune_now.tune_problem

    def counted(problem, *args, **kwargs):
        tunings.append(problem)
        return real(problem, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune_now, "tune_problem", counted)
        assert json.loads(run("tune", TINY, "--json"))[0]["created"] == first
        assert tunings == []
        run("tune", TINY, "--json", "--force")
        assert len(tunings) == 1


def test_explain_measures_again_when_told():
    run("tune", "1x2x20x8")
    tuned = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune_now, "tune_and_keep", lambda problem, *_, **__: tuned.append(problem))
        run("explain", "1x2x20x8", "--tune")
    assert tuned == asked("1x2x20x8")


def test_a_crowded_verdict_is_tuned_again(monkeypatch):
    run("tune", "1x2x20x8")
    monkeypatch.setattr(verdict_module, "CROWDED", -1.0)
    tuned = []
    real = tune_now.tune_and_keep
    monkeypatch.setattr(
        tune_now, "tune_and_keep", lambda problem, *a, **k: tuned.append(problem) or real(problem, *a, **k)
    )
    assert IN_DOUBT in run("tune", "1x2x20x8")
    assert tuned == asked("1x2x20x8")


def test_explain_measures_only_when_told():
    before = json.loads(run("explain", TINY, "--json"))[0]
    assert before["why"] == "not tuned yet: the first call will"
    assert all(row["time_us"] is None for row in before["candidates"])
    after = json.loads(run("explain", TINY, "--tune", "--json"))[0]
    assert any(row["time_us"] for row in after["candidates"])
    assert {row["candidate"].split("+")[0] for row in after["candidates"]} == set(registry.names())


def test_version_is_the_package_version():
    assert run("--version").strip() == f"fastattn, version {fastattn.__version__}"


def test_the_geometric_mean_is_the_root_of_the_product():
    assert tables.geomean([2.0, 8.0]) == pytest.approx(4.0, rel=1e-12)


@pytest.mark.parametrize("cls", ["contiguous", "transposed", "seq_first", "cache", "cache_bshd", "packed",
                                 "interleaved", "expanded"])  # fmt: skip
def test_strides_of_a_class_are_of_that_class(cls):
    size = (2, 3, 5, 7)
    assert stride_class(size, shapes.strides_of_class(size, cls)) == cls


# --- where nothing can be done


@pytest.fixture
def homeless(monkeypatch):
    """No home directory, and no other word on where to cache."""
    monkeypatch.delenv("FASTATTN_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/")
    reload_settings()
    return "there is no home directory to cache in; set FASTATTN_CACHE_DIR"


@pytest.mark.parametrize("words", ["path", "show", "clear", "export {}/verdicts.json", "show --json", "clear --json"])
def test_a_cache_that_is_nowhere_is_an_error_that_says_why(words, homeless, tmp_path):
    assert run("cache", *words.format(tmp_path).split(), code=1) == f"Error: {homeless}\n"


@pytest.mark.parametrize("json_too", [(), ("--json",)])
def test_tuning_that_nothing_can_store_says_so_and_ends_well(json_too, homeless):
    output = run("tune", TINY, *json_too)
    assert output.splitlines()[-1] == f"no verdict was stored: {homeless}"


def test_tuning_into_a_directory_that_cannot_be_written_says_so_and_ends_well(own_store):
    own_store.write_text("a file in its place")
    assert f"no verdict was stored: cannot write {own_store}" in run("tune", TINY)


def test_what_a_machine_kept_from_being_stored_is_counted(monkeypatch):
    """The second of two problems is tuned while the machine changes its speed: it stays in memory."""
    real = tune_problem

    def drifting(problem, *args, **how):
        verdict = real(problem, *args, **how)
        trials = tuple(t._replace(drift=9.0) for t in verdict.trials) if problem.q_heads == 4 else verdict.trials
        return verdict._replace(trials=trials)

    monkeypatch.setattr(verdict_module, "DRIFT", 8.0)
    monkeypatch.setattr(tune_now, "tune_problem", drifting)
    assert "1 of 2 verdicts were not stored: the machine changed its speed" in run("tune", TINY, "1x4x16x8")
    assert "no verdict was stored: the machine changed" in run("tune", "1x4x16x8", "--force")


@pytest.mark.parametrize("command", ["tune 1x2x16x8", "explain 1x2x16x8", "cache export x.json"])
@pytest.mark.parametrize(("built", "why"), [
    (None, f"torch {torch.__version__} is built without CUDA"), ("13.0", "torch.cuda.is_available() is False"),
])  # fmt: skip
def test_a_device_that_is_not_here_is_one_line(command, built, why, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    assert run(*command.split(), "--device", "cuda", code=1) == f"Error: no CUDA device here ({why})\n"


@pytest.mark.parametrize(("words", "hint"), [("--json", "tune --json"), ("cache --json", "cache path --json")])
def test_an_option_before_its_command_is_told_where_it_goes(words, hint):
    assert f"--json goes behind the command: main {hint}" in run(*words.split(), code=2)


@pytest.mark.parametrize("words", ["--help", "cache --help"])
def test_no_help_line_is_cut(words):
    assert "..." not in run(*words.split()).replace("ARGS]...", "")


@pytest.mark.parametrize("command", ["tune", "explain"])
def test_help_explains_shapes(command):
    assert "8x16x196x64 is batch x heads x length x head_dim" in run(command, "--help")


def test_a_kv_cache_has_verdicts_of_its_own(monkeypatch):
    quick_wins(monkeypatch)
    words = ("1x4/2x1x40x32",)
    [verdict] = json.loads(run("tune", *words, "--kept", "--json"))
    assert verdict["problem"]["kept"] is True
    [problem] = asked(*words, "--kept")
    assert asked(command_line(problem)) == [problem]
    assert "kept" in run("cache", "show") and "in a KVCache" in run("explain", *words, "--kept")
    assert "in a KVCache" not in run("explain", *words)
    cache = fastattn.KVCache(capacity=64)
    cache.append(torch.zeros(1, 2, 40, 32), torch.zeros(1, 2, 40, 32))
    cache._is_kept = True  # as with a library that keeps keys in an order of its own
    found = cache.explain(torch.zeros(1, 4, 1, 32))
    assert found.served_by == "quick" and found.verdict is not None
    for wrong in ("--grad", "--dropout", "--compiled"):
        assert f"{wrong} does not go with --kept" in run("tune", *words, "--kept", wrong, code=2)


def test_compiled_code_has_verdicts_of_its_own(monkeypatch):
    """tune --compiled, and the regime in the listing and in an explanation."""
    from fastattn.dispatch import compiled_region

    turn(monkeypatch, Clock())
    monkeypatch.setattr(compiled_region, "compiled", lambda function: function)
    words = ("1x2x24x16", "--causal")
    [verdict] = json.loads(run("tune", *words, "--compiled", "--json"))
    assert verdict["problem"]["compiled"] is True
    assert "1 x 2 x 24 d16 causal compiled" in run("cache", "show")
    assert "top_left, compiled" in run("explain", *words, "--compiled")
    assert "compiled" not in run("explain", *words).split("device")[0]
    assert "nothing is tuned for such a call" in run("explain", "1x2x40x16", "--compiled")
    wrong = run("tune", *words, "--compiled", "--dropout", code=2)
    assert "--dropout does not go with --compiled" in wrong
