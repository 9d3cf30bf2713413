from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from steppe.data.draws import Draw
from steppe.data.idx import load_idx_folder, read_idx
from steppe.data.image_data import load_image_data
from steppe.data.rows import open_rows
from steppe.data.sources import Source
from steppe.errors import DataError

NAMES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


def idx_bytes(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


@pytest.fixture
def idx(tmp_path: Path) -> Path:
    """MNIST's four files, two of them gzipped; each image is full of its own number."""
    images = np.arange(20, dtype=np.uint8)[:, None, None] * np.ones((1, 6, 6), np.uint8)
    for at, name in enumerate(NAMES):
        array = images if "images" in name else np.arange(20) % 4
        data = idx_bytes(array[:8] if name.startswith("t10k") else array)
        packed = at % 2 == 0
        path = tmp_path / f"{name}-ubyte{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(data) if packed else data)
    return tmp_path


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Images of two classes, left half black and right half white, in train and test."""
    for split, number in (("train", 5), ("test", 2)):
        for label in ("cat", "dog"):
            place = tmp_path / split / label
            place.mkdir(parents=True)
            for index in range(number):
                pixels = np.zeros((20, 30, 3), np.uint8)
                pixels[:, 15:] = 255
                Image.fromarray(pixels).save(place / f"{index}.png")
    return tmp_path


def test_idx_files_are_read_as_they_are(idx: Path) -> None:
    parts = load_idx_folder(idx)
    images, labels = parts["train"]
    assert images.shape == (20, 6, 6)
    assert images.dtype == torch.uint8
    assert images[7].unique().tolist() == [7]
    assert labels.tolist() == [index % 4 for index in range(20)]
    assert len(parts["test"][0]) == 8


def test_idx_files_are_measured_as_images_of_their_test_part(idx: Path) -> None:
    rows = open_rows(Source(str(idx)))
    images, labels = load_idx_folder(idx)["test"]
    assert rows.split == "test"
    assert [row["label"] for row in rows] == labels.tolist()
    assert np.array_equal(np.stack([np.array(row["image"]) for row in rows]), images.numpy())


def test_idx_items_have_the_models_size_and_channels(idx: Path) -> None:
    data = load_image_data(str(idx), size=8, channels=3)
    item = data.train[Draw(5, 1)]
    assert item["pixel_values"].shape == (3, 8, 8)
    assert item["pixel_values"].unique().tolist() == [5]
    assert int(item["labels"]) == 1
    assert data.classes == ["0", "1", "2", "3"]
    assert len(load_image_data(str(idx), 6, 1, held_out_samples=3).held_out) == 3


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda path: path.unlink(), r"found no train-labels-idx1-ubyte.*data_dir=FOLDER"),
        (lambda path: path.write_bytes(path.read_bytes()[:-3]), "header says 20 bytes, got 17"),
        (lambda path: path.write_bytes(b"<html>"), "it begins with 3c 68 74 6d"),
        (lambda path: path.write_bytes(b""), "it begins with nothing"),
    ],
)
def test_a_half_downloaded_set_says_what_to_fetch(idx: Path, break_it, message: str) -> None:
    break_it(idx / "train-labels-idx1-ubyte")
    with pytest.raises(DataError, match=message):
        load_image_data(str(idx), 6, 1)


def test_a_truncated_gzip_is_told_by_name(idx: Path) -> None:
    path = idx / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz: cannot be read, or is cut"):
        read_idx(path)


def test_images_and_classes_that_do_not_fit_are_refused(idx: Path) -> None:
    (idx / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(19)))
    with pytest.raises(DataError, match=r"got \[20, 6, 6\] and \[19\]"):
        load_idx_folder(idx)


def test_an_image_folder_has_its_classes_and_splits(folders: Path) -> None:
    data = load_image_data(str(folders), size=16, channels=3)
    assert data.classes == ["cat", "dog"]
    assert (len(data.train), len(data.held_out)) == (10, 4)
    item = data.held_out[3]
    assert item["pixel_values"].dtype == torch.uint8
    assert item["pixel_values"].shape == (3, 16, 16)
    assert int(item["labels"]) == 1
    grey = load_image_data(str(folders), size=16, channels=1)
    assert grey.train[0]["pixel_values"].shape == (1, 16, 16)


def test_random_parts_depend_on_the_draws_seed_alone(folders: Path) -> None:
    train = load_image_data(str(folders), size=16, channels=3, crop=True).train
    torch.manual_seed(0)
    before = torch.get_rng_state()
    parts = [train[Draw(0, seed)]["pixel_values"] for seed in range(30)]
    assert torch.equal(before, torch.get_rng_state())
    assert all(part.shape == (3, 16, 16) for part in parts)
    assert torch.equal(parts[4], train[Draw(0, 4)]["pixel_values"])
    assert len({part.numpy().tobytes() for part in parts}) > 5
    # Mirrored, white is on the left.
    assert any(part[0, 0, 0] > part[0, 0, -1] for part in parts)
    assert any(part[0, 0, 0] < part[0, 0, -1] for part in parts)


def test_held_out_images_are_cut_from_the_centre(folders: Path) -> None:
    image = load_image_data(str(folders), size=16, channels=3, crop=True).held_out[0]
    columns = image["pixel_values"][0].float().mean(0)
    assert columns[:6].max() == 0
    assert columns[-6:].min() == 255


def test_without_a_held_out_split_a_tenth_is_held_out(folders: Path) -> None:
    data = load_image_data(str(folders / "train"), size=16, channels=3)
    assert (len(data.train), len(data.held_out)) == (9, 1)
    assert "a tenth" in data.notes[0]


def test_an_unknown_split_lists_those_that_are_there(folders: Path) -> None:
    with pytest.raises(DataError, match=r"'nowhere', it has .*test.*: held_out_split=NAME"):
        load_image_data(str(folders), 16, 3, held_out_split="nowhere")


def test_a_damaged_image_is_told(folders: Path) -> None:
    path = folders / "train" / "dog" / "4.png"
    path.write_bytes(b"<html>not found</html>")
    data = load_image_data(str(folders), 16, 3)
    with pytest.raises(DataError, match="cannot be read"):
        [data.train[index] for index in range(len(data.train))]
