"""Tables for terminals of any width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from steppe.printable import printable

_NARROW = 10  # columns of the terminal in which a text stays readable when it is folded
_UNBOUNDED = 10_000


class FittingTable:
    """A table in which no number is cut.

    Texts are folded where the terminal is narrow. If the numbers do not fit either, the table goes
    on below with the columns that are left, behind the texts that it begins with.

    Args:
        title: of any origin.
        caption: below the table.
        is_tight: whether one space is between columns, not two.
    """

    def __init__(self, title: str = "", caption: str = "", is_tight: bool = False) -> None:
        self._title = title
        self._caption = caption
        self._is_tight = is_tight
        self._columns: list[_Column] = []
        self._section_ends: set[int] = set()
        self._rows = 0

    def add_texts(self, *headings: str) -> None:
        """Add columns of texts, which may be folded."""
        self._columns += [_Column(heading, is_number=False) for heading in headings]

    def add_numbers(self, *headings: str) -> None:
        """Add columns of numbers, or of words that stay whole."""
        self._columns += [_Column(heading, is_number=True) for heading in headings]

    def add_row(self, *cells: str) -> None:
        """Add a row, with a cell for each column."""
        for column, cell in zip(self._columns, cells, strict=True):
            column.cells.append(cell)
        self._rows += 1

    def add_section(self) -> None:
        """Draw a line below the last row."""
        self._section_ends.add(self._rows - 1)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """From its narrowest part to the whole side by side."""
        whole = Measurement.get(console, _unbounded(options), self._part(self._columns)).maximum
        return Measurement(min(whole, options.max_width), min(whole, options.max_width))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table, in as many parts as the width of the terminal asks for."""
        *parts, last = self._parts(console, options)
        for index, part in enumerate((*parts, last)):
            title = self._title if index == 0 else ""
            caption = self._caption if part is last else ""
            yield self._part(part, title, caption)

    def _parts(self, console: Console, options: ConsoleOptions) -> list[list[_Column]]:
        """The columns of each part."""
        numbers = [index for index, column in enumerate(self._columns) if column.is_number]
        keys = self._columns[: numbers[0] if numbers else None]
        parts = [keys]
        for column in self._columns[len(keys) :]:
            part = [*parts[-1], column]
            narrow = self._part(part, most=_NARROW)
            needed = Measurement.get(console, _unbounded(options), narrow).maximum
            if needed <= options.max_width or len(part) == len(keys) + 1:
                parts[-1] = part
            else:
                parts.append([*keys, column])
        return parts

    def _part(
        self,
        columns: Sequence[_Column],
        title: str = "",
        caption: str = "",
        most: int | None = None,
    ) -> Table:
        """Rich's table of some columns, with texts of so many characters in a line at most."""
        table = Table(
            title=Text(printable(title)) if title else None,
            title_justify="left",
            caption=Text(printable(caption)) if caption else None,
            caption_style="",
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            padding=0 if self._is_tight else (0, 1),
            collapse_padding=True,
            pad_edge=False,
        )
        for column in columns:
            if column.is_number:
                table.add_column(column.heading, justify="right", no_wrap=True)
            else:
                table.add_column(column.heading, overflow="fold", max_width=most)
        for row in range(self._rows):
            cells = [Text(printable(column.cells[row])) for column in columns]
            table.add_row(*cells, end_section=row in self._section_ends)
        return table


@dataclass
class _Column:
    """One column."""

    heading: str
    is_number: bool
    cells: list[str] = field(default_factory=list)


def _unbounded(options: ConsoleOptions) -> ConsoleOptions:
    return options.update(width=_UNBOUNDED)
