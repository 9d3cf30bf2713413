"""The notebooks of examples/ as pages, with the outputs and pictures that were saved with them."""

from __future__ import annotations

import posixpath

from links import NOTEBOOKS, ROOT
from nbconvert import MarkdownExporter
from nbconvert.filters import strip_ansi


def notebook_pages() -> tuple[dict[str, str], dict[str, bytes]]:
    """The pages and their pictures, by their paths in the site."""
    exporter = MarkdownExporter()
    pages, pictures = {}, {}
    for file, page in NOTEBOOKS.items():
        folder, name = posixpath.split(page.removesuffix(".md"))
        resources = {"output_files_dir": name, "unique_key": name}
        text, found = exporter.from_filename(str(ROOT / file), resources)
        pages[page] = strip_ansi(text)
        pictures |= {posixpath.join(folder, path): data for path, data in found["outputs"].items()}
    return pages, pictures
