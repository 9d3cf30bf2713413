"""Files and folders of text, JSON, parquet or images, read where they lie."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets

from steppe.data.file_checks import check_as_read, check_parquet
from steppe.data.opened import WHOLE, Opened, Opener
from steppe.data.read_errors import unreadable
from steppe.errors import DataError

_BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")  # after .txt, .json, .jsonl
_UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".aria2")  # of a download
_IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "text": {"keep_linebreaks": True},
    "parquet": {"batch_size": 1000},  # rows; by default as many as the file has together
}


def builder_of(path: Path) -> str | None:
    """The builder of ``datasets`` that reads a file of this name, or None.

    Args:
        path: the file, maybe not there.
    """
    ending = path.suffix.lower()
    if ending in _COMPRESSED:
        inner = _BUILDERS.get(Path(path.stem).suffix.lower())
        return inner if inner != "parquet" else None
    return "imagefolder" if ending in _IMAGES else _BUILDERS.get(ending)


def _is_folder(data: str, path: Path) -> bool:
    return path.is_dir()


def _is_file(data: str, path: Path) -> bool:
    return path.is_file()


def _open_folder(data: str, path: Path, streaming: bool) -> Opened:
    """A folder of one kind of files, by split.

    Raises:
        DataError: it has several kinds or none, or a file cannot be read.
    """
    builder, paths = _files_in(data, path)
    return _open_with(builder, data, _by_split(builder, path, paths), streaming)


def _open_file(data: str, path: Path, streaming: bool) -> Opened:
    """A single file.

    Raises:
        DataError: it is of another kind, or cannot be read.
    """
    builder = builder_of(path)
    if builder is None:
        raise DataError(
            f"{data}: expected a file {', '.join(f'*{end}' for end in _BUILDERS)}, or a"
            " folder of those or of images"
        )
    return _open_with(builder, data, {WHOLE: [str(path)]}, streaming)


def _open_with(builder: str, data: str, files: Mapping[str, list[str]], streaming: bool) -> Opened:
    """Files that one builder of ``datasets`` reads, by split."""
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
    except Exception as error:  # damaged files raise anything
        raise unreadable(f"{data}: cannot be read", error) from None
    return Opened(splits, True, builder, files)


def _files_in(data: str, folder: Path) -> tuple[str, list[Path]]:
    """The builder for the files in a folder, and their paths within it."""
    by_builder: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in _UNFINISHED:
            raise DataError(f"{path}: a download that did not end. Fetch the file again.")
        relative = path.relative_to(folder)
        builder = builder_of(path)
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
    return next(iter(by_builder.items()))


def _by_split(builder: str, folder: Path, paths: list[Path]) -> dict[str, list[str]]:
    """The files by the split that their folders or names tell; `WHOLE` for those that tell none."""
    tops = {path.parts[0].lower() for path in paths if len(path.parts) > 1}
    # A class may be called "train", so a folder of images is a split only if all folders are.
    by_name = builder != "imagefolder" or tops <= set(_SPLIT_WORDS)
    files: dict[str, list[str]] = {}
    for path in paths:
        split = (_split_of(path, builder) if by_name else None) or WHOLE
        files.setdefault(split, []).append(str(folder / path))
    return files


def _split_of(path: Path, builder: str) -> str | None:
    """The split that a path within a folder of data names, if it does."""
    words = [part.lower() for part in path.parts[:-1]]
    if builder != "imagefolder":
        words += re.split(r"[-._ \d]", path.name.lower())  # c4-train.00000-of-01024.json.gz
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), None)


FOLDER = Opener("folder", _is_folder, _open_folder)
FILE = Opener("file", _is_file, _open_file)
