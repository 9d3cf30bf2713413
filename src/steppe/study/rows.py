"""The results of a study: JSON lines, one a finished run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from steppe.errors import StudyError
from steppe.files import writing_to

ROW_VERSION = 1
_NEEDED = (
    *("id", "hash", "study", "recipe", "arm", "setting", "seed", "quality"),
    *("density", "training_density", "derivative_density", "seconds", "settings", "versions"),
)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; of several of one run and its settings the last.

    An unfinished last line is left out.

    Args:
        path: JSON lines; without a file there are no rows.

    Raises:
        StudyError: a line is no row; names it.
    """
    if not path.exists():
        return []
    try:
        text = path.read_bytes()
    except OSError as error:
        raise StudyError(f"{path}: cannot be read ({error.strerror})") from None
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for number, line in enumerate(text.split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or row.get("version") != ROW_VERSION:
            raise StudyError(
                f"{path}: line {number} is no row of version {ROW_VERSION}; delete the line, and"
                " its run is done again"
            )
        missing = [key for key in _NEEDED if key not in row]
        if missing:
            raise StudyError(f"{path}: line {number} has no {missing[0]!r}; delete the line")
        rows.pop((row["id"], row["hash"]), None)
        rows[row["id"], row["hash"]] = row
    return list(rows.values())


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append a row in one write, and wait until the disk has it.

    A part of a line that a killed process has left at the end is cut off first.

    Args:
        path: JSON lines; made if it is not there.
        row: JSON values without NaN.

    Raises:
        OutputError: it cannot be written.
    """
    line = json.dumps(row, allow_nan=False).encode() + b"\n"
    with writing_to(path, "out"), path.open("ab+") as file:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        if os.write(file.fileno(), line) != len(line):
            raise OSError(0, "only a part of a line fits")
        os.fsync(file.fileno())
