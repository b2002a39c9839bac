"""A library that would end or hang the process costs a sentence, once: it is met in a child process, and remembered on disk."""

from __future__ import annotations

import importlib
import json
import os
import sys
from functools import partial
from pathlib import Path

import children
import pytest
from fakes import problem

from fastattn.environment.device import Device
from fastattn.environment.settings import Settings
from fastattn.kernels.adapters import natten
from fastattn.kernels.libraries import availability, catalogue, import_probe
from fastattn.planning import candidates
from fastattn.planning.decision import Accepted, Rejected

COUNT = "import pathlib; open(pathlib.Path(__file__).with_suffix('.count'), 'a').write('x')\n"
EXITS, SEGFAULTS, HANGS = "import os; os._exit(3)", "import ctypes; ctypes.string_at(0)", "import time; time.sleep(60)"
WORKS, RAISES = "entry = 1", "raise RuntimeError('built for another torch')"


class Site:
    """A directory of modules made up for a test, each counting its imports."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def put(self, name: str, source: str) -> str:
        (self.path / f"{name}.py").write_text(COUNT + source + "\n", encoding="utf-8")
        importlib.invalidate_caches()
        return name

    def imports(self, name: str) -> int:
        count = self.path / f"{name}.count"
        return len(count.read_text()) if count.exists() else 0


AGAIN = "; `fastattn cache clear` has it tried again"


@pytest.fixture
def site(tmp_path, monkeypatch):
    path = tmp_path / "site"
    path.mkdir()
    monkeypatch.syspath_prepend(str(path))
    yield Site(path)
    for name in [p.stem for p in path.glob("*.py")]:
        sys.modules.pop(name, None)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "cache"


def remembered(root: Path) -> list[dict[str, str]]:
    return [json.loads(path.read_text()) for path in root.glob("imports/*/*.json")]


@pytest.mark.parametrize("source, ending", [(EXITS, "exit code 3"), (SEGFAULTS, "SIGSEGV")])
def test_fault_60_a_module_that_ends_the_process_is_a_sentence_and_is_remembered(site, root, source, ending):
    """A library whose import ends its process ends a child, never this one, and is not tried again."""
    name = site.put("ends_it", source)
    why = import_probe.why_import_crashes(name, "entry", "1.0", root)
    said = f"importing it ended the process: {ending}"
    assert why == said + AGAIN and name not in sys.modules
    assert remembered(root) == [{"module": name, "version": "1.0", "fatal": said}]
    assert import_probe.why_import_crashes(name, "entry", "1.0", root) == why and site.imports(name) == 1


def test_the_next_process_does_not_try_it_again(site, root):
    name = site.put("ends_it", EXITS)
    why = import_probe.why_import_crashes(name, "entry", "1.0", root)
    asked = f"{name!r}, 'entry', '1.0', pathlib.Path({str(root)!r})"
    code = "import pathlib; from fastattn.kernels.libraries.import_probe import why_import_crashes; "
    code += f"print(why_import_crashes({asked}))"
    path = os.pathsep.join([str(site.path), str(Path(import_probe.__file__).parents[3])])
    done = children.run(code, env={"PYTHONPATH": path})
    assert done.stdout.strip() == why, done.stderr
    assert site.imports(name) == 1


@pytest.mark.parametrize("source", [WORKS, RAISES, "something_else = 1"])
def test_one_that_works_or_merely_raises_is_not_fatal(site, root, source):
    name = site.put("harmless", source)
    assert import_probe.why_import_crashes(name, "entry", "1.0", root) is None
    assert [found["fatal"] for found in remembered(root)] == [""]
    assert import_probe.why_import_crashes(name, "entry", "1.0", root) is None and site.imports(name) == 1


def test_another_version_is_tried_anew(site, root):
    name = site.put("ends_it", EXITS)
    import_probe.why_import_crashes(name, "entry", "1.0", root)
    site.put(name, WORKS)
    assert import_probe.why_import_crashes(name, "entry", "1.1", root) is None
    assert import_probe.why_import_crashes(name, "entry", "1.0", root) is not None and site.imports(name) == 2


def test_a_killed_child_may_have_been_killed_by_somebody_else(site, root):
    name = site.put("is_killed", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert import_probe.why_import_crashes(name, "entry", "1.0", root) == "importing it ended the process: SIGKILL"
    assert remembered(root) == []


def test_a_process_that_cannot_start_children_goes_on_without(site, root, monkeypatch):
    def no_child(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    name = site.put("harmless", WORKS)
    monkeypatch.setattr(import_probe.subprocess, "Popen", no_child)
    assert import_probe.why_import_crashes(name, "entry", "1.0", root) is None
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert import_probe.why_import_fails(name, "entry") is None


def test_two_modules_that_only_crash_together_are_found(site, root):
    first = site.put("registers_ops", WORKS)
    second = site.put(
        "registers_the_same", "import os, sys\nif 'registers_ops' in sys.modules:\n    os._exit(7)\nentry = 1"
    )
    assert import_probe.why_import_crashes(first, "entry", "1.0", root) is None
    assert import_probe.why_import_crashes(second, "entry", "1.0", root) is None, (
        "the first was let in, and is not imported"
    )
    why = import_probe.why_import_crashes(second, "entry", "1.0", root, [first])
    assert why == "importing it ended the process: exit code 7 (beside registers_ops)" + AGAIN
    assert import_probe.why_import_crashes(second, "entry", "1.0", root, [first]) == why, (
        "and it is remembered for both together"
    )
    assert site.imports(second) == 2
    assert import_probe.why_import_crashes(second, "entry", "1.0", root) is None, "alone it works"
    assert site.imports(second) == 2


def test_a_neighbour_is_imported_as_this_process_imported_it(site, root):
    """Not with what it lists as its own, which nobody may have asked for."""
    package = site.path / "neighbour"
    package.mkdir()
    (package / "__init__.py").write_text("__all__ = ['ends']\n", encoding="utf-8")
    (package / "ends.py").write_text("import os\nos._exit(3)\n", encoding="utf-8")
    assert import_probe.why_import_crashes(site.put("harmless", WORKS), "entry", "1.0", root, ["neighbour"]) is None


def test_a_file_of_operators_is_loaded_beside_it_by_its_path(site, root, tmp_path, monkeypatch):
    """The child's torch is a stand-in, and runs the file."""
    stand_in = "import runpy\nfrom types import SimpleNamespace\nops = SimpleNamespace(load_library=runpy.run_path)\n"
    (tmp_path / "torch.py").write_text(stand_in, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    site.put("operators", "import sys\nsys.modules['registers_ops'] = sys")
    name = site.put(
        "registers_the_same", "import os, sys\nif 'registers_ops' in sys.modules:\n    os._exit(7)\nentry = 1"
    )
    path = str(site.path / "operators.py")
    why = import_probe.why_import_crashes(name, "entry", "1.0", root, [path])
    assert why == f"importing it ended the process: exit code 7 (beside {path})" + AGAIN


def test_fault_19_a_hang_is_a_sentence_and_is_not_remembered(site, root, monkeypatch):
    """A library whose import hangs is ended after its time, and its kernels say so."""
    monkeypatch.setattr(import_probe, "why_import_fails", partial(import_probe.why_import_fails, timeout_s=2.0))
    name = site.put("hangs", HANGS)
    for tries in (1, 2):
        assert import_probe.why_import_crashes(name, "entry", "1.0", root) == "importing it did not end within 2 s"
        assert site.imports(name) == tries
    assert remembered(root) == []


def test_without_a_cache_directory_it_is_tried_each_time(site):
    name = site.put("ends_it", EXITS)
    for tries in (1, 2):
        assert (
            import_probe.why_import_crashes(name, "entry", "1.0", None) == "importing it ended the process: exit code 3"
        )
        assert site.imports(name) == tries


def test_a_cache_directory_that_cannot_be_made_does_not_matter(site, root):
    root.write_text("a file", encoding="utf-8")
    name = site.put("ends_it", EXITS)
    for _ in range(2):
        assert (
            import_probe.why_import_crashes(name, "entry", "1.0", root) == "importing it ended the process: exit code 3"
        )


@pytest.mark.parametrize("garbage", [b"", b"{", b"[]", b'{"fatal": 3}', b"\xff\xfe", b"[" * 10**5])
def test_a_memory_that_cannot_be_read_is_none(site, root, garbage):
    name = site.put("ends_it", EXITS)
    why = import_probe.why_import_crashes(name, "entry", "1.0", root)
    [path] = root.glob("imports/*/*.json")
    path.write_bytes(garbage)
    assert import_probe.why_import_crashes(name, "entry", "1.0", root) == why and site.imports(name) == 2
    assert [found["fatal"] + AGAIN for found in remembered(root)] == [why]


def test_a_memory_that_others_could_have_written_is_none(site, root):
    name = site.put("harmless", WORKS)
    assert import_probe.why_import_crashes(name, "entry", "1.0", root) is None
    [path] = root.glob("imports/*/*.json")
    path.write_text(json.dumps({"fatal": "importing it ended the process: by a stranger's word"}), encoding="utf-8")
    path.chmod(0o666)
    assert import_probe.why_import_crashes(name, "entry", "1.0", root) is None and site.imports(name) == 2


def test_its_kernel_gives_the_sentence_as_its_reason_and_never_loads_it(site, monkeypatch):
    # transformers, imported by another test, finds the folder tests/kernels when it looks for the hub's package of that name;
    # torch.compile imports triton where it is installed
    for name in ("kernels", "triton"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    site.put("natten", EXITS)
    real = catalogue.installed_distribution
    known = catalogue.library_of("natten")
    monkeypatch.setattr(
        catalogue, "installed_distribution", lambda lib: ("natten", "0.21.6") if lib is known else real(lib)
    )
    availability.forget_libraries()
    try:
        reason = availability.why_unavailable(natten.KERNELS[0])
    finally:
        availability.forget_libraries()
    assert reason == "package natten cannot be used: importing it ended the process: exit code 3" + AGAIN
    assert "natten" not in sys.modules


def test_a_decision_imports_nothing_and_starts_no_child(monkeypatch):
    """What is untuned, captured, traced, or run on one of several ranks asks for decisions too."""

    def never(*_, **__):
        raise AssertionError("a library was touched")

    monkeypatch.setattr(catalogue, "installed_distribution", lambda lib: (lib.distributions[0], "2.8.3"))
    monkeypatch.setattr(import_probe, "why_import_crashes", never)
    availability.forget_libraries()
    try:
        h100 = Device("cuda", "made-up GPU", 90, cuda="13.0", cudnn=92300)
        p = problem(device="cuda", dtype="bfloat16")
        found = {d.kernel.name: d for d in candidates.decisions(p, h100, Settings())}
        assert isinstance(found["flash_attn_2"], Accepted)
        [sure] = candidates.decide(found["flash_attn_2"].kernel, p, h100, Settings(), certain=True)
        assert sure.reasons == ("package flash-attn cannot be used: AssertionError: a library was touched",)
        assert isinstance(candidates.decide(found["flash_attn_2"].kernel, p, h100, Settings())[0], Rejected)
    finally:
        availability.forget_libraries()
