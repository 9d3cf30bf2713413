"""Files are checked before a library reads them: whole ones pass, whatever they hold."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from steppe.data.file_blocks import MAX_COLUMNS
from steppe.data.json_checks import MAX_DEPTH
from steppe.data.rows import open_rows
from steppe.data.sources import Source, open_data
from steppe.errors import DataError


def rows_of(path: Path, content: bytes) -> list[Any]:
    path.write_bytes(content)
    return list(open_rows(Source(str(path))))


def nested(depth: int) -> bytes:
    """An object of that many lists and objects within each other."""
    return b'{"a": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


@pytest.mark.parametrize(
    "text",
    ["[" * 1000, '"[{' * 100, "\\" * 99, '\\"[' * 99, "a\r\nb\u2028", "null", "\x00", "ä€😀" * 50],
)
def test_texts_may_hold_anything(tmp_path: Path, text: str) -> None:
    rows = [{"text": text, "more": {"b": [text]}}, {"text": "", "more": {"b": []}}]
    lines = "\n".join(json.dumps(row) for row in rows).encode()
    assert rows_of(tmp_path / "a.jsonl", lines) == rows
    assert rows_of(tmp_path / "a.json", json.dumps(rows).encode()) == rows
    assert rows_of(tmp_path / "a.jsonl.gz", gzip.compress(lines)) == rows


def test_marks_returns_and_blank_lines_are_no_damage(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"a": 1}\r\n\r\n  {"a": 2}\n\n{"a": 3}'
    assert rows_of(tmp_path / "a.jsonl", content) == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_files_of_many_chunks_are_read_whole(tmp_path: Path) -> None:
    rows = [{"text": f"{i} " + "a" * (i % 5000), "i": i} for i in range(10_000)]  # 25 MB
    path = tmp_path / "a.jsonl"
    assert rows_of(path, "\n".join(map(json.dumps, rows)).encode()) == rows
    assert list(open_data(str(path), streaming=False).splits["full"]) == rows


def test_long_lines_are_read(tmp_path: Path) -> None:
    text = "a" * 20_000_000
    rows = [{"text": "b"}, {"text": text}, {"text": "c"}]
    assert rows_of(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)).encode()) == rows
    assert rows_of(tmp_path / "a.txt", f"b\n{text}\nc".encode())[1:] == [
        {"text": text + "\n"},
        {"text": "c"},
    ]


def test_the_limits_are_where_they_are_said_to_be(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert len(rows_of(path, nested(MAX_DEPTH))) == 1
    with pytest.raises(DataError, match=f"line 2: lists and objects .* more than {MAX_DEPTH} deep"):
        rows_of(path, b'{"a": []}\n' + nested(MAX_DEPTH + 1))
    row = {f"c{i}": 0 for i in range(MAX_COLUMNS)}
    assert rows_of(path, json.dumps(row).encode()) == [row]
    with pytest.raises(DataError, match=f"has {MAX_COLUMNS + 1} columns"):
        rows_of(path, json.dumps(row | {"more": 0}).encode())


def test_a_wrong_line_is_told_by_its_number(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl, line 3: expected an object.*found '\[1\]'"):
        rows_of(tmp_path / "a.jsonl", b'{"a": 1}\n\n[1]\n')


def test_a_pickled_stream_still_checks(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n')
    stream = pickle.loads(pickle.dumps(open_data(str(path), streaming=True).splits["full"]))
    assert list(stream) == [{"a": 1}]
    path.write_bytes(b"null\n")
    with pytest.raises(DataError, match="line 1"):
        list(pickle.loads(pickle.dumps(stream)))
