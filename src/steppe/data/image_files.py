"""Decode images of unknown origin: the usual formats alone, and none of absurd size."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets.utils.file_utils import xopen
from PIL import Image, ImageOps

from steppe.errors import DataError, OutOfMemoryError

_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # none starts a program


def decode_image(value: Mapping[str, Any] | None) -> Image.Image | None:
    """An image as data sets hold it.

    Args:
        value: ``bytes`` of the file, or its ``path``, as ``datasets.Image(decode=False)`` has it.

    Returns:
        The image, turned as its camera says; None for no image.

    Raises:
        DataError: it is damaged, of another format, has more pixels than
            ``PIL.Image.MAX_IMAGE_PIXELS``, or is no file.
        OutOfMemoryError: it needs more memory than there is.
    """
    if value is None:
        return None
    content, path = value["bytes"], str(value["path"])
    try:
        if content is None and "://" in path:
            with xopen(path, "rb") as remote:
                content = remote.read()
        elif content is None and not Path(path).is_file():
            raise DataError(f"{path}: there is no such file, or it is none that can be read")
        with warnings.catch_warnings():
            # Up to twice the limit Pillow only warns.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path if content is None else io.BytesIO(content), formats=_FORMATS)
        image.load()
        return ImageOps.exif_transpose(image)
    except DataError:
        raise
    except MemoryError:
        raise OutOfMemoryError(f"{path}: the image does not fit into the memory") from None
    except Exception as error:  # Pillow's decoders raise anything, SyntaxError for one
        reason = str(error).partition(" '")[0].partition(" <")[0] or type(error).__name__
        raise DataError(f"{path}: the image cannot be read ({reason}). Fetch it again.") from None
