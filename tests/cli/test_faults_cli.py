"""Fault 82 of reference/faults2.md: terminals, pipes and log files that are not UTF-8."""

from __future__ import annotations

import json
import os
import sys

import children
import pytest
from click.testing import CliRunner
from fakes import Clock, add, honest, made_up, turn

from fastattn.cli import encoding, main
from fastattn.environment.settings import reload_settings

SHAPE = ("1x2x8x16x8", "--causal", "bottom_right")
ENCODINGS = ("ascii", "cp1252", "latin-1", "shift_jis", "utf-8")
SURROGATE = os.fsdecode(b"st\xff")  # bytes that are no text, as Python reads a file name
COMMANDS = {
    "tune": ("tune", *SHAPE),
    "tune again": ("tune", "--force", *SHAPE),
    "explain": ("explain", *SHAPE),
    "cache show": ("cache", "show"),
    "cache path": ("cache", "path"),
    "cache export": ("cache", "export", "all ü→.json"),
    "doctor": ("doctor",),
    "cache clear": ("cache", "clear"),
}


@pytest.fixture
def odd(monkeypatch, tmp_path):
    """A cache directory, a kernel and what that kernel raises with characters that hardly an encoding has."""
    directory = tmp_path / f"jürgen→{SURROGATE}"
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(directory))
    monkeypatch.chdir(tmp_path)
    reload_settings()

    def broken(*given):
        raise RuntimeError("libü.so: ✗ 不可")

    add(monkeypatch, made_up("schnëll→", honest), made_up("kaputt", broken))
    turn(monkeypatch, Clock())
    return directory


def run(charset, *words, env=None):
    """(exit code, stdout as that terminal reads it: a byte that it cannot read is an error)."""
    result = CliRunner(charset=charset, env=env).invoke(main.main, words)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.stdout_bytes.decode(charset)


@pytest.mark.parametrize("charset", ENCODINGS)
def test_fault_82_every_command_ends_well_whatever_the_terminal_can_show(charset, odd):
    """A terminal, pipe or log file that lacks a character gets another one in its place, and `--json` is always ASCII."""
    for name, words in COMMANDS.items():
        code, shown = run(charset, *words)
        assert (code, bool(shown)) == (0, True), name
        code, shown = run(charset, *words, "--json")
        assert code == 0 and shown.isascii() and json.loads(shown) is not None, name


@pytest.mark.parametrize(("charset", "arrow"), [("ascii", "causal\\"), ("cp1252", "causal\\"), ("utf-8", "causal↘")])
def test_fault_82_a_mark_of_ours_has_a_plain_sign(charset, arrow, odd):
    assert arrow in run(charset, "tune", *SHAPE)[1]
    assert arrow in run(charset, "cache", "show")[1]


def test_fault_82_what_cannot_be_shown_can_still_be_told_apart(odd):
    name = os.path.basename(odd)
    assert name == "jürgen→st\udcff"
    assert "jürgen→st\\udcff" in run("utf-8", "cache", "path")[1]
    assert "jürgen\\u2192st\\udcff" in run("latin-1", "cache", "path")[1]
    assert "j\\xfcrgen\\u2192st\\udcff" in run("ascii", "cache", "path")[1]


def test_fault_82_a_narrow_terminal_cuts_names_without_an_ellipsis_that_it_lacks(odd):
    env = {"TTY_COMPATIBLE": "1", "COLUMNS": "40", "NO_COLOR": "1"}
    assert run("ascii", "tune", *SHAPE, env=env)[0] == 0
    assert "…" in run("utf-8", "cache", "show", env=env)[1]
    assert "…" not in run("ascii", "cache", "show", env=env)[1]


@pytest.mark.parametrize(
    "words", [("tune", "8×16"), ("cache", "exportü"), ("explain", "--preset", "größe"), ("--hälp",)]
)
@pytest.mark.parametrize("charset", ["ascii", "cp1252"])
def test_fault_82_a_wrong_word_is_told_and_not_a_crash(charset, words, odd):
    assert run(charset, *words)[0] == 2


def test_fault_82_the_callers_streams_are_left_as_they_were(odd, capsys):
    before = [(s, getattr(s, "errors", None)) for s in (sys.stdout, sys.stderr)]
    main.main(["cache", "path"], standalone_mode=False)
    assert [(s, getattr(s, "errors", None)) for s in (sys.stdout, sys.stderr)] == before
    assert encoding.HANDLER not in [errors for _, errors in before]


@pytest.mark.parametrize("environment", [
    {"PYTHONIOENCODING": "ascii"},
    pytest.param({"PYTHONIOENCODING": "cp1252:strict"}, marks=pytest.mark.long),
    pytest.param({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, marks=pytest.mark.long),
])  # fmt: skip
def test_fault_82_in_a_process_of_its_own_whose_output_is_piped(environment, tmp_path):
    as_program = "import runpy; runpy.run_module('fastattn.cli', run_name='__main__')"
    told = {"FASTATTN_CACHE_DIR": str(tmp_path / "jürgen→"), **environment}
    done = children.run(as_program, "cache", "path", env=told)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() or environment.get("PYTHONIOENCODING", "").startswith("cp1252")
