"""Tables: no number is cut, however narrow the terminal, and no text is read as markup."""

from __future__ import annotations

import re

import pytest
from rich.console import Console
from rich.table import Table

from steppe.tables import FittingTable

NAMES = ["model.decoder.layers.0.mlp.dense", "[/red]model.layers[1]:smile:"]
NUMBERS = [[f"{10 * row + column}.{column}25" for column in range(7)] for row in range(2)]
HEADINGS = [f"density {column}\n%" for column in range(7)]


def text_of(table: FittingTable | Table, width: int) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def example() -> FittingTable:
    table = FittingTable("title of [/red]", caption="caption of [/red]")
    table.add_texts("block")
    table.add_numbers(*HEADINGS)
    table.add_texts("why")
    for name, numbers in zip(NAMES, NUMBERS, strict=True):
        table.add_row(name, *numbers, "a reason of some words")
    return table


def words_of(text: str) -> list[str]:
    return text.split()


@pytest.mark.parametrize("width", [22, 30, 40, 60, 80, 100, 200])
def test_every_number_is_whole_once_and_the_lines_fit(width: int) -> None:
    text = text_of(example(), width)
    for number in (number for numbers in NUMBERS for number in numbers):
        assert words_of(text).count(number) == 1
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert text.count("title of") == 1
    assert text.count("caption of") == 1


def test_a_table_of_rich_cuts_them() -> None:
    table = Table()
    table.add_column("block", no_wrap=True)
    for heading in HEADINGS:
        table.add_column(heading, no_wrap=True)
    for name, numbers in zip(NAMES, NUMBERS, strict=True):
        table.add_row(name.replace("[", r"\["), *numbers)
    assert not set(NUMBERS[0]) <= set(words_of(text_of(table, 60)))


def test_names_stand_before_each_part_whole_or_folded() -> None:
    text = text_of(example(), 200)
    assert all(name in text for name in NAMES)
    assert "title of [/red]" in text
    narrow = text_of(example(), 60)
    folded = "".join(line[1:20].split()[0] for line in narrow.splitlines() if line[1:2] != " ")
    for name in NAMES:
        assert len(re.findall(re.escape(name), folded)) >= 1


def test_a_table_without_numbers_or_rows_prints() -> None:
    table = FittingTable()
    table.add_texts("a", "b")
    assert words_of(text_of(table, 40))[:2] == ["a", "b"]
    table.add_row("x" * 100, "y")
    assert text_of(table, 40).count("x") == 100
