"""Images are decoded from their bytes or their file, and from nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from steppe.data.image_files import decode_image
from steppe.errors import DataError


def test_an_image_is_decoded_from_its_bytes_or_its_file_and_from_nothing_else(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (3, 2), (255, 0, 0)).save(path)
    for value in (
        {"bytes": path.read_bytes(), "path": None},
        {"bytes": None, "path": str(path)},
    ):
        image = decode_image(value)
        assert image is not None
        assert (image.size, image.getpixel((0, 0))) == ((3, 2), (255, 0, 0))
    assert decode_image(None) is None
    # PostScript would be given to a program.
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    with pytest.raises(DataError, match="cannot be read"):
        decode_image({"bytes": None, "path": str(path)})
    with pytest.raises(DataError, match="no such file"):
        decode_image({"bytes": None, "path": "/dev/zero"})
