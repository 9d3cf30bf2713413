"""Look at JSON before pyarrow reads it: its nesting, its keys and its size.

pyarrow ends the process where a value nests deeply, and takes one value into memory as a whole.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from steppe.data.file_blocks import blocks_of, check_columns, cut, name_of
from steppe.errors import DataError

MAX_WHOLE = 1 << 29
"""Bytes of the largest file that is one JSON value, which is read as a whole: 512 MiB."""
MAX_DEPTH = 50
"""Lists and objects within each other; Arrow takes up to 64, some thousands end the process."""
MARK = b"\xef\xbb\xbf"
"""The byte order mark of UTF-8; it may stand first."""
_KEY_END = re.compile(rb'"\s*:')
_STEPS = np.zeros(256, dtype=np.int8)
_STEPS[list(b"[{")] = 1
_STEPS[list(b"]}")] = -1
_SCALAR = np.zeros(256, dtype=bool)  # the first bytes of numbers, null, true and false
_SCALAR[list(b"-0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")] = True


class Nesting:
    """Depth of the lists and objects of JSON, which is given block by block.

    Args:
        where: the file, for errors.
        of_list: refuse a list whose elements are neither objects, nor strings, nor lists.

    Attributes:
        depth: lists and objects that are open where the last block ends.
    """

    def __init__(self, where: str, of_list: bool = False) -> None:
        self._where = where
        self._of_list = of_list
        self._in_string = 0
        self._escape = b""
        self.depth = 0

    def add(self, block: bytes) -> None:
        """Go on with the next block.

        Raises:
            DataError: it nests deeper than `MAX_DEPTH`, or an element is of the wrong kind.
        """
        text = (self._escape + block).replace(rb"\\", b"")
        self._escape = text[-1:] if text.endswith(b"\\") else b""
        parts = text.removesuffix(b"\\").replace(rb"\"", b"").split(b'"')
        outside = np.frombuffer(b"".join(parts[self._in_string :: 2]), dtype=np.uint8)
        self._in_string ^= (len(parts) - 1) & 1
        depths = self.depth + np.cumsum(_STEPS[outside], dtype=np.int64)
        if depths.size == 0:
            return
        self.depth = int(depths[-1])
        if depths.max() > MAX_DEPTH:
            raise DataError(
                f"{self._where}: lists and objects within each other, more than {MAX_DEPTH} deep"
            )
        if self._of_list and (_SCALAR[outside] & (depths == 1)).any():
            raise DataError(
                f"{self._where}: expected a list of objects, one for each row, found a number,"
                " null, true or false in it"
            )


class Keys:
    """Counts the different keys of JSON, each of which becomes a column or a part of one.

    Args:
        where: the file, for errors.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._seen: set[bytes] = set()

    def add(self, text: bytes) -> None:
        """Go on with more text.

        Raises:
            DataError: there are too many.
        """
        for block in cut(text):
            for before in _KEY_END.split(block)[:-1]:
                _, quote, key = before.rpartition(b'"')
                if quote and not key.endswith(b"\\"):  # else it is cut, or within a text
                    self._seen.add(key)
            check_columns(self._where, len(self._seen))


def check_whole(file: str) -> None:
    """Refuse one JSON value that is too large to be read at once.

    Args:
        file: as the builders of ``datasets`` have it.

    Raises:
        DataError: it has more than `MAX_WHOLE` bytes, nests deeply, or has too many keys.
    """
    nesting, size = None, 0
    keys = Keys(name_of(file))
    least = Path(name_of(file)).stat().st_size  # it unpacks to no less
    for block in blocks_of(file):
        if nesting is None:
            block = block.removeprefix(MARK).lstrip()
            nesting = Nesting(name_of(file), block.startswith(b"["))
        size += len(block)
        if max(size, least) > MAX_WHOLE:
            raise DataError(
                f"{name_of(file)}: one JSON value of more than {MAX_WHOLE >> 20} MiB. Write an"
                " object a line, as *.jsonl: that is read piece by piece."
            )
        nesting.add(block)
        keys.add(block)
