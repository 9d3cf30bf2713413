"""What the site needs beyond mkdocs: the README as a page, the reference, and checks of the result.

mkdocs calls these functions by their names while it builds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from check import problems
from links import ROOT, ROOT_PAGES, in_the_site, linked_files, page_of, source_page
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from names import public_names
from notebooks import notebook_pages
from reference import reference_pages

_REFERENCE = reference_pages()
_IDENTIFIERS = {name.path.rpartition(".")[2]: name.path for name in public_names()} | {
    name.path: name.path for name in public_names()
}
_TAG = re.compile(r"(</?(?:a|pre|h\d)\b[^>]*>)")
_CODE = re.compile(r"<code>((?:steppe\.)?[\w.]+)(\([^<]*\))?</code>")


def on_config(config: Any) -> Any:
    """Put the pages of the reference into the navigation."""
    part = next(entry["Reference"] for entry in config.nav if "Reference" in entry)
    part[:0] = [{title: path} for path, (title, _) in _REFERENCE.items()]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are no files of docs/."""
    pages = {path: markdown for path, (_, markdown) in _REFERENCE.items()}
    for file, path in ROOT_PAGES.items():
        pages[path] = (ROOT / file).read_text(encoding="utf-8")
    notebooks, pictures = notebook_pages()
    pages |= notebooks
    texts = {one.src_uri: one.content_string for one in files.documentation_pages()} | pages
    linked = {file for path, text in texts.items() for file in linked_files(path, text)}
    pages |= {page_of(file): source_page(file) for file in sorted(linked)}
    for path, content in (pages | pictures).items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links to files of the repository into links to pages."""
    return in_the_site(page.file.src_uri, markdown, dict(_titles(config.nav)))


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Link the public names to their reference."""
    is_reference = page.file.src_uri.startswith("reference/")
    return "".join(_linked(html, is_reference))


def on_post_build(config: Any) -> None:
    """Refuse a site with a fault that mkdocs does not see."""
    found = problems(Path(config.site_dir))
    if found:
        raise PluginError("\n".join(["the site is not in order:", *found]))


def _titles(entries: list[Any]) -> Iterator[tuple[str, str]]:
    """The pages of the navigation and their titles in it."""
    for entry in entries:
        for title, inner in entry.items() if isinstance(entry, dict) else ():
            if isinstance(inner, str):
                yield inner, title
            else:
                yield from _titles(inner)


def _linked(html: str, is_reference: bool) -> Iterator[str]:
    """The pieces of a page, with names outside of links, headings and blocks of code linked.

    On other pages than those of the reference a word such as `measure` may be a subcommand too, so
    only what can be nothing else is linked: with a dot, brackets, a capital or a last underscore.
    """

    def link(code: re.Match[str]) -> str:
        name = code[1]
        is_plain = re.fullmatch(r"[a-z]+", name) and not code[2]
        if name not in _IDENTIFIERS or (is_plain and not is_reference):
            return code[0]
        return f'<autoref identifier="{_IDENTIFIERS[name]}">{code[0]}</autoref>'

    depth = 0
    for piece in _TAG.split(html):
        if _TAG.fullmatch(piece):
            depth += -1 if piece.startswith("</") else 1
            yield piece
        else:
            # GitHub needs the backslash in a cell of a table, Python-Markdown shows it.
            yield piece if depth else _CODE.sub(link, piece.replace("\\|", "|"))
