"""Folders that ``Dataset.save_to_disk`` wrote, checked before they are mapped into memory."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow

from steppe.data.file_blocks import check_columns
from steppe.data.opened import WHOLE, Opened, Opener
from steppe.data.read_errors import unreadable
from steppe.errors import DataError

MAX_CHECKED = 1 << 34
"""Bytes of a data set up to which every value is checked: 16 GiB, half a minute."""
_MARKS = ("dataset_dict.json", "dataset_info.json", "state.json")
_SHOWN = 40  # characters of a wrong name


def _takes(data: str, path: Path) -> bool:
    """A folder with the files that ``save_to_disk`` writes beside its tables."""
    return path.is_dir() and any((path / name).is_file() for name in _MARKS)


def _open(data: str, path: Path, streaming: bool) -> Opened:
    """Map the tables into memory; streaming or not makes no difference.

    Raises:
        DataError: the folder cannot be read.
    """
    try:
        _check(path)
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # damaged files raise anything
        raise unreadable(
            f"{data}: looks like a folder of Dataset.save_to_disk and cannot be read", error
        ) from None
    splits = saved if isinstance(saved, datasets.DatasetDict) else {WHOLE: saved}
    return Opened(splits, is_local=True)


def _check(folder: Path) -> None:
    """Refuse damaged files: their bytes would be used as they are.

    All values are looked at where there are less than `MAX_CHECKED`, else only their layout.

    Args:
        folder: of a data set; those of its splits lie below.

    Raises:
        DataError: something is no file.
        OSError, pyarrow.ArrowException: something is no file of Arrow's, or damaged.
    """
    files = sorted(folder.rglob("*.arrow"))
    for path in [*files, *folder.rglob("*.json")]:
        if not path.is_file():
            raise DataError(f"{path}: expected a file")
    for path in folder.rglob("state.json"):
        for entry in json.loads(path.read_text(encoding="utf-8"))["_data_files"]:
            if path.parent / entry["filename"] not in files:
                raise DataError(
                    f"{path}: names a file that is not beside it: {entry['filename'][:_SHOWN]}"
                )
    every_value = sum(path.stat().st_size for path in files) <= MAX_CHECKED
    for path in files:
        with pyarrow.memory_map(str(path)) as mapped, pyarrow.ipc.open_stream(mapped) as batches:
            check_columns(str(path), len(batches.schema))
            for batch in batches:
                batch.validate(full=every_value)


SAVE_TO_DISK = Opener("save_to_disk", _takes, _open)
