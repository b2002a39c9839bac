"""options(...) sets for the process, options.scope(...) for a block: no other thread sees a scope, and none pays for it."""

from __future__ import annotations

import os
import threading

import pytest
import torch

import fastattn
from fastattn import attention
from fastattn.dispatch.attention import entries
from fastattn.environment import settings
from fastattn.environment.settings import current_settings, reload_settings


def scope(**given):
    return fastattn.options.scope(**given)


def old_form(**given):
    """The older spelling, where the call does not stand in the `with` statement itself."""
    return fastattn.options(**given)


def test_a_scope_is_never_seen_by_another_thread_not_even_while_it_is_made():
    stop, seen = threading.Event(), set()

    def look():
        while not stop.is_set():
            seen.add(current_settings().mode)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(300):
        with fastattn.options.scope(mode="off"):
            assert current_settings().mode == "off"
        with fastattn.options(mode="cached"):
            assert current_settings().mode == "cached"
    stop.set()
    for thread in threads:
        thread.join()
    assert seen == {"auto"}


@pytest.mark.parametrize("spelling", ["scope", "with options"])
def test_a_scope_is_no_change_of_the_process(spelling):
    """What listens for changes, and drops entries then, is not told."""
    told = []
    settings._listeners.append(lambda: told.append(1))
    try:
        if spelling == "scope":
            with fastattn.options.scope(mode="off"):
                pass
        else:
            with fastattn.options(mode="off"), fastattn.options(kernels=["torch_math"]):
                assert current_settings().kernels == ("torch_math",)
    finally:
        settings._listeners.pop()
    assert not told and current_settings().mode == "auto"


def test_entering_scopes_flushes_nobodys_entries():
    x = torch.randn(1, 2, 16, 8)
    with fastattn.options.scope(mode="cached"):
        attention(x, x, x)
    fastattn.stats.reset()
    before = entries.generation
    for _ in range(50):
        with fastattn.options.scope(mode="cached"):
            attention(x, x, x)
    found = fastattn.stats()
    assert found["hits"] == 50 and found["misses"] == 0
    assert entries.generation == before and len(entries.table) == 1


def test_the_old_form_works_wherever_it_is_made():
    made = old_form(mode="off")
    assert current_settings().mode == "off", "as a statement it sets the process"
    with made:
        assert current_settings().mode == "off"
    assert current_settings().mode == "auto", "as a scope it is taken back"


def test_a_statement_sets_the_process_for_every_thread():
    fastattn.options(mode="cached")
    seen = []
    thread = threading.Thread(target=lambda: seen.append(current_settings().mode))
    thread.start()
    thread.join()
    assert seen == ["cached"]


def test_a_scope_may_be_entered_again_and_inside_itself():
    mine = scope(mode="cached")
    with mine, mine:
        assert current_settings().mode == "cached"
    with mine:
        assert current_settings().mode == "cached"
    assert current_settings().mode == "auto"


def test_a_bad_value_changes_nothing():
    for bad in ({"mode": "fast"}, {"kernels": ["torch_flasch"]}, {"accuracy": -1}, {"tune_budget": -1.0}):
        with pytest.raises(ValueError, match=r"must be|did you mean"):
            fastattn.options(**bad)
        with pytest.raises(ValueError, match=r"must be|did you mean"):
            scope(**bad)
    assert current_settings() == settings.from_environment()


def test_fault_86_a_relative_cache_dir_stays_where_it_was_named(tmp_path, monkeypatch):
    """A relative cache directory is the one that it was when it was named, whatever the current directory is later."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    monkeypatch.setenv("FASTATTN_CACHE_DIR", os.pathsep.join(["mine", "theirs"]))
    reload_settings()
    named = current_settings().cache_dir
    fastattn.options(cache_dir="other")
    monkeypatch.chdir(tmp_path / "b")
    assert named == os.pathsep.join([str(tmp_path / "a" / "mine"), str(tmp_path / "a" / "theirs")])
    assert current_settings().cache_dir == str(tmp_path / "a" / "other")
