"""A kind of source in miniature: tables of tab-separated columns, ``*.tsv``.

This is the whole errand: one file like this one in ``src/steppe/data/``, and one line in
``sources.OPENERS``. Training, measuring and the command line then take the data by its name.
"""

from __future__ import annotations

import csv
from pathlib import Path

import datasets

from steppe.data.opened import WHOLE, Opened, Opener
from steppe.data.read_errors import unreadable
from steppe.errors import DataError


def _takes(data: str, path: Path) -> bool:
    """Files of this ending."""
    return path.suffix == ".tsv" and path.is_file()


def _open(data: str, path: Path, streaming: bool) -> Opened:
    """One split of rows, by the names in the first line."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise unreadable(f"{data}: cannot be read", error) from None
    if any(None in row or None in row.values() for row in rows):
        raise DataError(f"{data}: expected as many columns in each line as in the first")
    table = datasets.Dataset.from_list(rows)
    return Opened({WHOLE: table.to_iterable_dataset() if streaming else table}, is_local=True)


TSV = Opener("tsv", _takes, _open)
