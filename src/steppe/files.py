"""Write results so that a reader sees all of a file or none of it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steppe.errors import OutputError


def prepare_folder(folder: str | Path) -> Path:
    """Make a folder and make sure that it can be written to.

    Args:
        folder: made with its parents if it is not there.

    Returns:
        The folder.

    Raises:
        OutputError: it is a file, read-only or full.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(b"\0" * 4096)
    except OSError as error:
        raise OutputError(
            f"cannot write to {path}: {error.strerror or error}. Name another folder: --out FOLDER"
        ) from None
    return path


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name, then rename it.

    Args:
        path: the file.
        value: JSON values.

    Raises:
        OutputError: it cannot be written; an older file of the name is still whole.
    """
    text = json.dumps(value, indent=1) + "\n"
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` write under a temporary name with the same ending, then rename it.

    Args:
        path: the file.
        write: writes the file it is given.

    Raises:
        OutputError: it cannot be written; an older file of the name is still whole.
    """
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
