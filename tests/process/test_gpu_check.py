"""benchmarks/gpu_check.py where little is well: a kernel that hangs, one that ends the process, the source alone."""

from __future__ import annotations

import argparse
import queue
import sys
from pathlib import Path

import children
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_check  # noqa: E402
import gpu_rehearsal  # noqa: E402
from rich.console import Console  # noqa: E402

from fastattn.environment.cache_files import default_cache_directory  # noqa: E402

CHILD = """
import argparse, json, os, sys, time
parser = argparse.ArgumentParser()
parser.add_argument("job")
parser.add_argument("--names", nargs="*", default=[])
parser.add_argument("--skip", action="append", default=[])
args, _ = parser.parse_known_args()
def say(**answer):
    print("noise of a library")
    print("answer:" + json.dumps(answer), flush=True)
for name in args.names:
    say(began=name)
    for part in ("verify", "special"):
        found = {"what": "a problem", "candidate": name, "forward": 0.5}
        say(part=part, kernel=name, found=found)
        if name.startswith("crashes"):
            print("Segmentation fault somewhere", file=sys.stderr)
            os._exit(139)
        if name == "hangs":
            time.sleep(600)
        if name == "raises":
            say(part=part, kernel=name, found={**found, "forward": None, "error": "RuntimeError: no image"})
"""


class Steps(gpu_rehearsal.Clock):
    """Time that a test moves: a child that says nothing for a moment is one that hangs."""

    def __init__(self):
        self.seconds, self.told = 0.0, []

    def now(self):
        return self.seconds

    def wait(self, lines, seconds):
        if seconds <= 0:
            raise queue.Empty
        try:
            return lines.get(timeout=5.0)
        except queue.Empty:
            self.seconds += seconds
            raise

    def tell(self, what, share, end):
        self.told.append(what)
        self.seconds += 1.0
        return True


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(seconds) of a check whose children are the script above."""
    child = tmp_path / "child.py"
    child.write_text(CHILD, encoding="utf-8")
    monkeypatch.setattr(gpu_check.gpu_child, "__file__", str(child))

    def made(seconds=400.0, parts=("verify", "special")):
        args = argparse.Namespace(device="cuda", only=None, smoke=False, compile=False, rehearse=False, seconds=seconds,
                                  parts=list(parts), results=str(tmp_path / "results"))  # fmt: skip
        return gpu_check.Run(args, Console(quiet=True), Steps(), {"machine": "made up"}, str(tmp_path))

    return made


def rows_of(names):
    return [gpu_check.Row(name, "lib") for name in names]


def test_a_crash_and_a_hang_cost_their_rows_alone(run):
    check, rows = run(), rows_of(["first", "crashes", "hangs", "raises", "last"])
    gpu_check.run_group(check, ["verify", "special"], "lib", rows, 400.0)
    said = {row.name: (row.why, len(row.found["verify"]), len(row.found["special"])) for row in rows}
    assert said["first"] == said["last"] == (None, 1, 1)
    assert said["crashes"] == ("exit 139: Segmentation fault somewhere", 1, 0)
    assert said["hangs"] == (f"no answer within {gpu_check.KERNEL_S:.0f} s", 1, 0)
    assert said["raises"] == (None, 2, 2)
    assert gpu_check.how_many_wrong(rows, ["verify", "special"]) == 4  # a crash, a hang, and an exception in each part
    gpu_check.save_kernels(check, ["verify", "special"], rows)
    text = (Path(check.args.results) / "gpu_verify.md").read_text(encoding="utf-8")
    assert "Segmentation fault somewhere" in text and "RuntimeError: no image" in text and "| last | 1 |" in text


def test_what_there_is_no_time_for_is_said(run):
    check, rows = run(), rows_of([f"k{i}" for i in range(9)])
    gpu_check.run_group(check, ["verify", "special"], "lib", rows, 8.0)
    told = [row.why for row in rows]
    assert None in told and gpu_check.OUT_OF_TIME in told and told[-1] == gpu_check.NOT_REACHED
    assert gpu_check.how_many_wrong(rows, ["verify", "special"]) == 0, "that is nobody's fault"


def test_a_told_clock_ends_where_the_time_does(run):
    """What would be over later is killed before it answers: no plan takes more than it has."""
    check, rows = run(), rows_of(["first", "second"])
    check.clock = gpu_rehearsal.ToldClock()
    costs = gpu_rehearsal.COSTS_S["start"], gpu_rehearsal.COSTS_S["verify"]
    ends = costs[0] + 1.5 * costs[1]
    gpu_check.run_group(check, ["verify", "special"], "lib", rows, ends)
    assert check.clock.now() == ends
    assert [len(row.found["verify"]) + len(row.found["special"]) for row in rows] == [1, 0]
    assert [row.why for row in rows] == [gpu_check.OUT_OF_TIME, gpu_check.NOT_REACHED]


def test_all_is_right_only_where_all_was_looked_at():
    unfinished = rows_of(["slow"])
    assert gpu_check.verdict(0, []) == ("[green]all right[/green]",)
    assert "all right" not in " ".join(gpu_check.verdict(0, unfinished))
    assert gpu_check.verdict(2, unfinished) == ("[red]2 wrong[/red]", "[red]not finished: slow[/red]")


def test_a_library_that_ends_every_process_is_left_after_a_few(run):
    check, rows = run(), rows_of(["crashes", *(f"crashes-{i}" for i in range(6))])
    gpu_check.run_group(check, ["verify"], "lib", rows, 400.0)
    assert check.clock.told.count("start") == gpu_check.RESTARTS + 1
    assert [row.why.split(":")[0] for row in rows] == ["exit 139"] * 4 + ["not reached"] * 3
    assert rows[-1].why == gpu_check.ENDED_OFTEN


def test_the_cache_lies_where_linux_has_it_without_platformdirs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_directory() == tmp_path / "fastattn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_directory() == tmp_path / ".cache" / "fastattn"


def test_it_starts_where_there_is_the_source_alone(tmp_path):
    """No platformdirs, no package installed, src on nobody's path, and a home that cannot be written."""
    hook = tmp_path / "sitecustomize.py"
    hook.write_text(
        "import os, sys\n"
        "told = os.environ['PYTHONPATH'].split(os.pathsep)\n"
        "sys.path[:] = [p for p in sys.path if p in told or not os.path.isdir(p + '/fastattn')]  # no editable installation\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "class No:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('platformdirs', 'hatchling', 'pytest', 'hypothesis'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, No())\n",
        encoding="utf-8",
    )
    words = ("verify", "--device", "cpu", "--smoke", "--only", "torch_math", "--results", "out")
    told = {"FASTATTN_CACHE_DIR": None, "PYTHONPATH": str(tmp_path), "HOME": str(tmp_path / "nowhere")}
    done = children.run(ROOT / "benchmarks" / "gpu_check.py", *words, env=told, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "torch_math" in (tmp_path / "out" / "gpu_verify.md").read_text(encoding="utf-8")


def test_what_compiles_waits_for_all_that_does_not(run, monkeypatch):
    """One of its library among others must not take the time of the next library."""
    rows = [gpu_check.Row(name, name[0], compiles="slow" in name) for name in ("a1", "a_slow", "b1", "c_slow")]
    monkeypatch.setattr(gpu_check, "usable", lambda _: rows)
    monkeypatch.setattr(gpu_check, "save_kernels", lambda *_: None)
    asked, check = [], run()
    monkeypatch.setattr(
        gpu_check, "run_group", lambda run, parts, library, group, ends: asked.append([r.name for r in group])
    )
    gpu_check.run_kernels(check, ["verify"])
    assert asked == [["a1"], ["b1"], ["a_slow"], ["c_slow"]]
