"""docs/glossary.md is kept: a word that it has retired is used nowhere in src/ and docs/ but in its last column.

There a plain word is retired altogether, in sentences and as a part of a name; a `word` in code only as a name.
"""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GLOSSARY = ROOT / "docs" / "glossary.md"
SOURCES = sorted((ROOT / "src").rglob("*.py"))
PAGES = sorted((ROOT / "docs").glob("*.md"))
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")  # "_TrialInProgress" is three of them


def read(page):
    """What the last column of the tables that end in "no longer" holds; and the page without that column."""
    retired, kept, is_kept = [], [], False
    for line in page.splitlines():
        cells = line.split("|") if line.startswith("|") else []
        is_kept = len(cells) > 2 and (is_kept or cells[-2].strip() == "no longer")
        if is_kept:
            retired += [item.strip() for item in cells[-2].split(",")]
        kept.append("|".join(cells[:-2]) if is_kept else line)
    return [item for item in retired if item.strip("- ") not in ("", "no longer")], "\n".join(kept)


RETIRED, _ = read(GLOSSARY.read_text(encoding="utf-8"))
WORDS = {item for item in RETIRED if not item.startswith("`")}
NAMES = {item.strip("`") for item in RETIRED if item.startswith("`")}


def singular(word):
    word = word.lower()
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def words_of(text):
    return {singular(word) for word in WORD.findall(text)}


def names_of(path):
    """Every identifier of a module, and its own name."""
    with tokenize.open(path) as source:
        tokens = tokenize.generate_tokens(io.StringIO(source.read()).readline)
        return {path.stem, *(token.string for token in tokens if token.type == tokenize.NAME)}


def code_in(page):
    """What stands in code on a page: its blocks, and its spans."""
    return " ".join([*re.findall(r"^```.*?^```", page, re.M | re.S), *re.findall(r"`([^`\n]+)`", page)])


def test_the_glossary_retires_words_and_names():
    assert {"quirk", "tombstone"} <= WORDS and {"would", "chain"} <= NAMES
    assert all(re.fullmatch(r"[a-z]+|`\w+`", item) for item in RETIRED), RETIRED
    assert len(RETIRED) == len(set(RETIRED))


def test_a_retired_word_is_seen_wherever_it_hides():
    page = "| word | meaning | no longer |\n|---|---|---|\n| known fault | x | quirk, `would` |\n\nquirk\n\n| a | quirks |\n"
    retired, rest = read(page)
    assert retired == ["quirk", "`would`"]
    assert rest.count("quirk") == 2 and "would" not in rest
    assert {"quirk", "front"} <= words_of("_KnownQuirks and front_door")
    assert words_of("tombstones Race") == {"tombstone", "race"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src" / "fastattn")))
def test_no_retired_word_in_the_source(path):
    assert words_of(f"{path.stem} {path.read_text(encoding='utf-8')}") & WORDS == set()
    assert names_of(path) & NAMES == set()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_no_retired_word_on_a_page(path):
    _, page = read(path.read_text(encoding="utf-8"))
    assert words_of(page) & WORDS == set()
    assert set(re.findall(r"\w+", code_in(page))) & NAMES == set()


def test_a_probe_is_data_that_breaks_kernels_and_never_a_guard():
    dispatch = [path for path in SOURCES if path.parent.name == "dispatch"]
    assert [path.name for path in dispatch if "probe" in words_of(path.read_text(encoding="utf-8"))] == []
