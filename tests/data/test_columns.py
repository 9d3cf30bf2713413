"""Columns are found or asked for, and classes are those of the model."""

from __future__ import annotations

from pathlib import Path

import pytest

import models
from data.data_makers import (
    batches_of,
    id_of,
    named_vit,
    text_classifier,
    words_tokenizer,
    write_images,
    write_jsonl,
)
from steppe.data.batches import load_batches
from steppe.data.sources import Source
from steppe.errors import DataError

ANIMALS = ("cat", "dog")


def test_the_column_of_the_text_is_found_or_asked_for(tmp_path: Path) -> None:
    words_tokenizer(tmp_path)
    path = write_jsonl(tmp_path / "a.jsonl", [{"title": "the", "body": "fox", "n": 1}])
    with pytest.raises(DataError, match=r"title \(str\), body \(str\), n \(int\).*text_column="):
        batches_of(path, models.gpt2(), tmp_path)
    with pytest.raises(DataError, match="expected a column of strings 'n'"):
        batches_of(path, models.gpt2(), tmp_path, text_column="n")
    (batch,) = batches_of(path, models.gpt2(), tmp_path, text_column="body")
    assert batch["input_ids"].tolist() == [[id_of("fox"), 2]]
    only = write_jsonl(tmp_path / "b.jsonl", [{"body": "fox", "n": 1}])
    assert batches_of(only, models.gpt2(), tmp_path)[0]["input_ids"].shape == (1, 2)
    none = write_jsonl(tmp_path / "c.jsonl", [{"n": 1}])
    with pytest.raises(DataError, match="text_column=NAME"):
        batches_of(none, models.gpt2(), tmp_path)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (2, r"has 2, the model knows 2 classes"),
        (-1, r"withheld: split=validation"),
        (0.5, r"has 0.5"),
        ("cat", r"has 'cat'"),
        (None, r"has None"),
    ],
)
def test_labels_beyond_the_models_are_errors(tmp_path: Path, label: object, message: str) -> None:
    words_tokenizer(tmp_path, "masked")
    write_jsonl(tmp_path / "a.jsonl", [{"text": "the", "label": label}])
    with pytest.raises(DataError, match=message):
        batches_of(tmp_path / "a.jsonl", text_classifier(), tmp_path)


def test_the_column_of_the_classes_is_found_or_asked_for(tmp_path: Path) -> None:
    words_tokenizer(tmp_path, "masked")
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "the", "sentiment": 1}])
    with pytest.raises(DataError, match=r"'label' of classes.*label_column=NAME"):
        batches_of(path, text_classifier(), tmp_path)
    (batch,) = batches_of(path, text_classifier(), tmp_path, label_column="sentiment")
    assert batch["labels"].tolist() == [1]


@pytest.mark.parametrize(
    ("folders", "known", "message"),
    [
        (ANIMALS, ("cat", "ape"), r"the classes dog are not the model's.*cat, ape"),
        (ANIMALS, ("a", "b", "c"), r"expected the model's 3 classes \(a, b, c\), the data has 2"),
        (
            ANIMALS,
            tuple(f"LABEL_{i}" for i in range(10)),
            r"the model's 10 classes, the data",
        ),
        (("0", "7"), ("LABEL_0", "LABEL_1"), r"has 1, the model knows 2 classes"),
    ],
)
def test_classes_that_are_not_the_models_are_errors(
    tmp_path: Path, folders: tuple[str, ...], known: tuple[str, ...], message: str
) -> None:
    write_images(tmp_path, folders)
    with pytest.raises(DataError, match=message):
        batches_of(tmp_path, named_vit(*known), tmp_path)


def test_numbers_as_names_are_the_models_numbers(tmp_path: Path) -> None:
    write_images(tmp_path, ("2", "10", "9"))  # alphabetically 10, 2, 9
    model = models.vit()
    model.config.num_labels = 11
    (batch,) = batches_of(tmp_path, model, tmp_path, batch_size=9)
    assert sorted(set(batch["labels"].tolist())) == [2, 9, 10]


def test_as_many_classes_of_other_names_go_by_position_and_are_noted(tmp_path: Path) -> None:
    write_images(tmp_path, ("n01440764", "n01443537"))
    loader = load_batches(Source(str(tmp_path)), named_vit("tench", "goldfish"), str(tmp_path))
    assert any("by their position (n01440764 is class 0)" in note for note in loader.notes)
    assert sorted(next(iter(loader))["labels"].tolist()) == [0, 0, 0, 1, 1, 1]
