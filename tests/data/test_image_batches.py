"""Images to measure on, as the checkpoint's processor or its config says."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import models
from data.data_makers import batches_of, named_vit, write_images, write_jsonl
from steppe.data.batches import load_batches
from steppe.data.sources import Source
from steppe.errors import DataError

ANIMALS = ("cat", "dog")


def test_images_are_made_as_the_checkpoints_processor_says(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", ANIMALS)
    ViTImageProcessorPil(
        size={"height": 8, "width": 8}, image_mean=[0.25], image_std=[0.125]
    ).save_pretrained(tmp_path)
    loader = load_batches(Source(str(data)), named_vit("dog", "cat"), str(tmp_path))
    (batch,) = loader
    assert loader.notes == ()
    assert loader.total == 1
    assert batch["pixel_values"].shape == (6, 1, 8, 8)
    # Uniform images of shade 20 i + 100 c, so resizing leaves them; the model calls cat 1.
    shades = (batch["pixel_values"].mean((1, 2, 3)) * 0.125 + 0.25) * 255
    pairs = sorted(zip(shades.round().int().tolist(), batch["labels"].tolist(), strict=True))
    assert pairs == [(0, 1), (20, 1), (40, 1), (100, 0), (120, 0), (140, 0)]


def test_without_a_processor_the_config_decides_and_says_so(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", ANIMALS, mode="L")
    loader = load_batches(Source(str(data)), named_vit(*ANIMALS), str(tmp_path))
    (batch,) = loader
    shades = (batch["pixel_values"].mean((1, 2, 3)) * 0.5 + 0.5) * 255
    assert sorted(shades.round().int().tolist()) == [0, 20, 40, 100, 120, 140]
    assert any("no preprocessor_config.json; images are resized to 8" in n for n in loader.notes)
    model = named_vit(*ANIMALS).to(torch.bfloat16)
    assert batches_of(data, model, tmp_path)[0]["pixel_values"].dtype == torch.bfloat16


def test_images_in_folders_of_splits_have_the_classes_of_all(tmp_path: Path) -> None:
    write_images(tmp_path / "train", ("ant", "cat", "dog"))
    write_images(tmp_path / "val", ("cat", "dog"))  # alphabetically 0 and 1, among all 1 and 2
    model = models.vit()
    model.config.num_labels = 3
    (batch,) = batches_of(tmp_path, model, tmp_path)
    assert sorted(batch["labels"].tolist()) == [1, 1, 1, 2, 2, 2]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    write_images(tmp_path, ("car", "train"))
    (batch,) = batches_of(tmp_path, named_vit("car", "train"), tmp_path)
    assert sorted(batch["labels"].tolist()) == [0, 0, 0, 1, 1, 1]


def test_many_images_are_mixed_the_same_way_every_time(tmp_path: Path) -> None:
    write_images(tmp_path, ANIMALS, each=30)
    loader = load_batches(Source(str(tmp_path), batch_size=10), named_vit(*ANIMALS), str(tmp_path))
    first = next(iter(loader))
    assert 0 < first["labels"].sum() < 10
    assert torch.equal(first["pixel_values"], next(iter(loader))["pixel_values"])
    assert loader.total == 6 == len(list(loader))


@pytest.mark.slow  # a quarter of a minute
def test_images_in_parquet_files(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", ANIMALS)
    rows = datasets.load_dataset("imagefolder", data_files=str(data / "**/*.png"), streaming=True)
    rows = list(rows["train"].cast_column("image", datasets.Image(decode=False)))
    for row in rows:
        row["image"] = {"bytes": Path(row["image"]["path"]).read_bytes(), "path": None}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=ANIMALS))
    typed = datasets.Dataset.from_list(rows, features=features)
    typed.to_parquet(tmp_path / "typed.parquet")
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "bare.parquet")
    model = models.vit()
    model.config.num_labels = 2
    for name in ("typed", "bare"):
        (batch,) = batches_of(tmp_path / f"{name}.parquet", model, tmp_path)
        assert batch["pixel_values"].shape == (6, 1, 8, 8)
        assert sorted(batch["labels"].tolist()) == [0, 0, 0, 1, 1, 1]


def test_images_without_classes_are_an_error_unless_none_are_needed(tmp_path: Path) -> None:
    write_images(tmp_path, ("all",))
    with pytest.raises(DataError, match=r"Images need a folder a class.*labels=model"):
        batches_of(tmp_path, models.vit(), tmp_path)
    loader = load_batches(Source(str(tmp_path)), models.vit(), str(tmp_path), with_classes=False)
    assert sorted(next(iter(loader))) == ["pixel_values"]


def test_damaged_images_and_processors_are_errors(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", ANIMALS)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(DataError, match="its image processor cannot be loaded"):
        batches_of(data, named_vit(*ANIMALS), tmp_path)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    with pytest.raises(
        DataError, match="processor=FOLDER_OR_HUB_ID"
    ):  # three means for one channel
        batches_of(data, named_vit(*ANIMALS), tmp_path)
    ViTImageProcessorPil(
        size={"height": 16, "width": 16}, image_mean=[0.5], image_std=[0.5]
    ).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"takes images of 1 × 8 × 8 .*, got 1 × 16 × 16"):
        batches_of(data, named_vit(*ANIMALS), tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    (data / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"0\.png: the image cannot be read"):
        batches_of(data, named_vit(*ANIMALS), tmp_path)


def test_text_for_an_image_model_is_an_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "the", "label": 1}])
    with pytest.raises(DataError, match="expected a column 'image', it has text"):
        batches_of(path, models.vit(), tmp_path)
