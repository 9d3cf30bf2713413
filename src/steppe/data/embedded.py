"""The two real data sets that come with dependencies: nothing is downloaded."""

from __future__ import annotations

import pydoc_data.topics
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from steppe.errors import MissingExtraError

EMBEDDED = ("digits", "pydoc")
"""Their names; a folder of the name is ``./digits``."""
BYTES = 256  # size of the vocabulary of bytes
_PIXEL_MEAN, _PIXEL_STD = 4.88, 6.02  # over all digits; a pixel is 0 … 16


class TensorDataset(Dataset[dict[str, Tensor]]):
    """Named tensors of equal length, one row of each per item.

    Args:
        tensors: by the name of the model's keyword argument, each ``[items, ...]``.
    """

    def __init__(self, **tensors: Tensor) -> None:
        self._tensors = tensors
        self._length = len(next(iter(tensors.values())))

    def __len__(self) -> int:
        """Number of items."""
        return self._length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One item, by the names of the model's keyword arguments."""
        return {name: tensor[index] for name, tensor in self._tensors.items()}


@dataclass(frozen=True)
class Split:
    """A data set in two disjoint parts."""

    train: TensorDataset
    held_out: TensorDataset


def load_digits_split(held_out: float = 0.2, seed: int = 0) -> Split:
    """scikit-learn's handwritten digits: 1,797 images of 8 × 8 pixels in 10 classes.

    Args:
        held_out: share of each class that is held out.
        seed: decides which images are held out; the same for all runs.

    Returns:
        ``pixel_values`` float32 ``[N, 1, 8, 8]``, standardised, and ``labels`` int64 ``[N]``.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise MissingExtraError(
            "the digits come with scikit-learn: pip install 'steppe[demo]'"
        ) from None
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=held_out, random_state=seed, stratify=labels)
    train_x, test_x, train_y, test_y = (torch.as_tensor(part) for part in parts)
    return Split(_digits(train_x, train_y), _digits(test_x, test_y))


def load_pydoc_split(context: int = 64, held_out: float = 0.1) -> Split:
    """The English text of CPython's own ``pydoc_data.topics`` as bytes, in windows.

    The topics are shuffled once, by name, and the last of them are held out whole.

    Args:
        context: bytes per window.
        held_out: share of the text that is held out.

    Returns:
        ``input_ids`` and ``labels`` int64 ``[N, context]``, equal (models shift them).
    """
    names = sorted(pydoc_data.topics.topics)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [pydoc_data.topics.topics[names[i]].encode() for i in order]
    wanted = held_out * sum(map(len, texts))
    last = len(texts)
    size = 0
    while size < wanted:
        last -= 1
        size += len(texts[last])
    return Split(_windows(texts[:last], context), _windows(texts[last:], context))


def _digits(images: Tensor, labels: Tensor) -> TensorDataset:
    pixels = (images.to(torch.float32).reshape(-1, 1, 8, 8) - _PIXEL_MEAN) / _PIXEL_STD
    return TensorDataset(pixel_values=pixels, labels=labels.to(torch.int64))


def _windows(texts: list[bytes], context: int) -> TensorDataset:
    data = torch.frombuffer(bytearray(b"\n".join(texts)), dtype=torch.uint8).to(torch.int64)
    ids = data[: len(data) // context * context].reshape(-1, context)
    return TensorDataset(input_ids=ids, labels=ids)
