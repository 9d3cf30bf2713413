"""The supported versions are those with which every verb ran."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = json.loads((ROOT / "docs/results/versions.json").read_text(encoding="utf-8"))["rows"]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
versions_sentence = runpy.run_path(str(ROOT / "docs/render.py"))["versions_sentence"]


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split("."))


def setting(pattern: str) -> str:
    """What stands in pyproject.toml."""
    (found,) = re.findall(pattern, PROJECT, re.MULTILINE)
    return found


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda row: f"python {row['python']}, torch {row['torch']}"
)
def test_every_verb_is_in_order(row: dict) -> None:
    assert len(row["verbs"]) > 20
    wrong = {verb: what for verb, what in row["verbs"].items() if not what.startswith("ok")}
    assert wrong == {}


def test_the_floors_are_the_oldest_that_were_run() -> None:
    torch_floor = setting(r'^  "torch>=([\d.]+)",')
    python_floor = setting(r'^requires-python = ">=([\d.]+)"')
    pairs = {(row["python"], row["torch"]) for row in ROWS}
    oldest_torch = min((torch for _, torch in pairs), key=numbers)
    assert numbers(oldest_torch)[:2] == numbers(torch_floor)
    assert (python_floor, oldest_torch) in pairs
    assert min(numbers(python) for python, _ in pairs) == numbers(python_floor)


def test_the_recorded_calls_are_those_of_the_oldest_torch() -> None:
    floor = json.loads((ROOT / "tests/versions/floor.json").read_text(encoding="utf-8"))
    assert floor["torch"] == min((row["torch"] for row in ROWS), key=numbers)


def test_no_pair_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each minor version of torch from the floor to the newest, and the ends with each Python."""
    monkeypatch.syspath_prepend(ROOT / "tests/versions")  # a script, with another beside it
    pairs = runpy.run_path(str(ROOT / "tests/versions/run.py"))["PAIRS"]
    ran = {(row["python"], row["torch"]) for row in ROWS}
    assert set(pairs) <= ran
    minors = sorted({numbers(torch)[:2] for _, torch in pairs})
    assert minors == [(2, minor) for minor in range(minors[0][1], minors[-1][1] + 1)]


def test_the_sentence_names_only_what_ran() -> None:
    rows = [
        {"python": "3.9", "torch": "2.7.0", "verbs": {"import": "TypeError"}},
        {"python": "3.12", "torch": "2.10.0", "verbs": {"import": "ok"}},
        {"python": "3.10", "torch": "2.9.1", "verbs": {"import": "ok"}},
        {"python": "3.13", "torch": "2.9.1", "verbs": {"import": "ok", "watch": "left out"}},
    ]
    assert versions_sentence({"rows": rows}) == (
        "Python ≥ 3.10, PyTorch ≥ 2.9: every verb is run on Python 3.10 and 3.12 with PyTorch"
        " 2.9.1 and 2.10.0"
    )
