"""What must hold for the built site, beyond what ``mkdocs build --strict`` sees.

python docs/site/check.py FOLDER
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from names import public_names

# What a browser loads by itself, by tag; `link` may also only name something (rel=canonical).
_LOADS = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "object": "data",
    "embed": "src",
}
_LOADING_LINKS = ("stylesheet", "icon", "preload", "modulepreload", "manifest", "prefetch")
_OF_CSS = re.compile(r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')\s]+)""")


@dataclass
class Page(HTMLParser):
    """The anchors of a page, its links, and what it loads."""

    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Begin to read."""
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag names."""
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if values.get(name)}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        loads = _LOADS.get(tag)
        if tag == "link" and set(values.get("rel", "").split()) & set(_LOADING_LINKS):
            loads = "href"
        if loads and values.get(loads):
            self.loaded.append(values[loads])
        self.loaded += [part.split()[0] for part in values.get("srcset", "").split(",") if part]
        self.loaded += _OF_CSS.findall(values.get("style", ""))


def problems(site: Path) -> list[str]:
    """A line for each fault of a site; none if it is in order."""
    pages = {path: _read(path) for path in sorted(site.rglob("*.html"))}
    anchors = {path.resolve(): page.anchors for path, page in pages.items()}
    found = []
    for path, page in pages.items():
        name = path.relative_to(site).as_posix()
        found += [f"{name}: loads {url}" for url in page.loaded if _is_foreign(url)]
        missing = [] if name == "404.html" else _dead(path, page, anchors)  # its links begin at /
        found += [f"{name}: leads to nothing: {link}" for link in missing]
    for path in sorted(site.rglob("*.css")):
        urls = _OF_CSS.findall(path.read_text(encoding="utf-8"))
        found += [f"{path.relative_to(site).as_posix()}: loads {url}" for url in urls]
    return found + _undocumented(site, pages)


def _read(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def _is_foreign(url: str) -> bool:
    return bool(urlsplit(url).netloc)


def _dead(path: Path, page: Page, anchors: dict[Path, set[str]]) -> list[str]:
    """The links and files of a page that are not there."""
    dead = []
    for link in {*page.links, *page.loaded}:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path.resolve()
        if not target.is_file() or (
            parts.fragment and unquote(parts.fragment) not in anchors.get(target, set())
        ):
            dead.append(link)
    return sorted(dead)


def _undocumented(site: Path, pages: dict[Path, Page]) -> list[str]:
    """The public names that the reference does not have, and those without a docstring."""
    shown = {
        anchor
        for path, page in pages.items()
        if path.parent == site / "reference"
        for anchor in page.anchors
    }
    names = public_names()
    return [f"{name.path}: not in the reference" for name in names if name.path not in shown] + [
        f"{name.path}: no docstring" for name in names if not name.summary
    ]


if __name__ == "__main__":
    lines = problems(Path(sys.argv[1]))
    print("\n".join(lines) or "in order")
    sys.exit(bool(lines))
