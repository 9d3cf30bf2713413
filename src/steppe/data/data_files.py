"""Check data files just before a library reads them, so that it survives and fits into memory.

What reads JSON (pyarrow) ends the process where the first line is ``null`` or a value nests deeply.
Lines, lists, and files that pyarrow does not understand are read as a whole, however long a small
compressed file makes them.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from datasets.utils.file_utils import xopen
from pyarrow import parquet

from steppe.errors import DataError

MAX_LINE = 1 << 27
"""Bytes of the longest line: 128 MiB."""
MAX_WHOLE = 1 << 29
"""Bytes of the largest file that is one JSON value, which is read as a whole: 512 MiB."""
MAX_EXPANSION = 200
"""How many times its size a compressed file may have, once unpacked; from `_SMALL` on."""
MAX_DEPTH = 50
"""Lists and objects within each other; Arrow tells 64 apart, and some thousands end the process."""
MAX_COLUMNS = 10_000
MAX_CHECKED = 1 << 34
"""Bytes of a data set of ``save_to_disk`` whose every value is checked: 16 GiB, half a minute."""
_SMALL = 1 << 27  # bytes
_BLOCK = 1 << 22  # bytes that are looked at together
_BYTES_PER_CHARACTER = 4  # at most, in UTF-8
_SHOWN = 40  # bytes of a wrong line
_MARK = b"\xef\xbb\xbf"  # of UTF-8; it may stand first
_KEY_END = re.compile(rb'"\s*:')
_STEPS = np.zeros(256, dtype=np.int8)
_STEPS[list(b"[{")] = 1
_STEPS[list(b"]}")] = -1
_SCALAR = np.zeros(256, dtype=bool)  # what numbers, null, true and false begin with
_SCALAR[list(b"-0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")] = True


def check_as_read(builder: Any) -> None:
    """Let a builder of ``datasets`` check each part of its files before it reads that part.

    Args:
        builder: of text or JSON; others are left as they are. Changed in place.
    """
    if builder.name in _CHECKS:
        builder._generate_tables = _CheckedTables(builder)


def check_parquet(path: str) -> None:
    """Refuse a parquet file of too many columns.

    Args:
        path: the file.

    Raises:
        DataError: it has more than `MAX_COLUMNS`.
        OSError, pyarrow.ArrowException: it is no parquet file.
    """
    with parquet.ParquetFile(path) as file:
        _check_columns(path, file.metadata.num_columns)


def check_saved(folder: Path) -> None:
    """Refuse damaged files of ``Dataset.save_to_disk``, which would be used as they lie there.

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
            _check_columns(str(path), len(batches.schema))
            for batch in batches:
                batch.validate(full=every_value)


class _Check:
    """Looks at the files that a builder reads, always a little further than it has read.

    Args:
        chunk: how many bytes the builder reads at once, and then to the end of the line.
    """

    def __init__(self, chunk: int) -> None:
        self._chunk = chunk
        self._seen = 0
        self._progress: Iterator[int] = iter(())
        self.file = ""
        self.is_whole = False

    def over(self, files: Iterable[str]) -> Iterator[str]:
        """The files, the first part of each checked."""
        for self.file in files:
            self._seen, self.is_whole = 0, False
            self._progress = self._check(self.file)
            self.advance()
            yield self.file

    def advance(self) -> None:
        """Check at least as much as the builder reads next."""
        wanted = self._seen + self._chunk
        while self._seen <= wanted and (seen := next(self._progress, None)) is not None:
            self._seen = seen

    def _check(self, file: str) -> Iterator[int]:
        """Check a file block by block; gives the number of bytes in whole lines so far."""
        raise NotImplementedError

    def _lines(self, file: str) -> Iterator[tuple[int, list[bytes]]]:
        """Whole lines, a carriage return ends one too, with the number of bytes up to their end."""
        begun: list[bytes] = []  # pieces of a line without an end so far
        size = length = 0
        for block in _blocks(file):
            size += len(block)
            first, *lines = block.replace(b"\r", b"\n").split(b"\n")
            begun.append(first)
            length += len(first)
            if lines:
                *lines, rest = [b"".join(begun), *lines]
                begun, length = [rest], len(rest)
                yield size - length, lines
            if length > MAX_LINE:
                raise DataError(
                    f"{name_of(file)}: a line is longer than {MAX_LINE >> 20} MiB. Expected a text"
                    " or a record a line; split it."
                )
        yield size + 1, [b"".join(begun)]


class _TextCheck(_Check):
    """Lines have an end."""

    def __init__(self, chunk: int) -> None:
        super().__init__(_BYTES_PER_CHARACTER * chunk)  # a builder of text counts characters

    def _check(self, file: str) -> Iterator[int]:
        for size, _ in self._lines(file):
            yield size


class _JsonCheck(_Check):
    """Each line is an object, or the file is one value of bearable size; none nests deeply."""

    def _check(self, file: str) -> Iterator[int]:
        begin = next(_blocks(file), b"").removeprefix(_MARK).lstrip()
        self.is_whole = begin.startswith(b"[")
        if self.is_whole:
            _check_whole(file)
            return
        number, is_first = 0, True
        keys = _Keys(name_of(file))
        for size, lines in self._lines(file):
            for line in lines:
                number += 1
                line = line.removeprefix(_MARK).strip()
                if not line:
                    continue
                where = f"{name_of(file)}, line {number}"
                if not line.startswith(b"{"):
                    raise DataError(
                        f"{where}: expected an object, {{…}}, on each line, found"
                        f" {line[:_SHOWN].decode(errors='replace')!r}"
                    )
                if is_first or line.count(b"{") + line.count(b"[") > MAX_DEPTH:
                    nesting = _Nesting(where)
                    for block in _cut(line):
                        nesting.add(block)
                    self.is_whole = is_first and nesting.depth > 0
                    if self.is_whole:  # an object of many lines
                        _check_whole(file)
                        return
                is_first = False
            keys.add(b"\n".join(lines))
            yield size


_CHECKS: dict[str, type[_Check]] = {"text": _TextCheck, "json": _JsonCheck}


class _CheckedTables:
    """Stands for a builder's method that reads its files table by table."""

    def __init__(self, builder: Any) -> None:
        self._builder = builder

    def __call__(self, **given: Any) -> Iterator[tuple[Any, Any]]:
        """The builder's tables, each read after the check of what it is made from."""
        # Not the bound method: pickling that would put this object in its place.
        tables_of = type(self._builder)._generate_tables
        check = _CHECKS[self._builder.name](self._builder.config.chunksize)
        for name in {"files", "files_iterables"} & set(given):  # as the version has it
            given[name] = [check.over(files) for files in given[name]]
        if "allow_full_read" in inspect.signature(tables_of).parameters:
            given["allow_full_read"] = _MayReadWhole(check, given.get("allow_full_read", True))
        tables = tables_of(self._builder, **given)
        while True:
            check.advance()
            try:
                key, table = next(tables)
            except StopIteration:
                return
            except Exception as error:
                if str(error) or check.is_whole:
                    raise
                # It was not allowed to read the whole file, as it does after any error.
                raise DataError(
                    f"{name_of(check.file)}: cannot be read as JSON lines of the same columns"
                    f" ({error.__context__ or type(error).__name__})"
                ) from None
            _check_columns(name_of(check.file), table.num_columns)
            yield key, table


class _MayReadWhole:
    """Whether a builder of JSON may read its current file as a whole."""

    def __init__(self, check: _Check, is_allowed: bool) -> None:
        self._check = check
        self._is_allowed = is_allowed

    def __bool__(self) -> bool:
        return self._is_allowed and self._check.is_whole


class _Nesting:
    """Follows the lists and objects of JSON, which is given block by block.

    Args:
        where: the file, for errors.
        of_list: refuse a list whose elements are neither objects, nor strings, nor lists.
    """

    def __init__(self, where: str, of_list: bool = False) -> None:
        self._where = where
        self._of_list = of_list
        self._in_string = 0
        self._escape = b""
        self.depth = 0

    def add(self, block: bytes) -> None:
        """Go on.

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


class _Keys:
    """Counts the different keys of JSON, each of which becomes a column or a part of one.

    Args:
        where: the file, for errors.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._seen: set[bytes] = set()

    def add(self, text: bytes) -> None:
        """Go on.

        Raises:
            DataError: they are more than `MAX_COLUMNS`.
        """
        for block in _cut(text):
            for before in _KEY_END.split(block)[:-1]:
                _, quote, key = before.rpartition(b'"')
                if quote and not key.endswith(b"\\"):  # else it is cut, or within a text
                    self._seen.add(key)
            _check_columns(self._where, len(self._seen))


def name_of(file: str) -> str:
    """The path of a file that ``datasets`` may have as ``gzip://inner::path``.

    Args:
        file: as its builders have it.
    """
    return file.rpartition("::")[2]


def _blocks(file: str) -> Iterator[bytes]:
    """The bytes of a file, unpacked.

    Raises:
        DataError: they are more than a file of its size holds, unless somebody wants it so.
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


def _cut(text: bytes) -> Iterator[bytes]:
    """Blocks of a text."""
    for at in range(0, len(text), _BLOCK):
        yield text[at : at + _BLOCK]


def _check_whole(file: str) -> None:
    """Refuse one JSON value that is too large to be read at once."""
    nesting, size = None, 0
    keys = _Keys(name_of(file))
    least = Path(name_of(file)).stat().st_size  # it unpacks to no less
    for block in _blocks(file):
        if nesting is None:
            block = block.removeprefix(_MARK).lstrip()
            nesting = _Nesting(name_of(file), block.startswith(b"["))
        size += len(block)
        if max(size, least) > MAX_WHOLE:
            raise DataError(
                f"{name_of(file)}: one JSON value of more than {MAX_WHOLE >> 20} MiB. Write an"
                " object a line, as *.jsonl: that is read piece by piece."
            )
        nesting.add(block)
        keys.add(block)


def _check_columns(where: str, number: int) -> None:
    """Refuse absurdly many columns."""
    if number > MAX_COLUMNS:
        raise DataError(
            f"{where}: has {number} columns or more, expected at most {MAX_COLUMNS}. Keys that"
            " differ from row to row belong into values."
        )
