"""Images in IDX files, as MNIST and Fashion-MNIST come."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import torch
from torch import Tensor

from steppe.data.opened import Opened, Opener
from steppe.errors import DataError

MAX_BYTES = 1 << 30
"""Of the images or classes in one file: 1 GiB; they are kept in memory."""
_BLOCK = 1 << 24  # bytes
_SHOWN = 4
_UINT8 = 0x08  # the type code of unsigned bytes
_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_CURE = (
    "Put the four files of MNIST's kind into one folder (Fashion-MNIST: its repository, or Debian's"
    " package dataset-fashion-mnist) and name it"
)
_NAMED = {"data_dir": "FOLDER"}


def load_idx_folder(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """The images and classes of a folder of MNIST's four files, plain or gzipped.

    Args:
        folder: of the files.

    Returns:
        By ``train`` and ``test``: images uint8 ``[N, H, W]`` and classes int64 ``[N]``.

    Raises:
        DataError: a file is missing, damaged, or does not fit the other.
    """
    found = {}
    for split, (images, labels) in _FILES.items():
        pixels, classes = (read_idx(_file(folder, name)) for name in (images, labels))
        if pixels.dim() != 3 or classes.shape != pixels.shape[:1]:
            raise DataError(
                f"{folder}: expected {images} [N, H, W] and {labels} [N], got"
                f" {list(pixels.shape)} and {list(classes.shape)}. {_CURE}",
                _NAMED,
            )
        found[split] = (pixels, classes.to(torch.int64))
    return found


def read_idx(path: Path) -> Tensor:
    """An IDX file of unsigned bytes, plain or gzipped.

    Args:
        path: the file.

    Returns:
        uint8, of the shape in its header.

    Raises:
        DataError: it cannot be read, is cut short, or is no such file.
    """
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else path.open("rb") as file:
            return _read(path, file)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: cannot be read, or is cut short ({error}). Fetch it again."
        ) from None


def _takes(data: str, path: Path) -> bool:
    """A folder that has IDX files, complete or not."""
    return path.is_dir() and any(path.glob("*-idx[13]-ubyte*"))


def _open(data: str, path: Path, streaming: bool) -> Opened:
    """MNIST's four files: in memory, and as streams of rows; streaming or not is the same.

    Raises:
        DataError: a file is missing or damaged.
    """
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    parts = load_idx_folder(path)
    splits = {
        split: datasets.IterableDataset.from_generator(
            _rows, features, gen_kwargs={"folder": str(path), "split": split}
        )
        for split in parts
    }
    return Opened(splits, is_local=True, tensors=parts)


def _rows(folder: str, split: str) -> Iterator[dict[str, Any]]:
    """Rows of an image and its class."""
    images, labels = load_idx_folder(Path(folder))[split]
    for image, label in zip(images.numpy(), labels.tolist(), strict=True):
        yield {"image": image, "label": label}


def _read(path: Path, file: BinaryIO | gzip.GzipFile) -> Tensor:
    """The header, and then as many bytes as it says."""
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] != _UINT8:
        raise DataError(
            f"{path}: expected an IDX file of unsigned bytes (00 00 08 …), it begins with"
            f" {magic.hex(' ') or 'nothing'}. Fetch it again."
        )
    header = file.read(4 * magic[3])
    sizes = [int.from_bytes(header[at : at + 4], "big") for at in range(0, 4 * magic[3], 4)]
    said = f"{path}: its header says {' × '.join(map(str, sizes[:_SHOWN]))} bytes"
    if len(header) < 4 * magic[3] or not 0 < math.prod(sizes) <= MAX_BYTES:
        raise DataError(f"{said}, expected 1 … {MAX_BYTES}. Fetch it again.")
    # Little by little: a damaged header may say anything.
    data = bytearray()
    while len(data) < math.prod(sizes) and (block := file.read(_BLOCK)):
        data += block
    if len(data) != math.prod(sizes) or file.read(1):
        raise DataError(f"{said}, got {len(data)}. Was it downloaded whole? Fetch it again.")
    return torch.frombuffer(data, dtype=torch.uint8).reshape(sizes)


def _file(folder: Path, name: str) -> Path:
    """A file of the folder, plain or gzipped."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(f"{folder}: found no {name}, nor {name}.gz. {_CURE}", _NAMED)


IDX = Opener("IDX", _takes, _open)
