"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table_lines(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table.

    Args:
        headings: of the columns.
        rows: the cells of each.

    Example:
        >>> table_lines(["arm", "loss"], [["a", "1.0"]])
        ['| arm | loss |', '|---|---|', '| a | 1.0 |']
    """
    lines = [f"| {' | '.join(cells)} |" for cells in (headings, *rows)]
    return [lines[0], "|" + "---|" * len(headings), *lines[1:]]


def code(text: str) -> str:
    """A word as code; its parts may be broken into lines at the commas.

    Args:
        text: without backticks.

    Example:
        >>> code("digits,size=wide")
        '`digits` `size=wide`'
    """
    return " ".join(f"`{part}`" for part in text.split(",")) if text else ""
