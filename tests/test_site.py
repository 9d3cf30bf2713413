"""The site is built whole: every public name, every link, nothing from another host."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import steppe
from test_docs import BLOCK
from test_readme import ROOT

DOCS = ROOT / "docs"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The scripts of the site by name, as mkdocs imports them."""
    monkeypatch.syspath_prepend(DOCS / "site")
    import check
    import links
    import names

    return SimpleNamespace(check=check, links=links, names=names)


def write_site(folder: Path, names: ModuleType, **pages: str) -> Path:
    """A site in order, with pages of one's own."""
    (folder / "reference").mkdir()
    anchors = "".join(f'<h2 id="{name.path}"></h2>' for name in names.public_names())
    (folder / "reference" / "all.html").write_text(anchors, encoding="utf-8")
    for name, html in pages.items():
        (folder / f"{name}.html").write_text(html, encoding="utf-8")
    return folder


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """The build ends with `check.problems`, and fails if there is one."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for page in ("index", "results", "reference/measures", "guides/serve", "troubleshooting"):
        assert "</html>" in (tmp_path / "site" / f"{page}.html").read_text(encoding="utf-8")
    notebook = (tmp_path / "site" / "examples" / "why_is_it_sparse.html").read_text("utf-8")
    pictures = re.findall('<img [^>]*src="([^"]+[.]png)"', notebook)
    assert len(pictures) == 2
    assert all((tmp_path / "site" / "examples" / picture).is_file() for picture in pictures)
    home = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert re.search('<a [^>]*href="reference/plugins.html#steppe.RisingThreshold"', home)
    assert "site/iframe-worker.js" in home
    assert "<!-- speed" not in home
    assert "PyTorch ≥ 2.8: every verb is run on Python" in home
    index = (tmp_path / "site" / "search" / "search_index.js").read_text(encoding="utf-8")
    assert "RisingThreshold" in index


def test_the_public_names_are_those_of_the_package(scripts: SimpleNamespace) -> None:
    found = scripts.names.public_names()
    paths = {name.path for name in found}
    assert {f"steppe.{name}" for name in steppe.__all__} <= paths
    for module in ("plugins", "measures", "checkpoints", "training"):
        exported = __import__(f"steppe.{module}", fromlist=["__all__"]).__all__
        assert {name for name in exported if f"steppe.{module}.{name}" not in paths} <= {
            name for name in exported if f"steppe.{name}" in paths
        }
    assert "steppe.training.lightning.LightningCallback" in paths
    assert "steppe.ops.products.spmm" in paths
    assert [name.path for name in found if not name.summary] == []


def test_what_the_pages_import_is_in_the_reference(scripts: SimpleNamespace) -> None:
    paths = {name.path for name in scripts.names.public_names()}
    missing = []
    for page in [ROOT / "README.md", *DOCS.rglob("*.md")]:
        for _, kind, code, _ in BLOCK.findall(page.read_text(encoding="utf-8")):
            for node in ast.walk(ast.parse(code if kind == "python" else "")):
                if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("steppe."):
                    named = [f"{node.module}.{alias.name}" for alias in node.names]
                    short = [f"steppe.{alias.name}" for alias in node.names]
                    both = zip(named, short, strict=True)
                    missing += [one for one, other in both if not {one, other} & paths]
    assert missing == []


def test_every_page_is_in_the_navigation(scripts: SimpleNamespace) -> None:
    told = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r"(\S+\.md)$", told, re.MULTILINE)
    here = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert len(listed) == len(set(listed))
    elsewhere = {**scripts.links.ROOT_PAGES, **scripts.links.NOTEBOOKS}
    assert set(listed) - here == set(elsewhere.values())
    assert here - set(listed) == set()


def test_a_site_in_order_has_no_problems(tmp_path: Path, scripts: SimpleNamespace) -> None:
    page = (
        '<h1 id="top"></h1><a href="#top">up</a><a href="https://a.org">there</a><img src="a.png">'
    )
    (tmp_path / "a.png").touch()
    site = write_site(tmp_path, scripts.names, a=page)
    assert scripts.check.problems(site) == []


@pytest.mark.parametrize(
    ("html", "problem"),
    [
        ('<script src="https://a.org/x.js">', "a.html: loads https://a.org/x.js"),
        ('<link rel="stylesheet" href="//a.org/x.css">', "a.html: loads //a.org/x.css"),
        ('<img srcset="https://a.org/x.png 2x">', "a.html: loads https://a.org/x.png"),
        ('<p style="background: url(https://a.org/x)">', "a.html: loads https://a.org/x"),
        ('<a href="b.html">', "a.html: leads to nothing: b.html"),
        ('<a href="#there">', "a.html: leads to nothing: #there"),
        ('<a href="reference/all.html#x">', "a.html: leads to nothing: reference/all.html#x"),
        ('<img src="no.png">', "a.html: leads to nothing: no.png"),
    ],
)
def test_a_problem_is_found(
    html: str, problem: str, tmp_path: Path, scripts: SimpleNamespace
) -> None:
    assert scripts.check.problems(write_site(tmp_path, scripts.names, a=html)) == [problem]


def test_fonts_of_another_host_are_found(tmp_path: Path, scripts: SimpleNamespace) -> None:
    site = write_site(tmp_path, scripts.names)
    (site / "a.css").write_text("@import 'https://a.org/font.css';", encoding="utf-8")
    assert scripts.check.problems(site) == ["a.css: loads https://a.org/font.css"]


def test_a_name_that_is_missing_or_has_no_docstring_is_found(
    tmp_path: Path, scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = write_site(tmp_path, scripts.names)
    more = (*scripts.names.public_names(), scripts.names.PublicName("steppe.new", "blocks", ""))
    monkeypatch.setattr(scripts.check, "public_names", lambda: more)
    assert scripts.check.problems(site) == [
        "steppe.new: not in the reference",
        "steppe.new: no docstring",
    ]


def test_links_lead_to_pages_of_the_site(scripts: SimpleNamespace) -> None:
    def moved(page: str, link: str) -> str:
        return scripts.links.in_the_site(page, link, {"theory.md": "Why"})

    assert moved("index.md", "[x](docs/theory.md#setting)") == "[x](theory.md#setting)"
    assert moved("index.md", "[docs/theory.md](docs/theory.md)") == "[Why](theory.md)"
    assert moved("index.md", "![x](docs/results/demo.png)") == "![x](results/demo.png)"
    assert moved("guides/serve.md", "[x](../../README.md)") == "[x](../index.md)"
    assert moved("scale.md", "[x](scale.py)") == "[x](source/docs/scale.py.md)"
    for kept in ("[x](https://a.org)", "[x](#here)", "[x](nowhere.md)", "```\n[x](scale.py)\n```"):
        assert moved("scale.md", kept) == kept
    marked = (
        "<!-- a: b -->1<!-- end -->\nc <!-- d -->2<!-- end -->\n<!-- e -->\n| f |\n<!-- end -->\n"
    )
    assert moved("index.md", marked) == "1\nc 2\n| f |\n"


def test_the_reasons_that_troubleshooting_quotes_are_those_of_the_code() -> None:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| `([^`]+)` \|", text.partition("| the reason in `explain` |")[2], re.MULTILINE
    )
    source = " ".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "src/steppe").rglob("*.py")
    )
    joined = re.sub(r'"\s+f?"', "", source)
    parts = [part.strip() for row in rows for part in row.split("…") if len(part.strip()) > 2]
    assert len(parts) >= 12
    assert [part for part in parts if part not in joined] == []
