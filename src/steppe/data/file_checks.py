"""Check data files just before a library reads them, so that it survives and fits into memory.

pyarrow, which reads JSON, ends the process where the first line is ``null`` or a value nests
deeply. It reads lines, lists, and files that it does not understand as a whole, however long a
small compressed file makes them. So a check goes through each file a little ahead of the builder of
``datasets`` that reads it, and raises where the builder must not go on.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from pyarrow import parquet

from steppe.data.file_blocks import blocks_of, check_columns, cut, name_of
from steppe.data.json_checks import MARK, MAX_DEPTH, Keys, Nesting, check_whole
from steppe.errors import DataError

MAX_LINE = 1 << 27
"""Bytes of the longest line: 128 MiB."""
_BYTES_PER_CHARACTER = 4  # at most, in UTF-8
_SHOWN = 40  # bytes of a wrong line


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
        DataError: it has too many.
        OSError, pyarrow.ArrowException: it is no parquet file.
    """
    with parquet.ParquetFile(path) as file:
        check_columns(path, file.metadata.num_columns)


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
        for block in blocks_of(file):
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
        begin = next(blocks_of(file), b"").removeprefix(MARK).lstrip()
        self.is_whole = begin.startswith(b"[")
        if self.is_whole:
            check_whole(file)
            return
        number, is_first = 0, True
        keys = Keys(name_of(file))
        for size, lines in self._lines(file):
            for line in lines:
                number += 1
                line = line.removeprefix(MARK).strip()
                if not line:
                    continue
                where = f"{name_of(file)}, line {number}"
                if not line.startswith(b"{"):
                    raise DataError(
                        f"{where}: expected an object, {{…}}, on each line, found"
                        f" {line[:_SHOWN].decode(errors='replace')!r}"
                    )
                if is_first or line.count(b"{") + line.count(b"[") > MAX_DEPTH:
                    nesting = Nesting(where)
                    for block in cut(line):
                        nesting.add(block)
                    self.is_whole = is_first and nesting.depth > 0
                    if self.is_whole:  # an object of many lines
                        check_whole(file)
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
        """The builder's tables, each read after the check of the bytes that it is made from."""
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
            check_columns(name_of(check.file), table.num_columns)
            yield key, table


class _MayReadWhole:
    """Whether a builder of JSON may read its current file as a whole."""

    def __init__(self, check: _Check, is_allowed: bool) -> None:
        self._check = check
        self._is_allowed = is_allowed

    def __bool__(self) -> bool:
        return self._is_allowed and self._check.is_whole
