"""What is printed: explanations and tables of verdicts, wide where they are piped and narrow where a terminal is."""

from __future__ import annotations

import io

import fakes
import pytest
from click.testing import CliRunner
from rich.console import Console

import fastattn
from fastattn.cli import main, tables
from fastattn.dispatch.explain import Explanation
from fastattn.dispatch.render import IN_DOUBT, why_served
from fastattn.environment.settings import reload_settings
from fastattn.problems import presets
from fastattn.problems.shapes import problem_of_shape, shape
from fastattn.problems.spelling import briefly
from fastattn.verdicts import verdict as verdict_module
from fastattn.verdicts.verdict import Outcome, Trial, Verdict

SHAPE = shape(2, (32, 8), 100, 64, causal=True)
LONG = "matmul_mixed+gqa_fold+mask_dense+chunks"


def verdict(winner="matmul_mixed", gain=1.29, *, noise=0.01, cores_missing=0.0, shape=SHAPE):
    """A problem of which matmul_mixed was measured `gain` x as fast as the default."""
    import torch

    trials = (
        Trial("default", Outcome.TIMED, None, 4580.4, noise, 0.0, 0.28, None, 49152),
        Trial(LONG, Outcome.TIMED, None, 4580.4 / gain, noise, 0.0, 0.23, 0.41, 18 * 2**20, 2**20),
        Trial(
            "flex", Outcome.NOT_COMPILED, "not tried: it must be compiled first, which `fastattn tune --compile` does"
        ),
        Trial("torch_math", Outcome.DEMOTED, "RuntimeError: it broke", time_us=1.0),
    )
    winner = LONG if winner == "matmul_mixed" else winner
    return Verdict(problem_of_shape(shape, torch.bfloat16), winner, trials, cores_missing=cores_missing)


def explained(v):
    return Explanation(v.problem, "a CPU", "serve", v.winner, why_served(v, v.winner), v.trials, v)


def test_an_explanation_looks_like_this():
    assert (
        str(explained(verdict()))
        == f"""\
problem  2 x 32/8 heads x 100 on 100 x d64, bfloat16, causal top_left, transposed
device   a CPU
served by {LONG}: 1.29x the default's speed

  default                                  4.58 ms  1.00x  error 0.28 of budget, 48 KiB temporary
* {LONG}  3.55 ms  1.29x  error 0.23 / 0.41 of budget, 18 MiB temporary, keeps 1 MiB
  flex                                     not tried: it must be compiled first, which `fastattn tune --compile` does
  torch_math                               demoted: it raised RuntimeError: it broke"""
    )


@pytest.mark.parametrize(("gain", "noise", "why"), [
    (1.29, 0.2, f"{LONG} measured 1.29x, within the noise of 40%"),
    (1.29, 0.01, f"{LONG} measured 1.29x, in too few rounds to be sure"),
    (1.02, 0.2, f"{LONG} measured 1.02x, within the margin of 3%"),
    (0.5, 0.0, f"the fastest; {LONG} came nearest with 0.50x"),
])  # fmt: skip
def test_a_default_that_was_not_replaced_says_by_what_it_was_not(gain, noise, why):
    assert explained(verdict("default", gain, noise=noise)).why == why


def test_a_crowded_verdict_is_marked_wherever_it_is_shown(monkeypatch):
    monkeypatch.setattr(verdict_module, "CROWDED", 0.25)
    crowded = verdict(cores_missing=0.6)
    assert "1.29x?" in str(explained(crowded)) and str(explained(crowded)).endswith(IN_DOUBT)
    both = table([("", crowded), ("", verdict("default"))], 200)
    assert "1.29x? " in both and "1.00x  " in both and both.rstrip().endswith(IN_DOUBT)
    for quiet in (str(explained(verdict())), table([("", verdict())], 200)):
        assert "?" not in quiet


def table(found, width):
    out = Console(width=width, file=io.StringIO(), record=True)
    tables.print_tuned(found, out)
    return out.export_text()


FOUND = [(name, verdict(gain=1.5, shape=shape)) for name, found in presets.PRESETS.items() for shape in found]


@pytest.mark.parametrize("width", [50, 80, 100, 120])
def test_in_a_terminal_a_verdict_is_one_line_that_fits(width):
    lines = table(FOUND, width).splitlines()
    assert max(map(len, lines)) <= width
    assert len([line for line in lines if "1.50x" in line]) == len(FOUND) + 2  # and the means
    assert all(sum(line.strip().startswith(name) for line in lines) >= 1 for name in ("vit-b16", "whisper-small-cross"))


@pytest.mark.parametrize(("width", "columns"), [
    (80, ["speed"]), (115, ["speed", "default"]), (125, ["speed", "default", "winner"]),
    (140, ["speed", "default", "winner", "error"]),
])  # fmt: skip
def test_a_narrow_terminal_drops_columns(width, columns):
    names = ("speed", "default", "winner", "error")
    assert [name for name in names if name in table(FOUND, width).splitlines()[0]] == columns


def test_what_is_piped_is_never_cut(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = table(FOUND, tables.console().width).splitlines()
    assert not any("…" in line for line in lines)
    assert all(any(f"{name}  {briefly(v.problem)}" in line and LONG in line for line in lines) for name, v in FOUND)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_terminal_folds_an_explanation_below_where_its_text_begins(width):
    e = explained(verdict())
    lines = [line for _, line in e.lines(width)]
    assert max(map(len, lines)) <= max(width, len(LONG) + 10)
    assert " ".join(" ".join(lines).split()) == " ".join(str(e).split())
    assert [kind for kind, _ in e.lines()] == ["head"] * 4 + ["timed", "served", "out", "out"]


def test_explain_prints_the_same_here_and_there(monkeypatch):
    """`fastattn explain` and print(fastattn.explain(...)): one wording."""
    import torch

    fakes.turn(monkeypatch, fakes.Clock({"default": 4e-3, "matmul": 1e-3}))
    q = torch.randn(1, 2, 16, 8)
    here = str(fastattn.explain(q, q, q, tune=True))
    fastattn.clear()
    reload_settings()
    assert CliRunner().invoke(main.main, ["explain", "1x2x16x8"]).output.rstrip("\n") == here


@pytest.mark.parametrize(("options", "words"), [
    ({"window": (4, -1)}, "window 4,-1"), ({"softcap": 30.0}, "softcap 30"), ({"dropout": True}, "dropout"),
    ({"lse": True}, "lse"),
])  # fmt: skip
def test_a_problem_in_short_names_its_options(options, words):
    assert briefly(verdict().problem.replace(**options)) == f"2 x 32/8 x 100 d64 causal {words}"
