"""Pages of the repository in the site: the README and its kin, and files that a page links to."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Files beside docs/ that are pages of the site.
ROOT_PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "examples/README.md": "examples/index.md",
}
# Those that `docs/site/notebooks.py` makes.
NOTEBOOKS = {
    f"examples/{path.name}": f"examples/{path.stem}.md"
    for path in sorted((ROOT / "examples").glob("*.ipynb"))
}
_PAGES = ROOT_PAGES | NOTEBOOKS
_LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
_COMMENTS = re.compile(r"^<!--[^>\n]*-->\n|<!--.*?-->", re.DOTALL | re.MULTILINE)
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".cff": "yaml"}


def source_of(page: str) -> str:
    """The file of the repository that a page of the site is made from."""
    return {made: file for file, made in _PAGES.items()}.get(page, f"docs/{page}")


def page_of(file: str) -> str:
    """The page of the site that shows a file of the repository."""
    if file in _PAGES:
        return _PAGES[file]
    if file.startswith("docs/") and not file.endswith(".py"):
        return file.removeprefix("docs/")
    return f"source/{file}.md"


def linked_files(page: str, markdown: str) -> Iterable[str]:
    """The files of the repository to which a page links, and which are no pages of the site."""
    for _, target, _ in _LINK.findall(markdown):
        file = _file(page, target)
        if page_of(file).startswith("source/") and (ROOT / file).exists():
            yield file


def in_the_site(page: str, markdown: str, titles: Mapping[str, str]) -> str:
    """The text of a page as the site has it.

    Args:
        page: its path in the site.
        markdown: the text, with links as on GitHub.
        titles: of pages by their path.

    Returns:
        The text with links to pages of the site, which are called by their titles and not by their
        files, and without the marks that other scripts need.
    """
    folder = posixpath.dirname(page)

    def moved(link: re.Match[str]) -> str:
        text, target, anchor = link.groups(default="")
        file = _file(page, target)
        if not (ROOT / file).exists():
            return link[0]  # mkdocs will say so
        if text.endswith(".md"):
            text = titles.get(page_of(file), text)
        return f"[{text}]({posixpath.relpath(page_of(file), folder or '.')}{anchor})"

    return _COMMENTS.sub("", _outside_code(markdown, lambda text: _LINK.sub(moved, text)))


def source_page(file: str) -> str:
    """A page with a file of the repository, or with the files of a folder."""
    path = ROOT / file
    if path.is_file():
        return f"# {file}\n\n{_fenced(path)}"
    shown = [f"## {one.name}\n\n{_fenced(one)}" for one in sorted(path.glob("*.yaml"))]
    return "\n".join([f"# {file}\n", *shown])


def _file(page: str, target: str) -> str:
    """The path below the repository of the file that a link leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source_of(page)), target))


def _fenced(path: Path) -> str:
    return f"~~~~{_LANGUAGES.get(path.suffix, '')}\n{path.read_text(encoding='utf-8')}~~~~\n"


def _outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """A text of which all but the fenced code is changed."""
    parts = re.split(r"(^```.*?^```)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if number % 2 else change(part) for number, part in enumerate(parts))
