"""Images with their classes, by number or in order, for training and for measuring."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeAlias

from PIL import Image
from torch import Tensor

from steppe.data.read_errors import first_line
from steppe.data.rows import Rows
from steppe.errors import DataError

Sample: TypeAlias = tuple[Image.Image, int]


class Images(Protocol):
    """Images that can be picked by number."""

    def __len__(self) -> int:
        """Number of images."""

    def __getitem__(self, index: int) -> Sample:
        """An image and its class."""


def mode_of(channels: int) -> str:
    """Pillow's mode of images with so many channels.

    Args:
        channels: 1 (grey) or 3.
    """
    return "L" if channels == 1 else "RGB"


class RowImages:
    """Images of rows, decoded when they are asked for.

    Args:
        rows: the data.
        column: of the images.
        mode: Pillow's, which they are converted to.
        class_of: the class of a row.

    Raises:
        DataError: the column holds no images.
    """

    def __init__(
        self, rows: Rows, column: str, mode: str, class_of: Callable[[Mapping[str, Any]], int]
    ) -> None:
        self._rows = rows.with_images(column)
        self._column = column
        self._mode = mode
        self._class_of = class_of

    def __len__(self) -> int:
        return self._rows.number or 0

    def __getitem__(self, index: int) -> Sample:
        """An image and its class, of rows that were not streamed.

        Raises:
            DataError: the image is damaged, or missing.
        """
        try:
            return self._sample(self._rows[index])
        except DataError:
            raise
        except (OSError, ValueError, AttributeError) as error:
            raise DataError(
                f"image {index} cannot be read ({first_line(error)}). Fetch it again."
            ) from None

    def __iter__(self) -> Iterator[Sample]:
        """All images; rows without one are left out.

        Raises:
            DataError: an image is damaged, or gone.
        """
        return (self._sample(row) for row in self._rows if row[self._column] is not None)

    def _sample(self, row: Mapping[str, Any]) -> Sample:
        return row[self._column].convert(self._mode), self._class_of(row)


class TensorImages:
    """Grey images that are in memory.

    Args:
        images: uint8 ``[N, H, W]``.
        labels: int64 ``[N]``.
        mode: Pillow's, which they are converted to.
    """

    def __init__(self, images: Tensor, labels: Tensor, mode: str) -> None:
        self._images = images
        self._labels = labels
        self._mode = mode

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Sample:
        """An image and its class."""
        image = Image.fromarray(self._images[index].numpy())
        return image.convert(self._mode), int(self._labels[index])
