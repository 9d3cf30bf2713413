"""Held-out data by name: what is read, what a model gets, and every way it can go wrong."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pytest

from data.data_makers import write_jsonl
from steppe.data.sources import Source, open_rows, open_splits, reading
from steppe.errors import DataError


@pytest.fixture(autouse=True)
def _no_bars() -> None:
    datasets.disable_progress_bars()


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


def test_what_is_not_there_is_one_error(tmp_path: Path) -> None:
    for name in (str(tmp_path / "nowhere"), "./nowhere", "nowhere.jsonl"):
        with pytest.raises(DataError, match="there is no such file or folder"):
            open_rows(Source(name))
    for name in ("nobody/nothing", "nobody/nothing:config"):
        with pytest.raises(DataError, match=f"{name}: expected a file.*Couldn't reach") as caught:
            open_rows(Source(name))
        assert "\n" not in str(caught.value)


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


def test_a_split_that_is_not_there_lists_those_that_are(tmp_path: Path) -> None:
    for name in ("train", "other"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name}])
    with pytest.raises(DataError, match=r"none of its splits \(full, train\).*split=full"):
        open_rows(Source(str(tmp_path)))
    with pytest.raises(DataError, match="expected a split 'test', it has: full, train"):
        open_rows(Source(str(tmp_path), split="test"))


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


def test_numbers_below_one_are_refused() -> None:
    with pytest.raises(DataError, match="at least 1"):
        Source("digits", batch_size=0)
    with pytest.raises(DataError, match="at least 1"):
        Source("digits", max_length=0)


def test_hub_ids_name_a_configuration_and_are_read_in_their_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[object, ...]] = []
    rows = datasets.Dataset.from_dict({"text": [str(i) for i in range(50)]})
    splits = {"train": rows, "validation": rows, "test": rows}

    def load(*told: object, streaming: bool) -> datasets.IterableDatasetDict:
        asked.append((*told, streaming))
        streams = {name: split.to_iterable_dataset() for name, split in splits.items()}
        return datasets.IterableDatasetDict(streams)

    monkeypatch.setattr(datasets, "load_dataset", load)
    opened = open_rows(Source("someone/some:thing"))
    assert opened.split == "validation"
    assert [row["text"] for row in opened.shuffled()] == rows["text"]
    assert open_rows(Source("c4", split="train")).split == "train"
    assert asked == [("someone/some", "thing", True), ("c4", None, True)]
    splits = {"train": rows}
    with pytest.raises(DataError, match="split=train"):  # not measured unless asked for
        open_rows(Source("c4"))


def pack(path: Path, number: int = 2000) -> Path:
    lines = "".join(json.dumps({"text": f"line {index}"}) + "\n" for index in range(number))
    path.write_bytes(gzip.compress(lines.encode()))
    return path


@pytest.mark.parametrize("streaming", [True, False])
def test_compressed_files_are_read_as_c4_comes(tmp_path: Path, streaming: bool) -> None:
    pack(tmp_path / "c4-train.00000-of-00001.json.gz", 3)
    pack(tmp_path / "c4-validation.00000-of-00001.json.gz", 2)
    splits = open_splits(str(tmp_path), streaming)
    assert {name: len(list(rows)) for name, rows in splits.items()} == {
        "train": 3,
        "validation": 2,
    }
    assert next(iter(splits["train"])) == {"text": "line 0"}


@pytest.mark.parametrize("streaming", [True, False])
def test_a_compressed_file_that_is_cut_short_is_told(tmp_path: Path, streaming: bool) -> None:
    path = pack(tmp_path / "a.jsonl.gz", 200_000)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(DataError, match=r"cannot be read.*ended before"), reading(str(tmp_path)):
        list(open_splits(str(tmp_path), streaming)["full"])


def test_a_download_that_did_not_end_is_told(tmp_path: Path) -> None:
    pack(tmp_path / "a.jsonl.gz")
    (tmp_path / "b.jsonl.gz.incomplete").write_bytes(b"")
    with pytest.raises(DataError, match=r"b\.jsonl\.gz\.incomplete: a download that did not end"):
        open_splits(str(tmp_path), streaming=False)


def test_files_with_other_columns_are_told_while_reading(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}])
    write_jsonl(tmp_path / "b.jsonl", [{"text": "one", "url": "two"}])
    with (
        pytest.raises(DataError, match=r"column names don't match.*the same columns"),
        reading("x"),
    ):
        list(open_splits(str(tmp_path), streaming=True)["full"])


def test_only_errors_of_reading_are_told_as_such() -> None:
    with pytest.raises(ValueError, match=r"^mine$") as raised, reading("x"):
        raise ValueError("mine")
    assert not isinstance(raised.value, DataError)
    with pytest.raises(DataError, match=r"^own$"), reading("x"):
        raise DataError("own")
