"""Files and folders: which kinds are read, and by which names their splits are known."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import datasets
import pytest

from data.data_makers import write_jsonl
from steppe.data.rows import open_rows
from steppe.data.sources import Source, open_data
from steppe.errors import DataError


def test_a_single_file_of_each_kind_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    rows = [{"text": "one"}, {"text": "two"}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    assert list(open_rows(Source(str(tmp_path / "a.txt")))) == [
        {"text": "one\n"},
        {"text": "\n"},
        {"text": "two"},
    ]
    for name in ("a.jsonl", "a.json", "a.parquet"):
        opened = open_rows(Source(str(tmp_path / name)))
        assert list(opened) == rows
        assert list(opened) == rows  # again, from the start
        assert opened.split == "full"


@pytest.mark.parametrize(
    ("names", "default"),
    [
        (["train.jsonl", "test.jsonl"], "test"),
        (["train/0.jsonl", "dev/0.jsonl", "test/0.jsonl"], "validation"),
        (["train-00000-of-00001.jsonl", "valid_1.jsonl"], "validation"),
        (["trainees.jsonl", "tested.jsonl"], "full"),
        (["sub/eval.jsonl", ".cache/x.jsonl"], "test"),
        (["other.jsonl", "train.jsonl", "val.jsonl"], "validation"),
        (["c4-train.00000-of-00001.jsonl", "c4-validation.00000-of-00001.jsonl"], "validation"),
    ],
)
def test_the_split_is_told_by_folders_and_files(
    tmp_path: Path, names: list[str], default: str
) -> None:
    for name in names:
        write_jsonl(tmp_path / name, [{"text": name}])
    (tmp_path / "README.md").write_text("# not data")
    opened = open_rows(Source(str(tmp_path)))
    assert opened.split == default
    texts = {row["text"] for row in opened}
    assert texts == set(names) if default == "full" else len(texts) == 1
    if default != "full" and len(names) > 2:
        assert [row["text"] for row in open_rows(Source(str(tmp_path), split="train"))]


def test_folders_that_hold_no_one_kind_of_data_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found none"):
        open_rows(Source(str(tmp_path)))
    (tmp_path / "a.txt").write_text("a")
    write_jsonl(tmp_path / "b.jsonl", [{"text": "b"}])
    with pytest.raises(DataError, match=r"found text \(1\), json \(1\)"):
        open_rows(Source(str(tmp_path)))
    (tmp_path / "a.csv").write_text("a")
    with pytest.raises(DataError, match=r"expected a file \*.txt"):
        open_rows(Source(str(tmp_path / "a.csv")))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": '),
        ("a.parquet", b"PAR1 and no more"),
        ("a.txt", b"\xff\xfe\x00"),
        ("a.txt", b""),
    ],
)
def test_damaged_and_empty_files_are_one_error(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"a\.\w+( \(full\))?: (a row cannot|cannot be|expected r)"):
        open_rows(Source(str(tmp_path / name)))


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


def pack(path: Path, number: int = 2000) -> Path:
    lines = "".join(json.dumps({"text": f"line {index}"}) + "\n" for index in range(number))
    path.write_bytes(gzip.compress(lines.encode()))
    return path


@pytest.mark.parametrize("streaming", [True, False])
def test_compressed_files_are_read_as_c4_comes(tmp_path: Path, streaming: bool) -> None:
    pack(tmp_path / "c4-train.00000-of-00001.json.gz", 3)
    pack(tmp_path / "c4-validation.00000-of-00001.json.gz", 2)
    splits = open_data(str(tmp_path), streaming).splits
    assert {name: len(list(rows)) for name, rows in splits.items()} == {
        "train": 3,
        "validation": 2,
    }
    assert next(iter(splits["train"])) == {"text": "line 0"}


def test_a_download_that_did_not_end_is_told(tmp_path: Path) -> None:
    pack(tmp_path / "a.jsonl.gz")
    (tmp_path / "b.jsonl.gz.incomplete").write_bytes(b"")
    with pytest.raises(DataError, match=r"b\.jsonl\.gz\.incomplete: a download that did not end"):
        open_data(str(tmp_path), streaming=False)
