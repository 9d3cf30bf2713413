"""Rows of one split, decoded with care, in order or by number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import datasets

from steppe.data.image_files import decode_image
from steppe.data.read_errors import unreadable
from steppe.data.sources import Source, open_data
from steppe.data.splits import measured_split
from steppe.errors import DataError

_SHUFFLE_BUFFER = 1000  # rows
_Data: TypeAlias = "datasets.Dataset | datasets.IterableDataset"


class Rows:
    """Rows of one split, as the data has them; iterating again starts again.

    Args:
        data: the rows.
        source: where they come from.
        split: the split's name.
        is_local: whether reading all of it costs no download.
        is_plain_text: whether the rows are lines of text files, with their line breaks.
        files: number of image files, 0 for other data.

    Raises:
        DataError: there is no row, or the first cannot be read.

    Attributes:
        first: the first row.
        name: data and split, for messages.
    """

    def __init__(
        self,
        data: _Data,
        source: Source,
        split: str,
        is_local: bool = False,
        is_plain_text: bool = False,
        files: int = 0,
    ) -> None:
        features = data.features or {}
        self._images = [name for name in features if isinstance(features[name], datasets.Image)]
        for name in self._images:
            data = data.cast_column(name, datasets.Image(decode=False))
        self._data = data
        self._files = files
        self.source = source
        self.split = split
        self.is_local = is_local
        self.is_plain_text = is_plain_text
        self.name = f"{source.data} ({split})"
        first = next(iter(self), None)
        if first is None:
            raise DataError(f"{self.name}: expected rows, there are none")
        self.first: dict[str, Any] = first

    @property
    def features(self) -> Mapping[str, Any]:
        """Types of the columns, as far as they are known, by column."""
        return self._data.features or {}

    @property
    def number(self) -> int | None:
        """Number of rows, None where only reading them would tell."""
        if isinstance(self._data, datasets.Dataset):
            return len(self._data)
        info = self._data.info.splits
        known = info[self.split].num_examples if info and self.split in info else None
        return self._files or known or None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rows; an error of reading gets the data's name.

        Raises:
            DataError: a file is damaged, or gone.
            MissingExtraError: a package that decodes a column is not installed.
        """
        rows = iter(self._data)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # of any reader and decoder
                raise unreadable(f"{self.name}: a row cannot be read", error) from None
            yield self._decoded(row)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row by its number; of data that was not streamed.

        Raises:
            DataError: an image is damaged, or gone.
        """
        assert isinstance(self._data, datasets.Dataset)
        return self._decoded(self._data[index])

    def shuffled(self) -> Rows:
        """Local rows in a fixed random order, so that the first batches are not all one class.

        Rows from the hub stay as they are: a shuffle would download them first.
        """
        if not self.is_local:
            return self
        data = (
            self._data.shuffle(seed=0)
            if isinstance(self._data, datasets.Dataset)
            # Undecoded, an image of a folder is its path: all of them fit.
            else self._data.shuffle(seed=0, buffer_size=max(self._files, _SHUFFLE_BUFFER))
        )
        return Rows(data, self.source, self.split, True, self.is_plain_text, self._files)

    def with_images(self, column: str) -> Rows:
        """The same with a column decoded to images."""
        if isinstance(self.features.get(column), datasets.Image):
            return self
        try:
            data = self._data.cast_column(column, datasets.Image())
        except Exception as error:  # of pyarrow
            raise unreadable(f"{self.name}: column {column!r} holds no images", error) from None
        return Rows(data, self.source, self.split, self.is_local, self.is_plain_text, self._files)

    def _decoded(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row with its images decoded by `decode_image`, which ``datasets`` must not do."""
        return {**row, **{name: decode_image(row[name]) for name in self._images}}


def open_rows(source: Source) -> Rows:
    """The rows to measure on; those of the hub are streamed.

    Args:
        source: any but an embedded one.

    Returns:
        The rows of the split.

    Raises:
        DataError: the data is not there, cannot be read, has no such split, or no rows.
        MissingExtraError: a package that decodes it is not installed.
    """
    opened = open_data(source.data, streaming=True)
    split = measured_split(source.data, opened.splits, source.split, opened.is_local)
    number = len(opened.files.get(split, ())) if opened.builder == "imagefolder" else 0
    is_plain_text = opened.builder == "text"
    return Rows(opened.splits[split], source, split, opened.is_local, is_plain_text, number)
