"""Kernels of other packages, by entry points of the group fastattn.kernels: listed from metadata, loaded where named."""

from __future__ import annotations

import importlib
import sys

import pytest
from fakes import FAST, Clock, check, qkv, row, turn

import fastattn
from fastattn import NoKernelError
from fastattn.environment.settings import reload_settings
from fastattn.kernels import registry
from fastattn.kernels.libraries import availability

CACHED = (registry._entry_points, registry.plugins, registry._loaded,
          availability.library_version, availability.load_kernel, availability.why_unavailable)  # fmt: skip
MODULE = "fastattn_test_plugin"
UNNAMED = "considered only where it is named, with a + before it: fastattn.options(kernels=...)"
SOURCE = """
from fastattn.kernels import Arguments, Kernel, Range
from fastattn.kernels import sdpa_math

KERNEL = Kernel(
    name="its_own_name", summary="what a plugin brings", load=lambda: sdpa_math, devices=("cpu",), dtypes=("float32",),
    corner=None, needs=(Range("head_dim", max=64),),
)
NO_KERNEL = "a string"
"""


def forget() -> None:
    for remembered in CACHED:
        remembered.cache_clear()
    reload_settings()


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a distribution: install({entry point: object}, source of its module)."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def put(points: dict[str, str], source: str = SOURCE) -> None:
        (tmp_path / f"{MODULE}.py").write_text(source, encoding="utf-8")
        info = tmp_path / "test_plugin-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: test-plugin\nVersion: 1.2\n", encoding="utf-8")
        lines = [f"{name} = {MODULE}:{attribute}" for name, attribute in points.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{registry.GROUP}]", *lines]) + "\n", encoding="utf-8")
        importlib.invalidate_caches()
        forget()

    yield put
    sys.modules.pop(MODULE, None)
    monkeypatch.undo()
    forget()


@pytest.fixture
def toy(install):
    install({"toy_plugin": "KERNEL"})


def test_it_is_listed_from_its_metadata_and_not_imported(toy):
    assert "toy_plugin" in registry.names()
    reason = row("toy_plugin", *qkv(64)).reason
    assert reason is not None and reason.startswith(UNNAMED)
    fastattn.attention(*qkv(64))
    [listed] = registry.plugins()
    assert listed.library == "test-plugin" and f"{MODULE}:KERNEL" in listed.summary
    assert MODULE not in sys.modules


def test_an_order_loads_and_runs_it(toy):
    q, k, v = qkv(64)
    check(q, k, v, kernel="toy_plugin")
    assert MODULE in sys.modules
    with pytest.raises(NoKernelError, match=r"head_dim 72 > 64"):
        fastattn.attention(*qkv(64, head_dim=72), kernel="toy_plugin")
    assert fastattn.explain(q, k, v).served_by != "toy_plugin", "an order names it for its own call alone"


@pytest.mark.parametrize("names", [["+toy_plugin"], ["toy_plugin"], "+toy_plugin", ["+toy_plugin", "-flex"]])
def test_options_that_name_it_put_it_into_the_race(toy, monkeypatch, names):
    turn(monkeypatch, Clock({"default": 4e-3, "toy_plugin": FAST}))
    q, k, v = qkv(64)
    with fastattn.options(kernels=names):
        check(q, k, v)
        assert fastattn.explain(q, k, v).served_by == "toy_plugin"
    assert UNNAMED in (row("toy_plugin", q, k, v).reason or "")


def test_the_variable_that_names_it_does_so_too(toy, monkeypatch):
    monkeypatch.setenv("FASTATTN_KERNELS", "+toy_plugin")
    reload_settings()
    turn(monkeypatch, Clock({"default": 4e-3, "toy_plugin": FAST}))
    q, k, v = qkv(64)
    check(q, k, v)
    assert fastattn.explain(q, k, v).served_by == "toy_plugin"
    assert "toy_plugin" in registry.names()


def test_its_row_goes_by_the_entry_points_name_and_stays_considered_only_where_it_is_named(toy):
    [mine] = [kernel for kernel in registry.rows_for("cpu", ("toy_plugin",)) if kernel.name == "toy_plugin"]
    assert mine.opt_in and mine.library == "test-plugin" and mine.summary == "what a plugin brings"
    assert "its_own_name" not in registry.names() and availability.library_version("test-plugin") == "1.2"


def test_an_unknown_name_lists_the_plugins_among_the_known_ones(toy):
    with pytest.raises(ValueError, match=r"unknown kernel 'toy_plugni'; did you mean 'toy_plugin'\? known: "):
        fastattn.options(kernels=["+toy_plugni"])
    assert MODULE not in sys.modules


@pytest.mark.parametrize("source, attribute, reason", [
    ("raise RuntimeError('no such GPU')", "KERNEL", "RuntimeError: no such GPU"),
    ("import a_module_that_is_not_there", "KERNEL", "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
    (SOURCE, "ABSENT", "AttributeError"),
    (SOURCE, "NO_KERNEL", f"entry point {MODULE}:NO_KERNEL is a str, not a fastattn.kernels.Kernel"),
])  # fmt: skip
def test_a_broken_plugin_is_a_reason(install, source, attribute, reason):
    install({"toy_plugin": attribute}, source)
    q, k, v = qkv(64)
    with pytest.raises(NoKernelError) as raised:
        fastattn.attention(q, k, v, kernel="toy_plugin")
    assert reason in str(raised.value) and "test-plugin" in str(raised.value)
    with fastattn.options(kernels=["+toy_plugin"]):
        check(q, k, v)
        assert reason in (row("toy_plugin", q, k, v).reason or "")


@pytest.mark.parametrize("name", ["default", "torch_flash", "flex", "flash_attn_2"])
def test_a_plugin_cannot_take_a_shipped_name(install, name):
    install({name: "KERNEL"})
    assert registry.plugins() == () and registry.names().count(name) == 1
    [found] = [kernel for kernel in registry.rows_for("cpu", (name,)) if kernel.name == name]
    assert found in registry._shipped()
    assert MODULE not in sys.modules


def test_entry_points_of_other_groups_are_none_of_ours(install, tmp_path):
    install({"toy_plugin": "KERNEL"})
    (tmp_path / "test_plugin-1.2.dist-info" / "entry_points.txt").write_text(
        f"[other.group]\ntoy_plugin = {MODULE}:KERNEL\n"
    )
    forget()
    assert "toy_plugin" not in registry.names()
