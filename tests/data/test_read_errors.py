"""Errors of reading get the data's name; all others stay as they are."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from data.data_makers import write_jsonl
from steppe.data.read_errors import reading
from steppe.data.sources import open_data
from steppe.errors import DataError


def pack(path: Path, number: int = 2000) -> Path:
    lines = "".join(json.dumps({"text": f"line {index}"}) + "\n" for index in range(number))
    path.write_bytes(gzip.compress(lines.encode()))
    return path


@pytest.mark.parametrize("streaming", [True, False])
def test_a_compressed_file_that_is_cut_short_is_told(tmp_path: Path, streaming: bool) -> None:
    path = pack(tmp_path / "a.jsonl.gz", 200_000)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(DataError, match=r"cannot be read.*ended before"), reading(str(tmp_path)):
        list(open_data(str(tmp_path), streaming).splits["full"])


def test_files_with_other_columns_are_told_while_reading(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}])
    write_jsonl(tmp_path / "b.jsonl", [{"text": "one", "url": "two"}])
    with (
        pytest.raises(DataError, match=r"column names don't match.*the same columns"),
        reading("x"),
    ):
        list(open_data(str(tmp_path), streaming=True).splits["full"])


def test_only_errors_of_reading_are_told_as_such() -> None:
    with pytest.raises(ValueError, match=r"^mine$") as raised, reading("x"):
        raise ValueError("mine")
    assert not isinstance(raised.value, DataError)
    with pytest.raises(DataError, match=r"^own$"), reading("x"):
        raise DataError("own")
