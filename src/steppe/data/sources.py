"""Held-out data by name: embedded, in a file or folder, or on the Hugging Face hub."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import datasets
from datasets.exceptions import DatasetsError

from steppe.data.data_files import check_as_read, check_parquet, check_saved
from steppe.data.idx import is_idx_folder, load_idx_folder
from steppe.data.image_files import decode_image
from steppe.errors import DataError, MissingExtraError, OutOfMemoryError, SteppeError

EMBEDDED = ("digits", "pydoc")
"""Sets that come with dependencies; a folder of the name is ``./digits``."""
WHOLE = "full"
"""What the only split is called where the names of files and folders tell none."""
_BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")  # after .txt, .json, .jsonl
_UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".aria2")  # of a download
_IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
HELD_OUT = ("validation", "valid", "val", "dev", "test")
"""Names of held-out splits, the first that is there is taken."""
_OPTIONS: dict[str, dict[str, Any]] = {
    "text": {"keep_linebreaks": True},
    "parquet": {"batch_size": 1000},  # rows; by default as many as the file has together
}
_SHUFFLE_BUFFER = 1000  # rows
_SHOWN = 300  # characters of another library's message
_Data: TypeAlias = "datasets.Dataset | datasets.IterableDataset"


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
        target_column: column of what an encoder-decoder model shall answer.
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
        """What is known of the types of the columns, by column; maybe nothing."""
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
        """The rows, errors of reading told by the data's name.

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
                raise _unreadable(f"{self.name}: a row cannot be read", error) from None
            yield {**row, **{name: decode_image(row[name]) for name in self._images}}

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
            raise _unreadable(f"{self.name}: column {column!r} holds no images", error) from None
        return Rows(data, self.source, self.split, self.is_local, self.is_plain_text, self._files)


def open_rows(source: Source) -> Rows:
    """The rows of a file, a folder or a data set on the hub; the latter are streamed.

    Files are read where they lie, by the builders of ``datasets``; nothing is copied, and code that
    comes with data is never run.

    Args:
        source: any but an embedded one.

    Returns:
        The rows of the split.

    Raises:
        DataError: the data is not there, cannot be read, has no such split, or no rows.
        MissingExtraError: a package that decodes it is not installed.
    """
    opened = _open(source.data, streaming=True)
    split = _choose_split(source, opened.splits, opened.is_local)
    number = len(opened.files.get(split, ())) if opened.builder == "imagefolder" else 0
    is_plain_text = opened.builder == "text"
    return Rows(opened.splits[split], source, split, opened.is_local, is_plain_text, number)


def open_splits(data: str, streaming: bool) -> dict[str, _Data]:
    """All splits of a data set, for training.

    Args:
        data: as `Source.data`, but no embedded set.
        streaming: read rows as they are asked for, and shard by files; else all of it is prepared
            once, in the cache folder of ``datasets``, and rows can be picked by number.

    Returns:
        ``datasets.Dataset`` or ``datasets.IterableDataset`` by the split's name; `WHOLE` where the
        data has only one without a name.

    Raises:
        DataError: the data is not there, or cannot be read.
        MissingExtraError: a package that decodes it is not installed.
    """
    return dict(_open(data, streaming).splits)


@dataclass(frozen=True)
class _Opened:
    """Data by split, and what is known of it."""

    splits: Mapping[str, Any]
    is_local: bool
    builder: str = ""
    files: Mapping[str, list[str]] = field(default_factory=dict)


def _open(data: str, streaming: bool) -> _Opened:
    """The splits of a file, a folder or a data set on the hub."""
    path = Path(data).expanduser()
    if path.is_dir() and any(
        (path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json", "state.json")
    ):
        return _open_saved(data, path)
    if is_idx_folder(path):
        return _open_idx(path)
    if path.is_dir():
        return _open_files(data, *_files_of(data, path), streaming)
    if path.is_file():
        builder = _builder_of(path)
        if builder is None:
            raise DataError(
                f"{data}: expected a file {', '.join(f'*{end}' for end in _BUILDERS)}, or a"
                " folder of those or of images"
            )
        return _open_files(data, builder, {WHOLE: [str(path)]}, streaming)
    if _looks_like_a_path(data):
        raise DataError(
            f"{data}: there is no such file or folder. Expected a path, the id of a data set"
            f" on the Hugging Face hub, or one of the embedded {', '.join(EMBEDDED)}"
        )
    return _open_hub(data, streaming)


def _open_files(
    data: str, builder: str, files: Mapping[str, list[str]], streaming: bool
) -> _Opened:
    """Files that one builder reads, by split."""
    try:
        # All splits, so that the classes of an image folder are those of all of them.
        reader = datasets.load_dataset_builder(
            builder, data_files=dict(files), **_OPTIONS.get(builder, {})
        )
        check_as_read(reader)
        if builder == "parquet":
            check_parquet(next(iter(files.values()))[0])
        if streaming:
            splits = reader.as_streaming_dataset()
        else:
            reader.download_and_prepare()
            splits = reader.as_dataset()
    except Exception as error:  # of any reader and decoder, damaged files raise anything
        raise _unreadable(f"{data}: cannot be read", error) from None
    return _Opened(splits, True, builder, files)


def _open_idx(folder: Path) -> _Opened:
    """MNIST's four files, as rows of images and classes."""
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    splits = {
        split: datasets.IterableDataset.from_generator(
            _idx_rows, features, gen_kwargs={"folder": str(folder), "split": split}
        )
        for split in load_idx_folder(folder)
    }
    return _Opened(splits, is_local=True)


def _idx_rows(folder: str, split: str) -> Iterator[dict[str, Any]]:
    images, labels = load_idx_folder(Path(folder))[split]
    for image, label in zip(images.numpy(), labels.tolist(), strict=True):
        yield {"image": image, "label": label}


def _open_saved(data: str, path: Path) -> _Opened:
    """What ``save_to_disk`` wrote, mapped into memory."""
    try:
        check_saved(path)
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # as of the other readers
        raise _unreadable(
            f"{data}: looks like a folder of Dataset.save_to_disk and cannot be read", error
        ) from None
    splits = saved if isinstance(saved, datasets.DatasetDict) else {WHOLE: saved}
    return _Opened(splits, is_local=True)


def _open_hub(data: str, streaming: bool) -> _Opened:
    """A data set on the hub, downloaded as it is asked for where it is streamed."""
    name, _, config = data.partition(":")
    try:
        splits = datasets.load_dataset(name, config or None, streaming=streaming)
    except ImportError as error:
        raise MissingExtraError(f"{data}: {error}") from None
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(
            f"{data}: expected a file, a folder, one of {', '.join(EMBEDDED)}, or the id of"
            f" a data set on the Hugging Face hub, as id or id:config ({first_line(error)})"
        ) from None
    return _Opened(splits, is_local=False)


def _choose_split(source: Source, splits: Mapping[str, Any], is_local: bool) -> str:
    """The split that was asked for, or one that is held out."""
    there = ", ".join(sorted(splits))
    if source.split is not None:
        if source.split in splits:
            return source.split
        raise DataError(f"{source.data}: expected a split {source.split!r}, it has: {there}")
    if len(splits) == 1 and (is_local or next(iter(splits)) in HELD_OUT):
        return next(iter(splits))
    for name in HELD_OUT:
        if name in splits:
            return name
    raise DataError(
        f"{source.data}: none of its splits ({there}) is called validation or test. Say which one"
        " is held out",
        {"split": sorted(splits)[0]},
    )


def _files_of(data: str, folder: Path) -> tuple[str, dict[str, list[str]]]:
    """The builder for what lies in a folder, and the files by split."""
    by_builder: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in _UNFINISHED:
            raise DataError(f"{path}: a download that did not end. Fetch the file anew.")
        relative = path.relative_to(folder)
        builder = _builder_of(path)
        hidden = any(part.startswith(".") for part in relative.parts)
        if builder is not None and path.is_file() and not hidden:
            by_builder.setdefault(builder, []).append(relative)
    if "imagefolder" in by_builder:
        # Beside images, metadata.jsonl and the like belong to the builder of images.
        for builder in ("json", "parquet"):
            extra = [path for path in by_builder.get(builder, []) if path.stem == "metadata"]
            if extra and extra == by_builder[builder]:
                by_builder["imagefolder"] += by_builder.pop(builder)
    if len(by_builder) != 1:
        kinds = ", ".join(f"{name} ({len(paths)})" for name, paths in by_builder.items())
        raise DataError(
            f"{data}: expected a folder of one kind of files, {', '.join(_BUILDERS)},"
            f" images or IDX files, found {kinds or 'none'}. Name a single file, or the folder of"
            " one kind."
        )
    builder, paths = next(iter(by_builder.items()))
    tops = {path.parts[0].lower() for path in paths if len(path.parts) > 1}
    # A class may be called "train", so a folder of images is a split only if all folders are.
    by_name = builder != "imagefolder" or tops <= set(_SPLIT_WORDS)
    files: dict[str, list[str]] = {}
    for path in paths:
        split = (_split_of(path, builder) if by_name else None) or WHOLE
        files.setdefault(split, []).append(str(folder / path))
    return builder, files


def _split_of(path: Path, builder: str) -> str | None:
    """The split that a path within a folder of data names, if it does."""
    words = [part.lower() for part in path.parts[:-1]]
    if builder != "imagefolder":
        words += re.split(r"[-._ \d]", path.name.lower())  # c4-train.00000-of-01024.json.gz
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), None)


def _builder_of(path: Path) -> str | None:
    """The builder of ``datasets`` that reads a file."""
    ending = path.suffix.lower()
    if ending in _COMPRESSED:
        inner = _BUILDERS.get(Path(path.stem).suffix.lower())
        return inner if inner != "parquet" else None
    return "imagefolder" if ending in _IMAGES else _BUILDERS.get(ending)


def _looks_like_a_path(data: str) -> bool:
    """Whether a name can be no hub id."""
    return (
        data.startswith((".", "/", "~"))
        or data.count("/") > 1
        or "\\" in data
        or _builder_of(Path(data)) is not None
    )


@contextmanager
def reading(data: str) -> Iterator[None]:
    """Tell the errors of ``datasets``, which a stream raises wherever it is read, by its name.

    Args:
        data: as the user named it.

    Raises:
        DataError: a file is damaged, ends too early, or has other columns than the first.
    """
    try:
        yield
    except SteppeError:
        raise
    except Exception as error:
        of_worker = "in DataLoader worker process" in str(error)  # whose frames are only told
        frames = [frame.f_globals for frame, _ in traceback.walk_tb(error.__traceback__)]
        if not of_worker and not any(
            str(names.get("__name__")).partition(".")[0] == "datasets" for names in frames
        ):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        told = lines[-1] if of_worker else " ".join(line.strip() for line in lines)
        raise DataError(
            f"{data}: cannot be read on ({told[:_SHOWN]}). Were all files downloaded whole, and"
            " have they the same columns?"
        ) from None


def _unreadable(what: str, error: Exception) -> SteppeError:
    """The error for one of a library that reads or decodes files; ours stays as it is."""
    while isinstance(error, DatasetsError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # "an error occurred while generating the dataset"
    if isinstance(error, SteppeError):
        return error
    if isinstance(error, ImportError):
        return MissingExtraError(f"{what}: {first_line(error)}")
    if isinstance(error, MemoryError):
        return OutOfMemoryError(f"{what} ({first_line(error)}). It does not fit into the memory.")
    told = "there is nothing in it" if isinstance(error, StopIteration) else first_line(error)
    return DataError(
        f"{what} ({told}). Is a file damaged or cut short, or of another format than its name says?"
        " Fetch it anew."
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class where it has none.

    Args:
        error: of a library.

    Returns:
        Text without a full stop, of at most some hundred characters.
    """
    lines = str(error).strip().splitlines()
    return lines[0][:_SHOWN].rstrip(".") if lines else type(error).__name__
