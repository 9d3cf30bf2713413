"""The notebooks of examples/ as they are saved; `make examples` runs them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from test_readme import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
LINK = re.compile(r"\]\((?!\w+:)([^)#]+)")


def cells(notebook: Path, kind: str) -> list[dict[str, Any]]:
    saved = json.loads(notebook.read_text(encoding="utf-8"))
    return [cell for cell in saved["cells"] if cell["cell_type"] == kind]


def outputs(notebook: Path) -> list[dict[str, Any]]:
    return [output for cell in cells(notebook, "code") for output in cell["outputs"]]


def test_there_are_notebooks_and_the_list_has_them() -> None:
    told = LINK.findall((ROOT / "examples" / "README.md").read_text(encoding="utf-8"))
    assert {path.name for path in NOTEBOOKS} == {name for name in told if name.endswith(".ipynb")}
    assert len(NOTEBOOKS) == 4


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_was_saved_after_it_had_run_once_from_top_to_bottom(notebook: Path) -> None:
    counts = [cell["execution_count"] for cell in cells(notebook, "code")]
    assert counts == list(range(1, len(counts) + 1))
    shown = outputs(notebook)
    assert [output for output in shown if output["output_type"] == "error"] == []
    assert [output for output in shown if output.get("name") == "stderr"] == []
    pictures = [output for output in shown if "image/png" in output.get("data", {})]
    assert pictures
    assert notebook.stat().st_size < 500_000


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_says_nothing_of_the_machine_it_ran_on(notebook: Path) -> None:
    saved = notebook.read_text(encoding="utf-8")
    assert re.findall(r"/(?:home|root|tmp|work|usr)/\S+", saved) == []
    assert "\\u001b[?25" not in saved  # a progress bar, drawn for a terminal


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_links_lead_somewhere(notebook: Path) -> None:
    text = "\n".join("".join(cell["source"]) for cell in cells(notebook, "markdown"))
    links = LINK.findall(text)
    assert links
    assert [link for link in links if not (notebook.parent / link).exists()] == []
