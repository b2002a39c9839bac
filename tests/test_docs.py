"""Every python block of the README and the docs runs, each in a fresh namespace."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").glob("*.md") if p.name != "adding-a-kernel.md")]


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


BLOCKS = [pytest.param(code, id=f"{page.name}-{i}") for page in PAGES for i, code in enumerate(blocks(page))]


@pytest.mark.parametrize("code", BLOCKS)
def test_a_block_runs(code, monkeypatch):
    for library in re.findall(r"^(?:from|import) (diffusers|timm)\b", code, re.M):
        pytest.importorskip(library, reason=f"{library} is not installed", exc_type=ImportError)
    monkeypatch.setenv("FASTATTN_LOG", "error")
    exec(compile(code, "block", "exec"), {"__name__": "block"})


def test_the_page_of_kernels_says_what_the_rows_say():
    maker = runpy.run_path(str(ROOT / "docs" / "make_kernels.py"))
    assert (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8") == maker["page"](), "python docs/make_kernels.py"


def test_the_page_of_masks_shows_what_the_masks_are():
    maker = runpy.run_path(str(ROOT / "docs" / "make_masks.py"))
    assert (ROOT / "docs" / "masks.md").read_text(encoding="utf-8") == maker["page"](), "python docs/make_masks.py"


def test_the_page_of_faults_says_what_the_tests_say():
    maker = runpy.run_path(str(ROOT / "docs" / "make_reliability.py"))
    assert (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8") == maker["page"](), (
        "python docs/make_reliability.py"
    )


def test_a_fault_without_a_sentence_is_refused():
    maker = runpy.run_path(str(ROOT / "docs" / "make_reliability.py"))
    for docstring in ("", '"""no full stop"""; '):
        [test] = ast.parse(f"def test_fault_99_x(): {docstring}pass").body
        with pytest.raises(ValueError, match="test_fault_99_x"):
            maker["what_holds"]("tests/x.py", test)
    [test] = ast.parse('def test_fault_99_x():\n    """It is a | b in F.sdpa,\n    always. Not more."""').body
    assert maker["what_holds"]("tests/x.py", test) == "It is a \\| b in F.sdpa, always."


def test_the_readme_has_blocks():
    assert blocks(ROOT / "README.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8"))
    # docs/adding-a-kernel.md has its own test
    missing = [link for link in links if not (page.parent / link).exists() and not link.endswith("adding-a-kernel.md")]
    assert missing == []
