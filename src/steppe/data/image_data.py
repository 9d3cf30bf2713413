"""Images to train on: IDX files, folders of images, ``save_to_disk``, parquet, or the hub's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
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
from steppe.data.idx import is_idx_folder, load_idx_folder
from steppe.data.image_files import decode_image
from steppe.data.sources import HELD_OUT, Rows, Source, first_line, open_splits
from steppe.errors import DataError

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
        notes: what was assumed of the data, for the user.
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
            centre of held-out images.
        held_out_split: by default the validation or test split, or a tenth of the only one.
        held_out_samples: the first so many of the held-out images; 0 for all.

    Raises:
        DataError: the data is not there, cannot be read, or has no images, classes, or split.
    """
    folder = Path(data).expanduser()
    if is_idx_folder(folder):
        parts = load_idx_folder(folder)
        train, held_out = (_TensorImages(*parts[name], size, channels) for name in parts)
        names = [str(index) for index in range(int(parts["train"][1].max()) + 1)]
        return ImageData(train, _first(held_out, held_out_samples), names)
    splits = open_splits(data, streaming=False)
    notes: tuple[str, ...] = ()
    if "train" not in splits and len(splits) > 1:
        raise DataError(f"{data}: expected a split 'train', it has {', '.join(splits)}")
    train_rows = splits.get("train", next(iter(splits.values())))
    name = held_out_split or next((name for name in HELD_OUT if name in splits), None)
    if name is None:
        cut = train_rows.train_test_split(_HELD_OUT_SHARE, seed=0)
        train_rows, held_out_rows = cut["train"], cut["test"]
        notes = (f"{data}: no held-out split; a tenth of the images is held out",)
    elif name in splits:
        held_out_rows = splits[name]
    else:
        raise DataError(
            f"{data}: expected a split {name!r}, it has {', '.join(splits)}",
            {"held_out_split": "NAME"},
        )
    source = Source(data)
    rows = Rows(train_rows, source, "train", is_local=True)
    image, label = image_column(rows), label_column(rows)
    feature = train_rows.features[label]
    if not isinstance(feature, datasets.ClassLabel):
        train_rows = train_rows.class_encode_column(label)
        held_out_rows = held_out_rows.cast_column(label, train_rows.features[label])
        feature = train_rows.features[label]
    undecoded = datasets.Image(decode=False)
    made = [
        _RowImages(split.cast_column(image, undecoded), image, label, size, channels, *how)
        for split, how in ((train_rows, (crop, crop)), (held_out_rows, (False, crop)))
    ]
    return ImageData(made[0], _first(made[1], held_out_samples), list(feature.names), notes)


class _TensorImages(Dataset[Item]):
    """Grey images that fit into memory."""

    def __init__(self, images: Tensor, labels: Tensor, size: int, channels: int) -> None:
        self._images = images
        self._labels = labels
        self._size = size
        self._channels = channels

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, key: Draw | int) -> Item:
        index = as_draw(key).sample
        image = self._images[index]
        if image.shape != (self._size, self._size):
            image = _as_tensor(Image.fromarray(image.numpy()), self._size, False)[0]
        return {
            "pixel_values": image.expand(self._channels, -1, -1),
            "labels": self._labels[index],
        }


class _RowImages(Dataset[Item]):
    """Images that are decoded when they are asked for."""

    def __init__(
        self,
        rows: Any,
        image: str,
        label: str,
        size: int,
        channels: int,
        is_random: bool,
        is_cropped: bool,
    ) -> None:
        self._rows = rows
        self._image = image
        self._label = label
        self._size = size
        self._mode = "L" if channels == 1 else "RGB"
        self._crop = RandomResizedCrop((size, size), scale=(0.08, 1.0)) if is_random else None
        self._is_cropped = is_cropped

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: Draw | int) -> Item:
        draw = as_draw(key)
        try:
            row = self._rows[draw.sample]
            image = decode_image(row[self._image]).convert(self._mode)  # type: ignore[union-attr]
        except DataError:
            raise
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(
                f"image {draw.sample} cannot be read ({first_line(error)}). Fetch it anew."
            ) from None
        if self._crop is None:
            pixels = _as_tensor(image, self._size, self._is_cropped)
        else:
            pixels = self._random_part(image, draw.seed)
        return {"pixel_values": pixels, "labels": torch.tensor(row[self._label])}

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


def _first(data: Dataset[Item], number: int) -> Dataset[Item]:
    """The first so many items; all for 0."""
    if not number:
        return data
    return torch.utils.data.Subset(data, range(min(number, len(data))))  # type: ignore[arg-type]
