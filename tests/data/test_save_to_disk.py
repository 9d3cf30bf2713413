"""Folders of ``save_to_disk`` are read, and damaged ones refused."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from steppe.data.rows import open_rows
from steppe.data.sources import Source
from steppe.errors import DataError


def test_a_folder_of_save_to_disk_is_read_with_its_splits(tmp_path: Path) -> None:
    one = datasets.Dataset.from_dict({"text": ["a", "b"]})
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=one, test=one.select([1])).save_to_disk(tmp_path / "two")
    assert [row["text"] for row in open_rows(Source(str(tmp_path / "one")))] == ["a", "b"]
    two = open_rows(Source(str(tmp_path / "two")))
    assert (two.split, [row["text"] for row in two], two.number) == ("test", ["b"], 1)
    (tmp_path / "one" / "data-00000-of-00001.arrow").write_bytes(b"xx")
    with pytest.raises(DataError, match=r"one: looks like a folder of Dataset.save_to_disk"):
        open_rows(Source(str(tmp_path / "one")))


def test_values_of_a_saved_data_set_that_would_be_read_beyond_its_end_are_refused(
    tmp_path: Path,
) -> None:
    datasets.Dataset.from_dict({"text": ["abcdefgh"] * 9}).save_to_disk(tmp_path / "saved")
    file = tmp_path / "saved" / "data-00000-of-00001.arrow"
    offset = (72).to_bytes(4, "little")  # where the last text ends
    file.write_bytes(file.read_bytes().replace(offset, (2**30).to_bytes(4, "little")))
    with pytest.raises(DataError, match="cannot be read"):
        open_rows(Source(str(tmp_path / "saved")))
