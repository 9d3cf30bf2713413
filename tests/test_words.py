"""One word per idea: the glossary of CONTRIBUTING.md, and the how-tos, hold for the whole tree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOWTOS = sorted((ROOT / "docs" / "howto").glob("*.md"))
ENDINGS = ("py", "h", "cpp", "def", "md", "yaml", "html")
# Words that glossary rows cannot name, since they have no one term that replaces them.
HOME_MADE = ("anew", "likewise", "so to speak")


def glossary() -> dict[str, tuple[str, list[str]]]:
    """Term → its place in the package, and the words that it replaces."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = text.partition("| term |")[2].partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {
        term: (place.strip("`"), [word.strip() for word in words.split(",") if word.strip()])
        for term, _, place, words in cells
    }


def texts() -> dict[str, str]:
    """The code and the documents, by path."""
    folders = [ROOT / "src", ROOT / "docs"]
    paths = [path for folder in folders for end in ENDINGS for path in folder.rglob(f"*.{end}")]
    return {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
        for path in [*paths, ROOT / "README.md"]
    }


def uses_of(word: str, found: dict[str, str]) -> list[str]:
    """Where a word stands, with a plural ending or none."""
    search = re.compile(rf"\b{re.escape(word)}s?\b", re.IGNORECASE)
    return [
        f"{path}:{number}: {line.strip()}"
        for path, text in found.items()
        for number, line in enumerate(text.splitlines(), 1)
        if search.search(line)
    ]


def test_every_term_has_a_place_that_exists() -> None:
    terms = glossary()
    assert len(terms) > 20
    for term, (place, _) in terms.items():
        assert (ROOT / "src" / "steppe" / place).exists(), f"{term}: {place}"


@pytest.mark.parametrize(
    "word", sorted({word for _, words in glossary().values() for word in words} | set(HOME_MADE))
)
def test_the_words_that_were_replaced_are_gone(word: str) -> None:
    assert uses_of(word, texts()) == []


def test_the_search_for_words_can_fail() -> None:
    found = {"a.py": "x = 1\n# Two Habits of a block\n", "b.md": "inhabitants"}
    assert uses_of("habit", found) == ["a.py:2: # Two Habits of a block"]


def test_there_is_a_how_to_for_each_errand() -> None:
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert [path.name for path in HOWTOS] == sorted(re.findall(r"\(docs/howto/(\w+\.md)\)", guide))
    assert len(HOWTOS) == 7


@pytest.mark.parametrize("path", HOWTOS, ids=lambda path: path.stem)
def test_a_how_to_is_short_and_names_only_what_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert 10 <= len(text.splitlines()) <= 25
    named = re.findall(r"`((?:src|tests|docs|benchmarks)/[^` ]+)`", text)
    assert any(name.startswith("tests/howto/") for name in named)
    assert [name for name in named if not (ROOT / name).exists()] == []
    for script in re.findall(r"`python (\S+\.py)", text):
        assert (ROOT / script).is_file(), script
