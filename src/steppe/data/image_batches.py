"""Batches of images, as the checkpoint's own image processor makes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor, PreTrainedModel
from transformers.models.auto.image_processing_auto import get_image_processor_config

from steppe.data.columns import Classes, image_column
from steppe.data.sources import Rows, first_line
from steppe.errors import DataError, MissingExtraError

_MOST_PIXELS = 8192  # of a side to which images are brought
_MEAN = _STD = 0.5  # pixels in 0 … 1 to −1 … 1, as ViT was trained


class Images:
    """Images with their classes; local ones in a fixed random order.

    Args:
        rows: the data.
        model: a model of images.
        place: folder or hub id that has the image processor.
        classes: the model's classes of the data; None for no labels.

    Raises:
        DataError: there is no image, or the processor cannot be loaded.

    Attributes:
        notes: what was assumed, for the user.
    """

    def __init__(
        self, rows: Rows, model: PreTrainedModel, place: str, classes: Classes | None
    ) -> None:
        self._column = image_column(rows)
        self._rows = rows.with_images(self._column).shuffled()
        self._classes = classes
        # Not the model itself, which would stay in memory while later checkpoints are measured.
        self._wanted = image_shape_of(model)
        self._dtype = next((p.dtype for p in model.parameters()), torch.float32)
        self._mode = "L" if getattr(model.config, "num_channels", 3) == 1 else "RGB"
        self._processor, self.notes = _load_processor(place, model)

    def samples(self) -> Iterator[tuple[Any, int]]:
        """Image and class."""
        for row in self._rows:
            image = row[self._column]
            if image is None:
                continue
            label = 0 if self._classes is None else self._classes(row[self._classes.column])
            yield image.convert(self._mode), label

    def collate(self, samples: Sequence[tuple[Any, int]]) -> dict[str, Tensor]:
        """One batch."""
        try:
            made = self._processor([image for image, _ in samples], return_tensors="pt")
        except Exception as error:  # it computes with the values of its file
            raise DataError(
                f"{self._rows.name}: the image processor {type(self._processor).__name__} fails"
                f" ({first_line(error)}). Name another",
                {"processor": "FOLDER_OR_HUB_ID"},
            ) from None
        batch = {"pixel_values": made["pixel_values"].to(self._dtype)}
        if self._classes is not None:
            batch["labels"] = torch.tensor([label for _, label in samples])
        self._wanted.check(batch["pixel_values"], self._rows.name)
        return batch

    def restart(self) -> None:
        """Begin anew."""


@dataclass(frozen=True)
class ImageShape:
    """What images a model takes.

    Attributes:
        model: the model's class.
        shape: channels, height and width; None where its config names no size.
    """

    model: str
    shape: tuple[int, int, int] | None

    def check(self, images: Tensor, where: str) -> None:
        """Refuse images that are not of the model's size.

        Args:
            images: ``[B, C, H, W]``.
            where: the data's name.

        Raises:
            DataError: they differ in channels, height or width.
        """
        got = tuple(images.shape[1:])
        if self.shape is not None and got != self.shape:
            raise DataError(
                f"{where}: {self.model} takes images of {_times(self.shape)} (channels, height,"
                f" width), got {_times(got)}. Name other data, or the model's own image processor",
                {"processor": "FOLDER_OR_HUB_ID"},
            )


def image_shape_of(model: PreTrainedModel) -> ImageShape:
    """What images a model takes, by its config.

    Args:
        model: a model of images.
    """
    return ImageShape(type(model).__name__, _shape_of(model))


def _refuse_absurd(processor: Any) -> None:
    """Refuse sides for which one image would take all memory.

    Raises:
        ValueError: says which.
    """
    for name in ("size", "crop_size", "pad_size"):
        sides: Any = getattr(processor, name, None)
        values = dict(sides).values() if hasattr(sides, "__iter__") else (sides,)
        largest = max((one for one in values if isinstance(one, int | float)), default=0)
        if largest > _MOST_PIXELS:
            raise ValueError(f"{name} of {largest} pixels, expected at most {_MOST_PIXELS}")


def _load_processor(place: str, model: PreTrainedModel) -> tuple[Any, tuple[str, ...]]:
    """The checkpoint's image processor, or one by the model's config, with a note that says so."""
    try:
        if get_image_processor_config(place):
            # PIL, so that numbers do not depend on whether torchvision is installed.
            processor = AutoImageProcessor.from_pretrained(
                place, backend="pil", trust_remote_code=False
            )
            _refuse_absurd(processor)
            return processor, ()
    except ImportError as error:
        raise MissingExtraError(f"{place}: its image processor needs {error}") from None
    except Exception as error:  # of Transformers, which takes the file's values as they are
        raise DataError(
            f"{place}: its image processor cannot be loaded ({first_line(error)}). Name another",
            {"processor": "FOLDER_OR_HUB_ID"},
        ) from None
    shape = _shape_of(model)
    if shape is None:
        raise DataError(
            f"{place}: found no preprocessor_config.json, and the config of {type(model).__name__}"
            " has no image_size. Name an image processor",
            {"processor": "FOLDER_OR_HUB_ID"},
        )
    channels, height, width = shape
    try:
        from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
    except ImportError:
        raise MissingExtraError("images need Pillow: pip install pillow") from None
    processor = ViTImageProcessorPil(
        size={"height": height, "width": width},
        image_mean=[_MEAN] * channels,
        image_std=[_STD] * channels,
    )
    note = (
        f"{place}: no preprocessor_config.json; images are resized to {height} × {width}, divided"
        f" by 255 and normalised with mean {_MEAN} and standard deviation {_STD}"
    )
    return processor, (note,)


def _shape_of(model: PreTrainedModel) -> tuple[int, int, int] | None:
    """Channels, height and width by the model's config."""
    config: Any = model.config
    size = getattr(config, "image_size", None)
    if size is None:
        return None
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(getattr(config, "num_channels", 3)), int(height), int(width)


def _times(shape: Sequence[int]) -> str:
    return " × ".join(str(size) for size in shape)
