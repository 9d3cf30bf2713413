"""Open data by name: a file, a folder, or a data set on the Hugging Face hub.

Each kind of source is an `Opener` in a file of its own, and a line in `OPENERS`. Another one is a
file with ``takes`` and ``open``, and its line.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from steppe.data.hub import HUB
from steppe.data.idx import IDX
from steppe.data.local_files import FILE, FOLDER
from steppe.data.opened import Opened, Opener
from steppe.data.save_to_disk import SAVE_TO_DISK
from steppe.errors import DataError

OPENERS: list[Opener] = [
    SAVE_TO_DISK,  # before FOLDER, which would read the JSON files beside its tables as data
    IDX,  # before FOLDER, which knows files by their endings and would find none
    FOLDER,
    FILE,
    HUB,  # last: any other name may be an id
]
"""The kinds of sources. The first one that takes a name opens it."""


@dataclass(frozen=True)
class Source:
    """Held-out data by name, and how a model shall see it.

    Attributes:
        data: ``digits`` or ``pydoc`` (embedded); a file ``*.txt``, ``*.jsonl``, ``*.json`` (plain
            or compressed), ``*.parquet``; a folder of such files, of images in one folder a class,
            of MNIST's IDX files, or written by ``Dataset.save_to_disk``; or the id of a data set on
            the Hugging Face hub, with ``id:config`` for one of its configurations.
        split: which split; by default the validation or test split, or the only one there is.
        batch_size: samples per batch.
        max_length: tokens per sample; by default the model's limit or 512, whichever is less.
        text_column: column of the text; by default ``text``, or the only one of strings.
        target_column: column of the answers that an encoder-decoder model shall give.
        label_column: column of the classes; by default ``label`` or ``labels``.
        processor: folder or hub id whose tokenizer or image processor is used; by default the
            checkpoint's own.

    Raises:
        DataError: `batch_size` or `max_length` is below 1.
    """

    data: str
    split: str | None = None
    batch_size: int = 8
    max_length: int | None = None
    text_column: str | None = None
    target_column: str | None = None
    label_column: str | None = None
    processor: str | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.batch_size < 1 or (self.max_length is not None and self.max_length < 1):
            raise DataError(
                f"{self.data}: expected a batch size and a length of at least 1, got"
                f" {self.batch_size} and {self.max_length}"
            )


def open_data(data: str, streaming: bool) -> Opened:
    """The splits of a file, a folder or a data set on the hub.

    Files are read where they lie, by the builders of ``datasets``; nothing is copied, and code that
    comes with data is never run.

    Args:
        data: as `Source.data`, but no embedded set, which has no rows.
        streaming: read rows as they are asked for, and shard by files, as measuring does; else all
            of it is prepared once, in the cache folder of ``datasets``, and rows can be picked by
            number, as training does.

    Raises:
        DataError: the data is not there, or cannot be read.
        MissingExtraError: a package that decodes it is not installed.
    """
    path = Path(data).expanduser()
    opener = next(one for one in OPENERS if one.takes(data, path))
    return opener.open(data, path, streaming)
