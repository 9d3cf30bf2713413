"""The bytes of data files, block by block, with the limits that keep them within the memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from datasets.utils.file_utils import xopen

from steppe.errors import DataError

MAX_EXPANSION = 200
"""How many times its size a compressed file may have, once unpacked; from `_SMALL` on."""
MAX_COLUMNS = 10_000
_SMALL = 1 << 27  # bytes
_BLOCK = 1 << 22  # bytes that are looked at together


def name_of(file: str) -> str:
    """The path of a file that ``datasets`` may have as ``gzip://inner::path``.

    Args:
        file: as its builders have it.
    """
    return file.rpartition("::")[2]


def blocks_of(file: str) -> Iterator[bytes]:
    """The bytes of a file, unpacked.

    Args:
        file: as the builders of ``datasets`` have it.

    Raises:
        DataError: it unpacks to more than `MAX_EXPANSION` times its size.
    """
    packed = Path(name_of(file)).stat().st_size
    size = 0
    with xopen(file, "rb") as opened:
        while block := opened.read(_BLOCK):
            size += len(block)
            if size > max(_SMALL, MAX_EXPANSION * packed) and "::" in file:
                raise DataError(
                    f"{name_of(file)}: unpacks to more than {MAX_EXPANSION} times its size. If it"
                    " is right so, unpack it yourself and name that file."
                )
            yield block


def cut(text: bytes) -> Iterator[bytes]:
    """Blocks of a text that is in memory.

    Args:
        text: maybe empty.
    """
    for at in range(0, len(text), _BLOCK):
        yield text[at : at + _BLOCK]


def check_columns(where: str, number: int) -> None:
    """Refuse more than `MAX_COLUMNS` columns.

    Args:
        where: the file, for errors.
        number: of columns, at least.

    Raises:
        DataError: there are more.
    """
    if number > MAX_COLUMNS:
        raise DataError(
            f"{where}: has {number} columns or more, expected at most {MAX_COLUMNS}. Keys that"
            " differ from row to row belong into values."
        )
