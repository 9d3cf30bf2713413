"""What is checked before a library reads it: whole files pass, whatever they look like."""

from __future__ import annotations

import gzip
import json
import os
import pickle
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from steppe.data.data_files import MAX_COLUMNS, MAX_DEPTH, _Nesting
from steppe.data.image_files import decode_image
from steppe.data.sources import Source, open_rows, open_splits
from steppe.errors import DataError

VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text('a"\\[]{}:,\n', max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text('a"\\[{', max_size=3), inner)
    ),
)


@pytest.fixture(autouse=True)
def _no_bars() -> None:
    datasets.disable_progress_bars()


def rows_of(path: Path, content: bytes) -> list[Any]:
    path.write_bytes(content)
    return list(open_rows(Source(str(path))))


def nested(depth: int) -> bytes:
    """An object of that many lists and objects within each other."""
    return b'{"a": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


def depth_of(value: Any) -> int:
    """By recursion."""
    if not isinstance(value, list | dict):
        return 0
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max(map(depth_of, inner), default=0)


@given(VALUES, st.integers(1, 7))
def test_the_depth_is_that_of_the_value_however_it_is_cut(value: Any, size: int) -> None:
    text = json.dumps(value).encode()
    deepest, nesting = 0, _Nesting("here")
    for at in range(0, len(text), size):
        nesting.add(text[at : at + size])
        assert nesting.depth >= 0
    assert nesting.depth == 0
    for at in range(len(text)):  # byte by byte, so that none is passed over
        nesting.add(text[at : at + 1])
        deepest = max(deepest, nesting.depth)
    assert deepest == depth_of(value)


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
    assert list(open_splits(str(path), streaming=False)["full"]) == rows


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
    stream = pickle.loads(pickle.dumps(open_splits(str(path), streaming=True)["full"]))
    assert list(stream) == [{"a": 1}]
    path.write_bytes(b"null\n")
    with pytest.raises(DataError, match="line 1"):
        list(pickle.loads(pickle.dumps(stream)))


def test_values_of_a_saved_data_set_that_would_be_read_beyond_its_end_are_refused(
    tmp_path: Path,
) -> None:
    datasets.Dataset.from_dict({"text": ["abcdefgh"] * 9}).save_to_disk(tmp_path / "saved")
    file = tmp_path / "saved" / "data-00000-of-00001.arrow"
    offset = (72).to_bytes(4, "little")  # where the last text ends
    file.write_bytes(file.read_bytes().replace(offset, (2**30).to_bytes(4, "little")))
    with pytest.raises(DataError, match="cannot be read"):
        open_rows(Source(str(tmp_path / "saved")))


def test_only_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    os.mkfifo(tmp_path / "b.txt")
    (tmp_path / "c.txt").symlink_to("/dev/zero")
    (tmp_path / "d.txt").symlink_to(tmp_path / "d.txt")
    (tmp_path / "e.txt").mkdir()
    assert list(open_rows(Source(str(tmp_path)))) == [{"text": "a"}]
    for name in ("b.txt", "c.txt", "d.txt"):
        with pytest.raises(DataError, match="no such file"):
            open_rows(Source(str(tmp_path / name)))


def test_an_image_is_decoded_from_its_bytes_or_its_file_and_from_nothing_else(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (3, 2), (255, 0, 0)).save(path)
    for value in (
        {"bytes": path.read_bytes(), "path": None},
        {"bytes": None, "path": str(path)},
    ):
        image = decode_image(value)
        assert image is not None
        assert (image.size, image.getpixel((0, 0))) == ((3, 2), (255, 0, 0))
    assert decode_image(None) is None
    # PostScript would be given to a program.
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    with pytest.raises(DataError, match="cannot be read"):
        decode_image({"bytes": None, "path": str(path)})
    with pytest.raises(DataError, match="no such file"):
        decode_image({"bytes": None, "path": "/dev/zero"})
