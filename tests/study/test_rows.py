"""The lines of a study: whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steppe.errors import StudyError
from steppe.study.rows import append_row, read_rows
from study.fake_work import row_of


def test_rows_come_back_and_of_one_run_and_settings_the_last(tmp_path: Path) -> None:
    file = tmp_path / "s.jsonl"
    assert read_rows(file) == []
    for row in (row_of(0), row_of(1), {**row_of(0), "density": 0.125}):
        append_row(file, row)
    assert read_rows(file) == [row_of(1), {**row_of(0), "density": 0.125}]
    append_row(file, {**row_of(1), "hash": "of other settings"})
    assert len(read_rows(file)) == 3


def test_a_line_that_was_cut_off_is_not_there_and_the_next_one_takes_its_place(
    tmp_path: Path,
) -> None:
    file = tmp_path / "s.jsonl"
    append_row(file, row_of(0))
    whole = file.read_bytes()
    file.write_bytes(whole + json.dumps(row_of(1)).encode()[:50])
    assert read_rows(file) == [row_of(0)]
    append_row(file, row_of(2))
    assert read_rows(file) == [row_of(0), row_of(2)]
    assert file.read_bytes().startswith(whole)


@pytest.mark.parametrize("line", ["{", "[]", '{"version": 9}', '{"version": 1, "id": "a"}'])
def test_a_damaged_line_is_an_error_with_its_number(tmp_path: Path, line: str) -> None:
    file = tmp_path / "s.jsonl"
    append_row(file, row_of(0))
    with file.open("a") as lines:
        lines.write(line + "\n")
    with pytest.raises(StudyError, match=r"line 2 .*delete the line"):
        read_rows(file)
