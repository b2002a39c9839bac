"""Faults 39, 41 and 57 of reference/faults.md: file systems that fail, and files that want to choose.

The other faults of the store, 37 to 55, are in test_store.py.
"""

from __future__ import annotations

import errno
import os
import signal

import children
import pytest
import torch
from building import CPU
from fakes import FAST, Clock, add, check, honest, made_up, qkv, row, turn
from stored import DEVICE, PROBLEM, raises, verdict

import fastattn
from fastattn.dispatch.session import session
from fastattn.environment.settings import current_settings
from fastattn.verdicts.store import Store
from fastattn.verdicts.verdict import Trial, Verdict

# --- fault 39: NFS, shared homes

ERRNOS = ["ESTALE", "EBUSY", "ENOENT", "EACCES", "EROFS", "ENOSPC", "EDQUOT", "EIO", "ELOOP"]
CALLS = ["os.open", "os.replace", "os.fsync", "os.fstat", "os.stat", "os.mkdir", "os.scandir", "os.unlink"]


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]


@pytest.mark.parametrize(
    "call, name", [("os.open", "EACCES"), ("os.replace", "EBUSY"), ("os.fsync", "ESTALE"), ("os.mkdir", "EROFS")]
)
def test_fault_39_what_cannot_be_written_is_kept_in_memory_with_one_warning(call, name, own_store, monkeypatch, caplog):
    """Where the file system fails, verdicts stay in memory, with one warning."""
    add(monkeypatch, made_up("quick", honest))
    turn(monkeypatch, Clock({"default": 4e-3, "quick": FAST}))
    monkeypatch.setattr(os, call.removeprefix("os."), raises(getattr(errno, name)))
    for n in (48, 56):
        q, k, v = qkv(n)
        check(q, k, v)
        assert fastattn.explain(q, k, v).served_by == "quick", "the result of tuning was lost"
    [said] = warnings(caplog)
    assert os.strerror(getattr(errno, name)) in said
    monkeypatch.undo()
    assert not [p for p in own_store.rglob("*") if p.is_file()]


@pytest.mark.parametrize("name", ERRNOS)
@pytest.mark.parametrize("call", CALLS)
def test_fault_39_no_method_of_a_store_raises(call, name, tmp_path, monkeypatch, caplog):
    """Whatever system call fails, also behind pathlib's back."""
    mine = Store([tmp_path / "own"])
    path = mine.put(verdict(), DEVICE)
    other = verdict(PROBLEM.replace(q_len=64))
    with monkeypatch.context() as patch:
        patch.setattr(os, call.removeprefix("os."), raises(getattr(errno, name)))
        assert mine.get(PROBLEM, DEVICE) in (None, verdict())
        assert mine.put(other, DEVICE) in (None, path.with_name(f"{other.problem.digest}.json"))
        assert len(list(mine.verdicts())) in (0, 1, 2)
        mine.trim()
    assert mine.get(PROBLEM, DEVICE) == verdict(), "what was there before is gone"
    with monkeypatch.context() as patch:
        patch.setattr(os, call.removeprefix("os."), raises(getattr(errno, name)))
        assert mine.clear() in (0, 1, 2)
    assert len(warnings(caplog)) <= 1


@pytest.mark.parametrize("name", ["ESTALE", "EIO", "EACCES"])
def test_fault_39_stored_verdicts_that_cannot_be_read_are_said_once(name, tmp_path, monkeypatch, caplog):
    """Where nothing is tuned nothing is written: a server would get the default without a word."""
    mine = Store([tmp_path / "own"])
    mine.put(verdict(), DEVICE)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", raises(getattr(errno, name)))
        assert mine.get(PROBLEM, DEVICE) is None and mine.get(PROBLEM.replace(q_len=64), DEVICE) is None
    [said] = warnings(caplog)
    assert "cannot be read" in said and os.strerror(getattr(errno, name)) in said
    assert mine.get(PROBLEM, DEVICE) == verdict(), "a file server that comes back is used again"


def test_fault_39_what_is_not_there_is_no_failure(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert Store([tmp_path / "none"]).get(PROBLEM, DEVICE) is None
    assert Store([tmp_path / "file"]).get(PROBLEM, DEVICE) is None
    assert not caplog.records


# --- fault 41: a full disk

QUOTA = """
import resource, signal, sys
from stored import DEVICE, verdict
from fastattn.verdicts.store import Store
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
print(Store([Path(sys.argv[1])]).put(verdict(), DEVICE))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no limit on file sizes here")
@pytest.mark.parametrize("bytes_left", [0, 100])
def test_fault_41_a_quota_leaves_neither_a_temporary_file_nor_half_an_entry(bytes_left, tmp_path):
    """A full disk leaves neither a temporary file nor half an entry."""
    done = children.run(QUOTA, str(tmp_path / "own"), str(bytes_left), env={"PYTHONPATH": children.PATH})
    assert done.returncode == 0 and done.stdout.strip() == "None", done.stderr
    assert done.stderr.count("in memory only") == 1 and os.strerror(errno.EFBIG) in done.stderr
    assert not [p for p in (tmp_path / "own").rglob("*") if p.is_file()]


class FullDisk:
    """A file that takes `room` bytes a piece at a time, then none."""

    def __init__(self, file, room=100):
        self.file, self.room = file, room

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data):
        self.file.write(data[: self.room])
        self.file.flush()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_fault_41_a_disk_that_fills_up_keeps_the_old_entry_and_the_result(own_store, monkeypatch, caplog):
    add(monkeypatch, made_up("quick", honest))
    clock = turn(monkeypatch, Clock({"default": FAST, "quick": 4e-3}))
    q, k, v = qkv(48)
    check(q, k, v)
    [path] = own_store.rglob("*.json")
    before = path.read_bytes()
    clock.costs.update(default=4e-3, quick=FAST)
    real = os.fdopen
    monkeypatch.setattr(
        os, "fdopen", lambda fd, mode, *a: FullDisk(real(fd, mode)) if mode == "wb" else real(fd, mode, *a)
    )
    fastattn.tune(fastattn.explain(q, k, v).problem, force=True)
    check(q, k, v)
    assert fastattn.explain(q, k, v).served_by == "quick"
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]
    [said] = warnings(caplog)
    assert os.strerror(errno.ENOSPC) in said


# --- fault 57: a file has no say in what the caller consents to


@pytest.fixture
def sage(monkeypatch):
    """An approximate kernel, and every call of it."""
    calls = []

    def run(q, k, v, mask, a):
        calls.append(q.shape)
        return honest(q, k, v, mask, a)

    add(monkeypatch, made_up("sage", run, approximate=True))
    return calls


def plant(problem, winner):
    trials = (Trial("default", time_us=9.0), Trial(winner, time_us=1.0))
    assert session.store(current_settings()).put(Verdict(problem, winner, trials), CPU) is not None
    fastattn.clear()


@pytest.mark.parametrize("mode", ["cached", "auto"])
@pytest.mark.parametrize("accuracy", ["exact", "dtype", None])
def test_fault_57_a_planted_approximate_winner_is_ignored(accuracy, mode, sage, monkeypatch):
    """A file cannot consent for the caller: an approximate winner that was planted is ignored."""
    turn(monkeypatch, Clock({"default": 4e-3, "sage": FAST}))
    q, k, v = qkv(48)
    options = {} if accuracy is None else {"accuracy": accuracy}
    with fastattn.options(mode=mode):
        plant(fastattn.explain(q, k, v, **options).problem, "sage")
        out = fastattn.attention(q, k, v, **options)
        why = fastattn.explain(q, k, v, **options)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))
    assert why.served_by != "sage" and not sage
    assert "accuracy" in row("sage", q, k, v, **options).reason


def test_fault_57_the_callers_own_number_is_consent(sage, untuned):
    q, k, v = qkv(48)
    plant(fastattn.explain(q, k, v, accuracy=0.1).problem, "sage")
    fastattn.attention(q, k, v, accuracy=0.1)
    assert len(sage) == 1
    fastattn.attention(q, k, v)
    assert len(sage) == 1, "one call's consent served another"


def test_fault_57_a_planted_number_does_not_become_the_callers(sage, untuned, own_store):
    """The file of a problem with a number, moved to where the exact problem's would be, is a miss."""
    q, k, v = qkv(48)
    exact = fastattn.explain(q, k, v).problem
    plant(exact.replace(accuracy=0.1), "sage")
    [path] = own_store.rglob("*.json")
    path.rename(path.with_name(f"{exact.digest}.json"))
    fastattn.attention(q, k, v)
    assert not sage


@pytest.mark.parametrize("setting", [{"kernels": ["-matmul"]}, {"kernels": ["torch_flash"]}])
def test_fault_57_a_file_does_not_bring_back_what_is_excluded(setting, untuned):
    q, k, v = qkv(48)
    with fastattn.options(**setting):
        plant(fastattn.explain(q, k, v).problem, "matmul")
        fastattn.attention(q, k, v)
        assert fastattn.explain(q, k, v).served_by == "default"


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no owners here")
@pytest.mark.parametrize("owner, is_read", [("self", True), ("root", True), ("other", False)])
def test_fault_57_a_shared_cache_is_read_if_it_is_ours_or_roots(owner, is_read, tmp_path, monkeypatch):
    Store([tmp_path / "shared"]).put(verdict(), DEVICE)
    uid = {"self": os.geteuid(), "root": 0, "other": os.geteuid() + 1}[owner]
    real = os.fstat

    def fstat(descriptor):
        found = list(real(descriptor))
        found[4] = uid
        return os.stat_result(found)

    monkeypatch.setattr(os, "fstat", fstat)
    assert (Store([tmp_path / "own", tmp_path / "shared"]).get(PROBLEM, DEVICE) is not None) == is_read
