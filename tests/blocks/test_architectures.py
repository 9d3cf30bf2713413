"""Every architecture: all its MLPs found and right in every check, or what is missing is said.

The table of docs/models.md is of the same checks: what one has to say is compared with it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from architectures import ARCHITECTURES, SLOW, Architecture
from checks import CHECKS, checks_of
from pages import load_page
from test_readme import ROOT

models = load_page("models")
# What is wrong and known to be.
KNOWN: set[tuple[str, str]] = set()


def cases() -> Iterator[object]:
    for one in ARCHITECTURES:
        marks = [pytest.mark.slow] if one.name in SLOW else []
        for check in checks_of(one):
            yield pytest.param(one, check, id=f"{one.name}-{check}", marks=marks)


@pytest.mark.parametrize(("one", "check"), list(cases()))
@pytest.mark.filterwarnings("ignore::steppe.IncompleteCoverageWarning")
def test_what_is_said_is_in_the_table(one: Architecture, check: str) -> None:
    table = {row["name"]: row["checks"] for row in models.result()["rows"]}
    if (one.name, check) in KNOWN:
        with pytest.raises(AssertionError):
            CHECKS[check](one)
        return
    assert CHECKS[check](one) == table[one.name][check], "make it anew: python docs/models.py"


def test_the_table_has_every_architecture_and_nothing_wrong() -> None:
    rows = models.result()["rows"]
    names = [(row["name"], row["mlps"], row["covered"]) for row in rows]
    assert names == [(one.name, one.mlps, one.covered) for one in ARCHITECTURES]
    wrong = {
        (row["name"], check)
        for row in rows
        for check, said in row["checks"].items()
        if said.startswith(models.WRONG)
    }
    assert wrong == KNOWN
    assert {one.name for one in ARCHITECTURES} >= SLOW


def test_the_page_is_of_the_result() -> None:
    page = models.PAGE.read_text(encoding="utf-8")
    assert models.render(page) == page
    assert models.render(page.replace("| yes |", "| gone |")) == page
    assert (ROOT / "docs" / "models.md").samefile(models.PAGE)
