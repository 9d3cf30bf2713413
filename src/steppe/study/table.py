"""The result of a study as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from steppe.study.cells import cells_of, headings_of
from steppe.study.compare import Row, best_groups, groups_of
from steppe.tables import FittingTable


def study_table(rows: Sequence[Row]) -> FittingTable:
    """Each arm at the setting with its best quality, compared with the baseline.

    Args:
        rows: of one study, at least one.

    Returns:
        A table of means with 95 % intervals; below each the change, with * where its interval
        leaves no change out.
    """
    groups = best_groups(groups_of(rows))
    title = str(rows[0]["study"])
    if any(row.get("is_quick") for row in rows):
        title += ": a quick look of a few steps, these numbers mean nothing"
    texts, numbers = headings_of(groups)
    table = FittingTable(title, "* the 95 % interval of the change leaves no change out")
    table.add_texts(*texts)
    table.add_numbers(*(heading.replace(" ", "\n", 1) for heading in numbers))
    for index, group in enumerate(groups):
        if index and group.recipe != groups[index - 1].recipe:
            table.add_section()
        names, cells = cells_of(group, groups, str(rows[-1]["baseline"]), len(texts) > 2)
        shown = [
            f"{cell.text}\n{cell.change}{' *' if cell.is_sure else ''}".strip() for cell in cells
        ]
        table.add_row(*names, *shown)
    return table
