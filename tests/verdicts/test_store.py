"""The store in the wild. Tests are named after the faults of reference/faults.md that they survive."""

from __future__ import annotations

import ast
import errno
import json
import os
import stat
import time
import tracemalloc
from dataclasses import fields, replace
from pathlib import Path

import children
import pytest
import torch
from fakes import FAST, Clock, turn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stored import DEVICE, PROBLEM, raises, verdict

import fastattn
from fastattn.dispatch import tune_now
from fastattn.dispatch.session import session
from fastattn.environment import cache_files
from fastattn.environment.device import Device
from fastattn.environment.settings import current_settings, reload_settings
from fastattn.problems.problem import Problem
from fastattn.verdicts import store
from fastattn.verdicts.manifest import export_manifest, read_manifest
from fastattn.verdicts.store import Store, store_of
from fastattn.verdicts.verdict import SCHEMA

SCHEMA_IS = b'"schema": %d' % SCHEMA

SOURCE = Path(fastattn.__file__).parent


@pytest.fixture
def kept(tmp_path):
    """A Store with one verdict: (the Store, the file)."""
    mine = Store([tmp_path / "own"])
    return mine, mine.put(verdict(), DEVICE)


def test_a_verdict_comes_back_whole(kept):
    mine, path = kept
    assert mine.get(PROBLEM, DEVICE) == verdict()
    assert [(p, v) for p, v in mine.verdicts()] == [(path, verdict())]
    data = json.loads(path.read_text())
    assert data["problem"]["head_dim"] == 64 and data["environment"]["torch"] == "2.13.0"
    assert data["trials"][2]["reason"] == "needs cuda, this device is cpu"


def test_a_later_verdict_replaces_the_file(kept):
    mine, path = kept
    assert mine.put(verdict(winner="sdpa_math"), DEVICE) == path
    assert mine.get(PROBLEM, DEVICE).winner == "sdpa_math"
    assert os.listdir(path.parent) == [path.name]


def test_clear_deletes_our_files_and_nothing_else(kept):
    mine, path = kept
    note = path.parent / "notes.txt"
    note.write_text("mine")
    assert mine.clear() == 1
    assert not path.exists() and note.exists()


# --- fault 37: concurrent and killed writers

WRITER = """
import os, sys
from pathlib import Path
from fastattn.problems.problem import Problem
from fastattn.environment.device import Device
from fastattn.verdicts.store import Store
from fastattn.verdicts.verdict import Trial, Verdict
root, first, count, device = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Device("cpu", "test silicon")
mine = Store([root])
def put(i, winner):
    problem = Problem("cpu", "float32", 64, 64, 8, 8, 2, 128, i)
    mine.put(Verdict(problem, winner, (Trial(winner, time_us=1.0, reason="x" * 5000),)), device)
i = 0
print("ready", flush=True)
while count < 0 or i < count:
    put(first + i if count > 0 else i % 20, f"matmul{first}")
    put(10_000 + i % 5, f"matmul{first}")  # the same file from every writer
    i += 1
    if count < 0:
        print(i, flush=True)
"""


def writer(root, first, count):
    return children.start(WRITER, str(root), str(first), str(count))


def test_fault_37_concurrent_writers_lose_nothing(tmp_path):
    """Processes that write at once lose nothing, and no reader meets half a file."""
    writers = [writer(tmp_path / "s", 100 * n, 50) for n in range(2)]
    assert [w.wait().returncode for w in writers] == [0, 0], [w.stderr for w in writers]
    found = [v for _, v in Store([tmp_path / "s"]).verdicts()]
    assert {v.problem.kv_len for v in found} == {*range(50), *range(100, 150), *range(10_000, 10_005)}
    files = list((tmp_path / "s").rglob("*"))
    assert not [f for f in files if f.suffix == ".tmp"]


def test_fault_37_a_killed_writer_leaves_nothing_half_written(tmp_path):
    """Killed at moments of its own; every file present is whole, what it left behind is no verdict."""
    for attempt in range(2):
        process = writer(tmp_path / "s", attempt, -1)
        while process.stdout.count("\n") <= 8:
            assert process.returncode is None, process.stderr
            time.sleep(0.001)
        time.sleep(0.003 * attempt)
        process.kill()
        files = list((tmp_path / "s").rglob("*.json"))
        assert files
        assert len([v for _, v in Store([tmp_path / "s"]).verdicts()]) == len(files)


@pytest.mark.parametrize("call", ["os.fsync", "os.replace", "os.fdopen", "tempfile.mkstemp"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.ESTALE, errno.EDQUOT])
def test_fault_37_a_failing_system_call_keeps_the_old_file(kept, monkeypatch, caplog, call, error):
    mine, path = kept
    before = path.read_bytes()
    module, name = call.split(".")
    with monkeypatch.context() as patch:
        patch.setattr(getattr(cache_files, module), name, raises(error))
        assert mine.put(verdict(winner="sdpa_math"), DEVICE) is None
        assert mine.put(verdict(winner="sdpa_math"), DEVICE) is None
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name], "a temporary file was left"
    assert len([r for r in caplog.records if r.levelname == "WARNING"]) == 1
    assert os.strerror(error) in caplog.text


# --- fault 38: hostile files

HOSTILE = {
    "empty": b"",
    "truncated": lambda text: text[: len(text) // 2],
    "one byte short": lambda text: text[:-1].rstrip(b"}\n"),
    "a list": b"[]",
    "null": b"null",
    "a number": b"3",
    "a string": b'"winner"',
    "another schema": lambda text: text.replace(SCHEMA_IS, b'"schema": 2'),
    "schema as text": lambda text: text.replace(SCHEMA_IS, b'"schema": "%d"' % SCHEMA),
    "no trials": lambda text: changed(text, trials=[]),
    "trials of another type": lambda text: changed(text, trials={"default": 1}),
    "trial not an object": lambda text: changed(text, trials=["default"]),
    "unknown trial field": lambda text: changed(text, trials=[{"candidate": "matmul", "run": "os.system"}]),
    "trial without a name": lambda text: changed(text, trials=[{"time_us": 1.0}]),
    "winner of another type": lambda text: changed(text, winner=["matmul"]),
    "winner not tried": lambda text: changed(text, winner="torch_flash"),
    "no winner": lambda text: changed(text, winner=None),
    "problem of another type": lambda text: changed(text, problem=[]),
    "text for a number": lambda text: text.replace(b'"time_us": 3.0', b'"time_us": "3.0"'),
    "negative time": lambda text: text.replace(b'"time_us": 3.0', b'"time_us": -3.0'),
    "NaN": lambda text: text.replace(b'"time_us": 3.0', b'"time_us": NaN'),
    "Infinity": lambda text: text.replace(b'"time_us": 3.0', b'"time_us": Infinity'),
    "400 digits": lambda text: text.replace(b'"time_us": 3.0', b'"time_us": 1' + b"0" * 400),
    "1e999": lambda text: text.replace(b'"time_us": 3.0', b'"time_us": 1e999'),
    "huge integer": lambda text: text.replace(b'"time_us": 3.0', b'"time_us": ' + b"9" * 5000),
    "true for a number": lambda text: text.replace(b'"time_us": 3.0', b'"time_us": true'),
    "float for a length": lambda text: text.replace(b'"q_len": 128', b'"q_len": 128.5'),
    "true for a length": lambda text: text.replace(b'"batch": 2', b'"batch": true'),
    "negative length": lambda text: text.replace(b'"q_len": 128', b'"q_len": -128'),
    "unknown problem field": lambda text: text.replace(b'"q_len": 128', b'"q_len": 128, "more": 1'),
    "deep nesting": b"[" * 30_000,
    "deep objects": b'{"a":' * 10_000,
    "duplicate winner": lambda text: text.replace(
        b'"winner": "matmul"', b'"winner": "matmul", "winner": "torch_flash"'
    ),
    "byte order mark": lambda text: b"\xef\xbb\xbf" + text,
    "UTF-16": lambda text: text.decode().encode("utf-16"),
    "not UTF-8": lambda text: text.replace(b"matmul", b"matm\xffl"),
    "NUL in front": lambda text: b"\x00" + text,
    "NUL inside": lambda text: text.replace(b'"winner"', b'"win\x00ner"'),
    "too large": lambda text: text + b" " * cache_files.MAX_FILE,
    "two documents": lambda text: text + text,
}


def changed(text, **values):
    return json.dumps({**json.loads(text), **values}).encode()


@pytest.mark.parametrize("kind", HOSTILE)
def test_fault_38_a_hostile_file_is_a_miss(kept, kind):
    """A file that is cut, empty, huge, nested or of another kind is a miss and never an error."""
    mine, path = kept
    made = HOSTILE[kind]
    before = path.read_bytes()
    path.write_bytes(made if isinstance(made, bytes) else made(before))
    assert path.read_bytes() != before, "the test changed nothing"
    assert mine.get(PROBLEM, DEVICE) is None
    assert list(mine.verdicts()) == []
    assert mine.put(verdict(), DEVICE) == path and mine.get(PROBLEM, DEVICE) == verdict(), "a miss heals itself"


def test_fault_38_a_sparse_file_of_1_gib_is_not_read(kept):
    mine, path = kept
    os.truncate(path, 2**30)
    tracemalloc.start()
    try:
        assert mine.get(PROBLEM, DEVICE) is None
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20  # whoever reads it holds a GiB


INSERTS = [b"{", b"]", b'"', b"-", b"1e999", b"NaN", b"null", b"\x00", b"0", b"9" * 400]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fault_38_no_change_of_bytes_raises_or_names_another_problem(kept, data):
    mine, path = kept
    text = bytearray(json.dumps({**verdict().to_json(), "environment": {}}).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text) - 1))
        how = data.draw(st.sampled_from(["set", "cut", "insert", "repeat"]))
        if how == "set":
            text[at] = data.draw(st.integers(0, 255))
        elif how == "cut":
            del text[at : at + data.draw(st.integers(1, 40))]
        elif how == "insert":
            text[at:at] = data.draw(st.sampled_from(INSERTS))
        else:
            text[at:at] = text[at : at + 60]
        if not text:
            break
    path.write_bytes(bytes(text))
    found = mine.get(PROBLEM, DEVICE)
    if found is not None:
        assert found.problem == PROBLEM
        assert found.trial(found.winner) is not None
        assert all(t.time_us is None or 0 <= t.time_us < float("inf") for t in found.trials)
        found.ranked(), found.speedup(), found.to_json()


@pytest.mark.parametrize(
    "winner", ["os.system", "../../etc/passwd", "__import__", "matmul+unknown", "torch_cudnn", "", "+"]
)
def test_fault_38_an_unknown_winner_is_never_looked_up_outside_the_kernels(winner, monkeypatch):
    """The file may say what it likes: only kernels that can do the problem serve."""
    x = torch.randn(1, 2, 24, 16)
    monkeypatch.setattr(tune_now, "tune_and_keep", lambda *_, **__: pytest.fail("tuned"))
    with fastattn.options(mode="cached"):
        problem = fastattn.explain(x, x, x).problem
        session.store(current_settings()).put(verdict(problem, winner), Device.of(x.device))
        fastattn.clear()
        out = fastattn.attention(x, x, x)
        assert torch.allclose(out, torch.nn.functional.scaled_dot_product_attention(x, x, x), atol=1e-5)
        assert fastattn.explain(x, x, x).served_by in ("default", "sdpa_math")


# --- fault 40: nowhere to write


@pytest.mark.parametrize("home", [None, "/", ""])
def test_fault_40_without_a_home_verdicts_stay_in_memory(home, monkeypatch, caplog):
    """Without a home directory that can be used, verdicts stay in memory."""
    import pwd

    monkeypatch.delenv("FASTATTN_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME") if home is None else monkeypatch.setenv("HOME", home)
    if home is None:  # a uid without a passwd entry
        monkeypatch.setattr(pwd, "getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    reload_settings()
    mine = store_of(current_settings())
    assert mine.root is None
    assert mine.put(verdict(), DEVICE) is None and mine.get(PROBLEM, DEVICE) is None
    assert list(mine.verdicts()) == [] and mine.clear() == 0
    assert "there is no home directory to cache in; set FASTATTN_CACHE_DIR" in caplog.text
    x = torch.randn(1, 2, 24, 16)
    fastattn.attention(x, x, x)
    assert fastattn.explain(x, x, x).verdict is not None


def test_fault_40_xdg_cache_home_serves_where_there_is_no_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_files.default_cache_directory() == tmp_path / "fastattn"


def test_fault_40_the_environment_comes_first(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path / "mine"))
    reload_settings()
    assert store_of(current_settings()).root == tmp_path / "mine"


@pytest.mark.parametrize("call", ["mkdir", "open", "mkstemp"])
def test_fault_40_a_read_only_directory_is_one_warning(call, own_store, monkeypatch, caplog):
    """Root may write anywhere, so the system calls say no."""
    turn(monkeypatch, Clock({"default": FAST}))  # by a quiet clock, or a verdict is not to be written at all
    no = raises(errno.EROFS)
    if call == "mkdir":
        monkeypatch.setattr(Path, "mkdir", no)
    elif call == "open":
        real = os.open
        monkeypatch.setattr(
            os, "open", lambda p, flags, *a, **k: no() if flags & os.O_CREAT else real(p, flags, *a, **k)
        )
    else:
        monkeypatch.setattr(cache_files.tempfile, "mkstemp", no)
    for n in (20, 21):
        x = torch.randn(1, 2, n, 16)
        out = fastattn.attention(x, x, x)
        assert torch.allclose(out, torch.nn.functional.scaled_dot_product_attention(x, x, x), atol=1e-5)
        assert fastattn.explain(x, x, x).verdict is not None, "the verdict is not even in memory"
    assert len([r for r in caplog.records if "in memory only" in r.getMessage()]) == 1
    assert not list(own_store.rglob("*.json"))


def test_fault_40_a_file_in_the_way(tmp_path, caplog):
    (tmp_path / "own").write_text("I am a file")
    mine = Store([tmp_path / "own"])
    assert mine.put(verdict(), DEVICE) is None and mine.get(PROBLEM, DEVICE) is None
    assert list(mine.verdicts()) == [] and mine.clear() == 0
    assert "in memory only" in caplog.text
    assert (tmp_path / "own").read_text() == "I am a file"


# --- faults 42 and 43: what a file answers for


@pytest.mark.parametrize("field", [f.name for f in fields(Device)])
def test_fault_42_another_fingerprint_is_a_miss(kept, field):
    """A verdict of another machine or other versions is a miss."""
    value = getattr(DEVICE, field)
    other = replace(DEVICE, **{field: value + 1 if isinstance(value, int) else value + "x"})
    assert other.slug != DEVICE.slug
    assert kept[0].get(PROBLEM, other) is None
    assert kept[0].get(PROBLEM, replace(other, **{field: value})) is not None


def test_fault_42_another_schema_is_another_directory(kept):
    assert f"v{SCHEMA}" in kept[1].parts


def test_fault_42_an_unknown_version_never_matches_a_known_one(kept):
    assert kept[0].get(PROBLEM, replace(DEVICE, torch_git="")) is None


OTHER_VALUES = {str: "other", int: 7, bool: True, str | None: "bool", float: 3.5, str | float: "dtype",
                tuple[str, str, str]: ("other", "contiguous", "contiguous"), tuple[str, ...]: ("float64",)}  # fmt: skip
NAMING = [name for name in Problem._fields if name != "window"]


@pytest.mark.parametrize("field", NAMING)
def test_fault_43_every_field_of_a_problem_names_its_file(kept, field):
    """All that may change the choice is part of what names a verdict's file."""
    other = PROBLEM.replace(**{field: OTHER_VALUES[Problem.__annotations__[field]]})
    assert other != PROBLEM and other.digest != PROBLEM.digest
    assert kept[0].get(other, DEVICE) is None


def test_fault_43_a_renamed_file_is_a_miss(kept):
    mine, path = kept
    other = PROBLEM.replace(q_len=64)
    path.rename(path.with_name(f"{other.digest}.json"))
    assert mine.get(other, DEVICE) is None and mine.get(PROBLEM, DEVICE) is None
    assert list(mine.verdicts()) == []


def test_fault_43_two_problems_of_one_digest_are_not_confused(tmp_path, monkeypatch):
    monkeypatch.setattr(Problem, "digest", property(lambda self: "same"))
    mine = Store([tmp_path])
    mine.put(verdict(), DEVICE)
    assert mine.get(PROBLEM, DEVICE) is not None
    assert mine.get(PROBLEM.replace(q_len=64), DEVICE) is None


def test_fault_43_a_stored_winner_is_asked_again_whether_it_can(monkeypatch):
    """A verdict for a bucket names a kernel that cannot do one of its members: the next one that can serves."""
    x = torch.randn(1, 2, 24, 16)
    with fastattn.options(mode="cached"):
        problem = fastattn.explain(x, x, x, accuracy="exact").problem
        session.store(current_settings()).put(verdict(problem, "matmul_shifted"), Device.of(x.device))
        fastattn.clear()
        assert fastattn.explain(x, x, x).served_by == "default"  # float32 is not for matmul_shifted
        assert torch.equal(fastattn.attention(x, x, x), torch.nn.functional.scaled_dot_product_attention(x, x, x))


# --- fault 54: who may write, and what is followed


def test_fault_54_files_and_directories_are_for_this_user_alone(tmp_path):
    """The cache's files and directories are for this user alone, and what others may write is neither read nor written."""
    before = os.umask(0)
    try:
        path = Store([tmp_path / "own"]).put(verdict(), DEVICE)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for directory in (path.parent, path.parent.parent, path.parent.parent.parent):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700, directory


@pytest.mark.parametrize("level", [0, 1, 2], ids=["root", "schema", "fingerprint"])
def test_fault_54_a_symlinked_directory_is_not_written(tmp_path, level, caplog):
    mine = Store([tmp_path / "own"])
    path = mine.put(verdict(), DEVICE)
    directory = [path.parent.parent.parent, path.parent.parent, path.parent][level]
    directory.rename(tmp_path / "elsewhere")
    directory.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    before = sorted((tmp_path / "elsewhere").rglob("*"))
    assert mine.put(verdict(PROBLEM.replace(q_len=64)), DEVICE) is None
    assert sorted((tmp_path / "elsewhere").rglob("*")) == before
    assert "in memory only" in caplog.text


def test_fault_54_a_symlinked_entry_is_not_read(kept, tmp_path):
    mine, path = kept
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    assert mine.get(PROBLEM, DEVICE) is None
    mine.put(verdict(winner="sdpa_math"), DEVICE)
    assert not path.is_symlink() and mine.get(PROBLEM, DEVICE).winner == "sdpa_math"
    assert json.loads((tmp_path / "elsewhere.json").read_text())["winner"] == "matmul", "it wrote through the link"


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722])
def test_fault_54_a_directory_that_others_may_write_is_not_written(kept, mode):
    mine, path = kept
    path.parent.chmod(mode)
    assert mine.put(verdict(winner="sdpa_math"), DEVICE) is None
    assert stat.S_IMODE(path.parent.stat().st_mode) == mode, "a shared directory is not ours to change"


@pytest.mark.parametrize("mode", [0o602, 0o666, 0o777])
def test_fault_54_a_file_that_others_may_write_is_not_read(kept, mode):
    mine, path = kept
    path.chmod(mode)
    assert mine.get(PROBLEM, DEVICE) is None


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no owners here")
def test_fault_54_a_file_of_another_user_is_not_read(kept, monkeypatch):
    mine, path = kept
    uid = os.geteuid()
    if uid == 0:
        os.chown(path, 1234, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    assert mine.get(PROBLEM, DEVICE) is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFO here")
def test_fault_54_a_fifo_does_not_block(kept):
    """In a process of its own, so that a store that blocks is a failure and no hang."""
    mine, path = kept
    path.unlink()
    os.mkfifo(path, 0o600)
    code = "import sys; from pathlib import Path; from fastattn.verdicts.store import Store; " \
           "sys.exit(len(list(Store([Path(sys.argv[1])]).verdicts())))"  # fmt: skip
    done = children.run(code, str(mine.root), timeout=30)
    assert done.returncode == 0, done.stderr


def test_fault_54_a_directory_or_device_as_entry(kept):
    mine, path = kept
    path.unlink()
    path.mkdir()
    assert mine.get(PROBLEM, DEVICE) is None and mine.clear() == 0


def test_fault_54_who_owns_it_matters_not_where_it_is(monkeypatch, tmp_path):
    """A HOME under /tmp serves as any other; what others may write, or own, does not (fault 57)."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    root = cache_files.default_cache_directory()
    assert root.is_relative_to(tmp_path)
    mine = Store([root])
    assert mine.put(verdict(), DEVICE) is not None and mine.get(PROBLEM, DEVICE) is not None
    (root / f"v{SCHEMA}").chmod(0o777)
    assert Store([root]).put(verdict(), DEVICE) is None
    monkeypatch.setenv("XDG_CACHE_HOME", "/tmp/asked-for")
    assert cache_files.default_cache_directory() == Path("/tmp/asked-for/fastattn")


# --- fault 55: no code in files

FORBIDDEN = {"pickle", "cPickle", "dill", "marshal", "shelve", "eval", "exec", "compile", "__import__", "joblib"}


def forbidden(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] in FORBIDDEN)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN:
            yield node.module
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN:
            yield node.func.id
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "np.load", "numpy.load"):
            yield ast.unparse(node)
        elif isinstance(node, ast.Attribute) and node.attr in ("allow_pickle", "weights_only"):
            yield node.attr


def test_fault_55_nothing_reads_code_from_a_file():
    """Nothing in the library reads code from a file: no pickle, no torch.load, no eval, and exec in one place alone."""
    found = {(p.name, name) for p in SOURCE.rglob("*.py") for name in forbidden(p.read_text())}
    assert found == {("guard.py", "exec")}


@pytest.mark.parametrize(
    "bad", ["import pickle", "from marshal import loads", "eval(x)", "torch.load(f)", "__import__(n)"]
)
def test_fault_55_the_guard_would_see_it(bad):
    assert list(forbidden(bad))


def test_fault_55_the_guard_generates_its_source_from_fixed_words():
    """What exec() runs holds no text of the caller's: values go in as arguments."""
    from fastattn.dispatch import guard
    from fastattn.dispatch.resolve import Resolved

    seen = []
    real = guard._maker
    guard._maker = lambda names, condition: (seen.append((names, condition)), real(names, condition))[1]
    try:
        q = torch.randn(1, 2, 8, 16)
        resolved = Resolved(lambda *a: a, "'); evil('", "a test")
        guard.build_guard(q, q, q, None, "bhsd'); evil('", {"scale": 0.5, "kernel": "'); evil('"}, resolved, None)
    finally:
        guard._maker = real
    assert seen and "evil" not in str(seen)


# --- bounds, layers, manifests


def aged(mine, count):
    """Verdicts with kv_len 0, 1, ...: the later the newer."""
    paths = []
    for n in range(count):
        path = mine.put(verdict(PROBLEM.replace(kv_len=n)), DEVICE)
        os.utime(path, (1_000_000 + n, 1_000_000 + n))
        paths.append(path)
    return paths


def left(mine):
    return {v.problem.kv_len for _, v in mine.verdicts()}


def test_trimming_keeps_the_most_recent_files(tmp_path, monkeypatch):
    mine = Store([tmp_path])
    aged(mine, 8)
    monkeypatch.setattr(store, "MAX_FILES", 3)
    mine.trim()
    assert left(mine) == {5, 6, 7}


def test_trimming_keeps_within_the_bytes(tmp_path, monkeypatch):
    mine = Store([tmp_path])
    size = max(p.stat().st_size for p in aged(mine, 8))
    monkeypatch.setattr(store, "MAX_BYTES", 4 * size)
    mine.trim()
    assert left(mine) >= {5, 6, 7} and len(left(mine)) <= 4


def test_a_file_that_was_used_again_is_kept(tmp_path, monkeypatch):
    mine = Store([tmp_path])
    paths = aged(mine, 4)
    os.utime(paths[0], (2_000_000, 1_000_000))
    monkeypatch.setattr(store, "MAX_FILES", 2)
    mine.trim()
    assert left(mine) == {0, 3}


def test_puts_trim_by_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "MAX_FILES", 5)
    monkeypatch.setattr(store, "_TRIM_EVERY", 10)
    mine = Store([tmp_path])
    for n in range(31):
        mine.put(verdict(PROBLEM.replace(kv_len=n)), DEVICE)
    assert len(left(mine)) <= 5 + 10


def test_trimming_leaves_foreign_files_alone(kept, monkeypatch):
    mine, path = kept
    note = path.parent / "notes.txt"
    note.write_text("mine")
    monkeypatch.setattr(store, "MAX_FILES", 0)
    mine.trim()
    assert note.exists() and not path.exists()


def test_layers_the_first_wins_and_the_second_is_only_read(tmp_path):
    shared, own = tmp_path / "shared", tmp_path / "own"
    Store([shared]).put(verdict(winner="sdpa_math"), DEVICE)
    other = PROBLEM.replace(q_len=64)
    before = sorted((p, p.read_bytes()) for p in shared.rglob("*.json"))
    both = Store([own, shared])
    assert both.get(PROBLEM, DEVICE).winner == "sdpa_math"
    both.put(verdict(winner="matmul"), DEVICE)
    both.put(verdict(other), DEVICE)
    assert both.get(PROBLEM, DEVICE).winner == "matmul"
    assert both.get(other, DEVICE) is not None
    both.clear()
    both.trim()
    assert sorted((p, p.read_bytes()) for p in shared.rglob("*.json")) == before
    assert both.get(PROBLEM, DEVICE).winner == "sdpa_math"


def test_layers_a_broken_first_is_passed_over(tmp_path):
    shared, own = tmp_path / "shared", tmp_path / "own"
    Store([shared]).put(verdict(winner="sdpa_math"), DEVICE)
    Store([own]).put(verdict(winner="matmul"), DEVICE).write_text("{")
    assert Store([own, shared]).get(PROBLEM, DEVICE).winner == "sdpa_math"


def test_layers_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTATTN_CACHE_DIR", os.pathsep.join([str(tmp_path / "a"), "", str(tmp_path / "b")]))
    reload_settings()
    assert store_of(current_settings()).layers == [tmp_path / "a", tmp_path / "b"]


def test_a_manifest_comes_back_whole(kept, tmp_path):
    mine, _ = kept
    mine.put(verdict(PROBLEM.replace(q_len=64)), DEVICE)
    path = tmp_path / "manifest.json"
    path.write_text(export_manifest((v for _, v in mine.verdicts(DEVICE)), DEVICE))
    assert read_manifest(path, DEVICE) == {v.problem: v for _, v in mine.verdicts()}


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", "[" * 30_000, '{"verdicts": [3], "environment": {"slug": ""}}']
)
def test_a_manifest_that_is_none_says_its_name(tmp_path, text):
    path = tmp_path / "manifest.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="FASTATTN_MANIFEST .*manifest.json"):
        read_manifest(path, DEVICE)


def test_a_manifest_of_another_machine_is_refused(tmp_path):
    path = tmp_path / "manifest.json"
    path.write_text(export_manifest([verdict()], replace(DEVICE, name="other silicon")))
    with pytest.raises(ValueError, match="made for .*other-silicon.*, this is .*test-silicon"):
        read_manifest(path, DEVICE)


def test_a_manifest_serves_before_the_store(tmp_path, monkeypatch):
    x = torch.randn(1, 2, 24, 16)
    here = Device.of(x.device)
    with fastattn.options(mode="cached"):
        problem = fastattn.explain(x, x, x).problem
    path = tmp_path / "manifest.json"
    path.write_text(export_manifest([verdict(problem, "sdpa_math")], here))
    monkeypatch.setenv("FASTATTN_MANIFEST", str(path))
    monkeypatch.setenv("FASTATTN_MODE", "cached")
    reload_settings()
    fastattn.clear()
    session.store(current_settings()).put(verdict(problem, "matmul"), here)
    assert fastattn.explain(x, x, x).served_by == "sdpa_math"
    assert torch.allclose(
        fastattn.attention(x, x, x), torch.nn.functional.scaled_dot_product_attention(x, x, x), atol=1e-5
    )


def test_a_stale_manifest_does_not_stand_before_what_this_process_tuned(tmp_path, monkeypatch):
    x = torch.randn(1, 2, 24, 16)
    here = Device.of(x.device)
    with fastattn.options(mode="cached"):
        problem = fastattn.explain(x, x, x).problem
    path = tmp_path / "manifest.json"
    path.write_text(export_manifest([verdict(problem, "matmul")._replace(made_by="0.0.0")], here))
    monkeypatch.setenv("FASTATTN_MANIFEST", str(path))
    reload_settings()
    turn(monkeypatch, Clock())
    fastattn.stats.reset()
    for _ in range(2):
        fastattn.clear()
        fastattn.attention(x, x, x)
        verdict_now = fastattn.explain(x, x, x).verdict
        assert verdict_now is not None and verdict_now.made_by == fastattn.__version__
    assert fastattn.stats()["tunings"] == 1, "the second time it is in the store"
