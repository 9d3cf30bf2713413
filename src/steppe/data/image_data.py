"""Images to train on: IDX files, folders of images, ``save_to_disk``, parquet, or the hub's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, TypeAlias

import datasets
import numpy as np
import torch
from kornia.augmentation import RandomResizedCrop
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from steppe.data.columns import image_column, label_column
from steppe.data.draws import Draw, as_draw
from steppe.data.images import Images, RowImages, TensorImages, mode_of
from steppe.data.opened import Opened
from steppe.data.rows import Rows
from steppe.data.sources import Source, open_data
from steppe.data.splits import training_splits

Item: TypeAlias = dict[str, Tensor]
_SHORTER_SIDE = 256 / 224  # of held-out images before the crop, over the crop's
_HELD_OUT_SHARE = 0.1  # where the data has no held-out split


@dataclass(frozen=True)
class ImageData:
    """Images in two disjoint parts.

    Attributes:
        train: items by `Draw` or index: ``pixel_values`` uint8 ``[C, size, size]``, ``labels``.
        held_out: the same, nothing random about it.
        classes: their names.
        notes: assumptions about the data, for the user.
    """

    train: Dataset[Item]
    held_out: Dataset[Item]
    classes: list[str]
    notes: tuple[str, ...] = ()


def load_image_data(
    data: str,
    size: int,
    channels: int,
    crop: bool = False,
    held_out_split: str | None = None,
    held_out_samples: int = 0,
) -> ImageData:
    """Images and classes by name.

    Args:
        data: a folder of IDX files, of images in one folder a class, of parquet files, or written
            by ``Dataset.save_to_disk``; or a hub id.
        size: height and width that the model takes.
        channels: 1 (grey) or 3.
        crop: train on random resized crops (Szegedy et al. 2015) and mirror images, and crop the
            centre of held-out images; IDX images, which are small, are resized whole.
        held_out_split: by default the validation or test split, or a tenth of the only one; of IDX
            files always their test part.
        held_out_samples: the first so many of the held-out images; 0 for all.

    Raises:
        DataError: the data is not there, cannot be read, or has no images, classes, or split.
    """
    opened = open_data(data, streaming=False)
    mode = mode_of(channels)
    parts: Sequence[Images]
    if opened.tensors:
        parts = [TensorImages(*opened.tensors[name], mode) for name in ("train", "test")]
        classes = [str(index) for index in range(int(opened.tensors["train"][1].max()) + 1)]
        notes: tuple[str, ...] = ()
        crop = False
    else:
        train_table, held_out_table, notes = _tables(data, opened, held_out_split)
        parts, classes = _images(data, train_table, held_out_table, mode)
    train = _Items(parts[0], size, is_random=crop, is_cropped=crop)
    held_out: Dataset[Item] = _Items(parts[1], size, is_random=False, is_cropped=crop)
    if held_out_samples:
        first = range(min(held_out_samples, len(parts[1])))
        held_out = torch.utils.data.Subset(held_out, first)
    return ImageData(train, held_out, classes, notes)


def _tables(
    data: str, opened: Opened, held_out_split: str | None
) -> tuple[Any, Any, tuple[str, ...]]:
    """The tables to train on and to hold out, and a note where they are parts of one."""
    train, held_out = training_splits(data, opened.splits, held_out_split)
    if held_out is not None:
        return opened.splits[train], opened.splits[held_out], ()
    cut = opened.splits[train].train_test_split(_HELD_OUT_SHARE, seed=0)
    note = f"{data}: no held-out split; a tenth of the images is held out"
    return cut["train"], cut["test"], (note,)


def _images(data: str, train: Any, held_out: Any, mode: str) -> tuple[list[RowImages], list[str]]:
    """The images of both tables, and the names of their classes, which are numbered together."""
    source = Source(data)
    rows = Rows(train, source, "train", is_local=True)
    image, label = image_column(rows), label_column(rows)
    if not isinstance(train.features[label], datasets.ClassLabel):
        train = train.class_encode_column(label)
        held_out = held_out.cast_column(label, train.features[label])
    made = [
        RowImages(Rows(table, source, name, is_local=True), image, mode, itemgetter(label))
        for table, name in ((train, "train"), (held_out, "held out"))
    ]
    return made, list(train.features[label].names)


class _Items(Dataset[Item]):
    """Images as tensors of the model's size."""

    def __init__(self, images: Images, size: int, is_random: bool, is_cropped: bool) -> None:
        self._images = images
        self._size = size
        self._crop = RandomResizedCrop((size, size), scale=(0.08, 1.0)) if is_random else None
        self._is_cropped = is_cropped

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, key: Draw | int) -> Item:
        draw = as_draw(key)
        image, label = self._images[draw.sample]
        if self._crop is None:
            pixels = _as_tensor(image, self._size, self._is_cropped)
        else:
            pixels = self._random_part(image, draw.seed)
        return {"pixel_values": pixels, "labels": torch.tensor(label)}

    def _random_part(self, image: Image.Image, seed: int) -> Tensor:
        """A random part, resized by Pillow (antialiased, quicker than tensors), maybe mirrored.

        The box is Kornia's; only its pixels are Pillow's.
        """
        assert self._crop is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            shape = torch.Size((1, 3, image.height, image.width))
            corners = self._crop.generate_parameters(shape)["src"][0]
            mirrored = bool(torch.rand(()) < 0.5)
        left, top = corners[0].tolist()
        right, bottom = corners[2].tolist()
        box = (left, top, min(right + 1, image.width), min(bottom + 1, image.height))
        part = image.resize((self._size, self._size), Image.Resampling.BILINEAR, box)
        pixels = _pixels(part)
        return pixels.flip(-1) if mirrored else pixels


def _as_tensor(image: Image.Image, size: int, is_cropped: bool) -> Tensor:
    """An image of the wanted size; the centre of a larger one where it is cropped."""
    if image.size == (size, size):
        return _pixels(image)
    if not is_cropped:
        return _pixels(image.resize((size, size), Image.Resampling.BILINEAR))
    scale = round(size * _SHORTER_SIDE) / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return _pixels(image.crop((left, top, left + size, top + size)))


def _pixels(image: Image.Image) -> Tensor:
    """uint8 ``[C, H, W]``."""
    array = torch.from_numpy(np.array(image))
    return array[None] if array.dim() == 2 else array.permute(2, 0, 1).contiguous()
