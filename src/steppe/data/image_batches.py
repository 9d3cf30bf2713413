"""Batches of images to measure on, as the checkpoint's own image processor makes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from steppe.data.columns import Classes, image_column
from steppe.data.image_processor import image_shape_of, load_processor
from steppe.data.images import RowImages, Sample, mode_of
from steppe.data.read_errors import first_line
from steppe.data.rows import Rows
from steppe.errors import DataError


class ImageBatches:
    """Images with their classes; local ones in a fixed random order.

    Args:
        rows: the data.
        model: a model of images.
        place: folder or hub id that has the image processor.
        classes: the model's classes of the data; None for no labels.

    Raises:
        DataError: there is no image, or the processor cannot be loaded.

    Attributes:
        notes: assumptions about the data, for the user.
    """

    def __init__(
        self, rows: Rows, model: PreTrainedModel, place: str, classes: Classes | None
    ) -> None:
        column = image_column(rows)
        mode = mode_of(getattr(model.config, "num_channels", 3))
        shuffled = rows.with_images(column).shuffled()
        self._images = RowImages(shuffled, column, mode, _no_class if classes is None else classes)
        self._name = rows.name
        self._labelled = classes is not None
        # Not the model itself, which would stay in memory while later checkpoints are measured.
        self._wanted = image_shape_of(model)
        self._dtype = next((p.dtype for p in model.parameters()), torch.float32)
        self._processor, self.notes = load_processor(place, model)

    def samples(self) -> Iterator[Sample]:
        """Image and class."""
        return iter(self._images)

    def collate(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """One batch."""
        try:
            made = self._processor([image for image, _ in samples], return_tensors="pt")
        except Exception as error:  # it computes with the values of its file
            raise DataError(
                f"{self._name}: the image processor {type(self._processor).__name__} fails"
                f" ({first_line(error)}). Name another",
                {"processor": "FOLDER_OR_HUB_ID"},
            ) from None
        batch = {"pixel_values": made["pixel_values"].to(self._dtype)}
        if self._labelled:
            batch["labels"] = torch.tensor([label for _, label in samples])
        self._wanted.check(batch["pixel_values"], self._name)
        return batch

    def restart(self) -> None:
        """Go back to the first sample; nothing is random."""


def _no_class(row: Mapping[str, Any]) -> int:
    """Any class, where none is asked for."""
    return 0
