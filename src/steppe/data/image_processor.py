"""The image processor of a checkpoint, and the size of image that its model takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import AutoImageProcessor, PreTrainedModel
from transformers.models.auto.image_processing_auto import get_image_processor_config

from steppe.data.read_errors import first_line
from steppe.errors import DataError, MissingExtraError

_MOST_PIXELS = 8192  # of a side to which images are brought
_MEAN = _STD = 0.5  # pixels in 0 … 1 to −1 … 1, as ViT was trained


@dataclass(frozen=True)
class ImageShape:
    """Size of the images that a model takes.

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
    """Size of the images that a model takes, by its config.

    Args:
        model: a model of images.
    """
    return ImageShape(type(model).__name__, _shape_of(model))


def load_processor(place: str, model: PreTrainedModel) -> tuple[Any, tuple[str, ...]]:
    """The checkpoint's image processor, or one by the model's config, with a note that says so.

    Args:
        place: folder or hub id; code that comes with it is never run.
        model: a model of images.

    Returns:
        The processor, and the assumptions, for the user.

    Raises:
        DataError: it cannot be loaded, or there is none and the config names no size.
        MissingExtraError: a package that it needs is not installed.
    """
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
