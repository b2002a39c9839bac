"""A candidate of a library that ends the process while it is tried is left alone by the next one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import children
import fakes
import pytest
import torch

import fastattn
from fastattn.environment.settings import current_settings
from fastattn.kernels.libraries import crash_notes
from fastattn.verdicts.store import store_of


@pytest.fixture
def root(tmp_path):
    return tmp_path / "cache"


def notes(root: Path) -> list[Path]:
    return list(root.glob("trying/*/*.json"))


def test_the_note_is_there_while_it_is_tried_and_gone_afterwards(root):
    with crash_notes.leave_note(root, "a candidate"):
        assert len(notes(root)) == 1 and crash_notes.crashed_before(root, "a candidate") is None, (
            "its own process goes on"
        )
    assert notes(root) == []
    with pytest.raises(ValueError), crash_notes.leave_note(root, "a candidate"):
        raise ValueError("it merely cannot")
    assert notes(root) == []
    with pytest.raises(RuntimeError), crash_notes.leave_note(root, "a candidate"):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")
    assert notes(root) == [], "the process goes on"
    with pytest.raises(RuntimeError), crash_notes.leave_note(root, "a candidate"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    assert len(notes(root)) == 1


def test_without_a_cache_nothing_is_noted():
    with crash_notes.leave_note(None, "a candidate"):
        assert crash_notes.crashed_before(None, "a candidate") is None


def test_fault_49_what_a_dead_process_tried_is_left_alone_until_the_cache_is_cleared(root, monkeypatch):
    """What ended a process while it was tried is left alone by the next one, until the cache is cleared."""
    code = (
        "import os, pathlib; from fastattn.kernels.libraries import crash_notes as trying\n"
        f"with trying.leave_note(pathlib.Path({str(root)!r}), 'a candidate'): os._exit(139)"
    )
    path = str(Path(crash_notes.__file__).parents[3])
    assert children.run(code, env={"PYTHONPATH": path}).returncode == 139
    assert "ended the process" in str(crash_notes.crashed_before(root, "a candidate"))
    assert crash_notes.crashed_before(root, "another") is None
    fastattn.options(cache_dir=str(root))
    store_of(current_settings()).clear()
    assert crash_notes.crashed_before(root, "a candidate") is None


def test_a_live_process_that_tries_it_does_not_matter(root):
    with crash_notes.leave_note(root, "a candidate"):
        [note] = notes(root)
        note.write_text(json.dumps({"pid": os.getppid()}))
        assert crash_notes.crashed_before(root, "a candidate") is None
        note.write_text("{")
        assert crash_notes.crashed_before(root, "a candidate") is None


def test_tuning_asks(monkeypatch):
    """A library's kernel whose note is there is out, with the reason; torch's own leave none."""
    mine = fakes.made_up("of_a_library", fakes.honest, library="pytest")
    fakes.add(monkeypatch, mine)
    tried = []
    real = crash_notes.leave_note
    monkeypatch.setattr(crash_notes, "leave_note", lambda root, what: tried.append(what) or real(root, what))
    q = torch.randn(1, 2, 24, 16)
    assert fakes.row("of_a_library", q, q, q, tune=True).forward is not None
    assert tried and all(what.startswith("of_a_library ") for what in tried)
    monkeypatch.setattr(crash_notes, "crashed_before", lambda root, what: "it ended the process that tried it")
    q = torch.randn(1, 2, 25, 16)
    assert fakes.row("of_a_library", q, q, q, tune=True).reason == "it ended the process that tried it"
