"""Data by name: the hub, splits, and names that lead nowhere."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from data.data_makers import write_jsonl
from steppe.data.rows import open_rows
from steppe.data.sources import Source
from steppe.errors import DataError


def test_what_is_not_there_is_one_error(tmp_path: Path) -> None:
    for name in (str(tmp_path / "nowhere"), "./nowhere", "nowhere.jsonl"):
        with pytest.raises(DataError, match="there is no such file or folder"):
            open_rows(Source(name))
    for name in ("nobody/nothing", "nobody/nothing:config"):
        with pytest.raises(DataError, match=f"{name}: expected a file.*Couldn't reach") as caught:
            open_rows(Source(name))
        assert "\n" not in str(caught.value)


def test_a_split_that_is_not_there_lists_those_that_are(tmp_path: Path) -> None:
    for name in ("train", "other"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name}])
    with pytest.raises(DataError, match=r"none of its splits \(full, train\).*split=full"):
        open_rows(Source(str(tmp_path)))
    with pytest.raises(DataError, match="expected a split 'test', it has: full, train"):
        open_rows(Source(str(tmp_path), split="test"))


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
