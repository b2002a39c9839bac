"""A child that the fork server forks is as one that a new Python runs: tests/support/children.py."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import children
import pytest

both = pytest.mark.parametrize("fresh", [False, True], ids=["forked", "fresh"])


@both
@pytest.mark.parametrize(("code", "ended"), [
    ("", 0), ("raise SystemExit(3)", 3), ("import sys; sys.exit('no')", 1), ("1 / 0", 1), ("import os; os._exit(139)", 139),
    ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9),
])  # fmt: skip
def test_how_it_ended(code, ended, fresh):
    assert children.run(code, fresh=fresh).returncode == ended


@both
def test_what_it_is_told(fresh, tmp_path, monkeypatch):
    monkeypatch.setenv("KEPT", "ü")
    monkeypatch.setenv("TAKEN", "away")
    code = "import json, os, sys; print(json.dumps([sys.argv, dict(os.environ), os.getcwd(), __name__, sys.path[:2]]))"
    told = {"GIVEN": "1", "TAKEN": None, "PYTHONPATH": str(tmp_path)}
    done = children.run(code, "one", "two", env=told, cwd=tmp_path, fresh=fresh)
    argv, environ, cwd, name, path = json.loads(done.stdout)
    assert argv == ["-c", "one", "two"] and cwd == str(tmp_path) and name == "__main__" and path == ["", str(tmp_path)]
    environ.pop("LC_CTYPE", None)  # a new Python may set it
    assert environ == {**{n: v for n, v in os.environ.items() if n not in ("TAKEN", "LC_CTYPE")}, "GIVEN": "1",
        "PYTHONPATH": str(tmp_path)}  # fmt: skip


@both
def test_what_it_writes(fresh):
    code = """
import atexit, sys, threading
atexit.register(print, "at exit")
threading.Timer(0.1, print, ["of a thread"]).start()
print("out" * 100_000)
print("err", file=sys.stderr)
assert not sys.stdin.read()
1 / 0
"""
    done = children.run(code, fresh=fresh)
    assert done.stdout == "out" * 100_000 + "\nof a thread\nat exit\n"
    assert done.stderr.startswith("err\nTraceback") and done.stderr.endswith("ZeroDivisionError: division by zero\n")


@both
def test_one_that_hangs_is_killed(fresh):
    child = children.start("import time; print('here', flush=True); time.sleep(60)", fresh=fresh)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.5)
    assert child.returncode == -9 and child.wait().stdout == "here\n"


@both
def test_several_run_at_once(fresh, tmp_path):
    """Each waits for a file that the other one writes."""
    code = "import pathlib, sys, time\npathlib.Path(sys.argv[1]).touch()\n" \
           "while not pathlib.Path(sys.argv[2]).exists(): time.sleep(0.01)"  # fmt: skip
    names = [str(tmp_path / name) for name in "ab"]
    both = [children.start(code, *order, fresh=fresh) for order in (names, names[::-1])]
    assert [child.wait(60).returncode for child in both] == [0, 0]


@both
def test_a_sitecustomize_on_its_path_is_obeyed(fresh, tmp_path):
    """As pytest --nothing-wins has it; one that this process has counts no more where the path is another."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.told = 1")
    code = "import sys; print(getattr(sys, 'told', None), any('OnImport' in repr(f) for f in sys.meta_path))"
    assert children.run(code, env={"PYTHONPATH": str(tmp_path)}, fresh=fresh).stdout == "1 False\n"


@pytest.mark.skipif(not children.CAN_FORK, reason="no child is forked here")
def test_a_forked_one_computes():
    """With threads, gradients and random numbers of its own; what it was forked from has no thread but one, and no fastattn."""
    code = (
        "import os, random, sys, threading; was = set(sys.modules); alone = threading.active_count() == 1\n"
        "tasks = len(os.listdir('/proc/self/task')); import torch; torch.set_num_threads(2)\n"
        "x = torch.randn(300, 300, requires_grad=True); (x @ x).sum().backward()\n"
        "print(alone, tasks, 'fastattn' in was, 'torch' in was, float(x.grad.sum()), torch.initial_seed(), random.random())"
    )
    said = [children.run(code) for _ in range(2)]
    assert [child.returncode for child in said] == [0, 0], said[0].stderr
    one, other = (child.stdout.split() for child in said)
    assert one[:4] == other[:4] == ["True", "1", "False", "True"]
    assert all(a != b for a, b in zip(one[4:], other[4:], strict=True))


@pytest.mark.parametrize("how", [{"env": {"OMP_NUM_THREADS": "1"}}, {"flags": ("-O",)}, {"fresh": True}], ids=str)
def test_what_is_read_at_the_start_is_told_to_a_new_python(how):
    assert children.run("import sys; print('torch' in sys.modules)", **how).stdout == "False\n"


def test_a_path_is_a_program(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("import sys; print(sys.argv[1:], sys.path[0])")
    assert children.run(program, "a").stdout == f"['a'] {tmp_path}\n"


def test_no_test_imports_another():
    """What they share stands in tests/support."""
    tests = Path(__file__).parents[1]
    found = [str(p) for p in tests.rglob("*.py") if re.search(r"^(from|import) test_", p.read_text(), re.M)]
    assert found == []


def test_tests_start_processes_in_no_other_way():
    tests = Path(__file__).parents[1]
    found = {
        str(p.relative_to(tests)) for p in tests.rglob("*.py") if re.search(r"^import subprocess", p.read_text(), re.M)
    }
    assert found == {"support/children.py", "support/signatures/fetch.py", "process/test_children.py"}
